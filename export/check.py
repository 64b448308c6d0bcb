"""Hold a GGUF file or an ONNX folder, ours or another's, to the contract, against a reference model.

Ids, BOS, stop set and chat template are exact. Logits are compared with those of the reference model itself, rounding
included, so how far they may lie is the caller's to say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from edgetune.artifact import Artifact
from edgetune.backends import require
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, SourceError, StageError, UnsupportedError
from edgetune.export.contract import RuntimeFacts, checks
from edgetune.export.gguf_vocab import composes
from edgetune.export.parity import Logits, Tolerance, hold, parity, torch_logits


@dataclass(frozen=True)
class Check:
    """One line of the contract: whether it holds, and what was found."""

    name: str
    holds: bool
    found: str


def check(path: Path, reference: Artifact, *, max_kl: float) -> list[Check]:
    """Run a `.gguf` file, or a folder with `genai_config.json`, and compare it with a `model` artifact.

    `max_kl` is the mean KL(reference || file) a token that is allowed, nats. Raises SourceError for what is neither
    and for a file that llama.cpp does not load, UnsupportedError for another kind of reference, ArtifactError for a
    damaged one.
    """
    if reference.manifest.kind != "model":
        raise UnsupportedError(
            f"{reference.path} is of kind {reference.manifest.kind}; a model is what to check against"
        )
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    golden = Golden.read(reference.path)
    rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
    texts = [c.text for c in golden.conversations] + [t.text for t in golden.texts]
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_dir() and (path / "genai_config.json").is_file():
            facts, tokenize, logits = _onnx(path, rows, composed=composes(reference.path))
        elif path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
            given = [normalize("NFC", text) for text in texts] if composes(reference.path) else texts
            facts, tokenize, logits = _gguf(path, dict(zip(texts, given, strict=True)), rows, Path(scratch))
        else:
            raise SourceError(f"{path} is neither a .gguf file nor an ONNX folder with genai_config.json")
        found = [_tried(name, one) for name, one in checks(golden, facts, tokenize).items()]
        found.append(_logits(reference, rows, logits, max_kl))
    return found


def _tried(name: str, one: Callable[[], int]) -> Check:
    try:
        n_tokens = one()
    except ContractError as error:
        return Check(name, False, str(error))
    return Check(name, True, f"equal, {n_tokens} tokens" if n_tokens else "equal")


def _logits(reference: Artifact, rows: list[list[int]], found: Iterable[Logits], max_kl: float) -> Check:
    import torch

    from edgetune.compress.layerwise import load_whole

    model = load_whole(reference.path, torch.float32)
    try:
        result = parity((torch_logits(model, row) for row in rows), found)
        said = (
            f"mean KL {result.mean_kl:.4g} of at most {max_kl:g}, the same first choice at {result.top1_agreement:.1%} "
            f"of {result.n_positions} positions"
        )
        hold(result, Tolerance(mean_kl=max_kl), "the file")
    except ContractError as error:
        return Check("logits", False, str(error))
    return Check("logits", True, said)


Opened = tuple[RuntimeFacts, Callable[[str], list[int]], Iterable[Logits]]


def _gguf(path: Path, texts: dict[str, str], rows: list[list[int]], work: Path) -> Opened:
    from edgetune.export.gguf_child import run_child

    require("llama_cpp")
    job = {"file": str(path), "texts": list(texts.values()), "rows": rows, "folder": str(work)}
    try:
        said: dict[str, Any] = run_child("edgetune.export.gguf_probe", job, work / "probe.json")
    except StageError as error:
        raise SourceError(f"{path} does not run in llama.cpp: {error}") from error
    facts = RuntimeFacts(frozenset(said["stop_ids"]), said["bos_id"], said["adds_bos"], said["chat_template"])
    ids = dict(zip(texts, said["ids"], strict=True))
    return facts, ids.__getitem__, (np.load(work / f"{index}.npy") for index in range(len(rows)))


def _onnx(folder: Path, rows: list[list[int]], *, composed: bool) -> Opened:
    from edgetune.export.onnx import encoder, run_rows, runtime_facts
    from edgetune.runtime.engines.onnx_folder import load_tokenizer

    tokenizer = load_tokenizer(folder)
    facts = runtime_facts(folder, tokenizer)
    tokenizer.update_options(add_special_tokens="false")
    return facts, encoder(tokenizer, composed=composed), run_rows(folder, rows)
