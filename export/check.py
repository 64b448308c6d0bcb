"""Hold a GGUF file or an ONNX folder, ours or another's, to the contract, against a reference model.

Ids, BOS, stop set, chat template and the end of generation are exact. Logits and perplexity are compared with those of
the reference model itself, rounding included, so how far they may lie is the caller's to say.
"""

from __future__ import annotations

import math
import tempfile
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from unicodedata import normalize

from edgetune.artifact import Artifact
from edgetune.backends import require
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, SourceError, StageError, UnsupportedError
from edgetune.export import gguf_verify
from edgetune.export.contract import RuntimeFacts, checks
from edgetune.export.gguf_vocab import composes
from edgetune.export.parity import Logits, Tolerance, hold, parity, torch_logits
from edgetune.export.perplexity import Losses, compare, hold_perplexity, text_windows, token_losses
from edgetune.export.stops import Ends, Led, Ran, hold_loop, lead


@dataclass(frozen=True)
class Check:
    """One line of the contract: whether it holds, and what was found."""

    name: str
    holds: bool
    found: str


@dataclass(frozen=True)
class _Rows:
    """What a file is run on: golden rows, general text, and where its loop is led through."""

    golden: list[list[int]]
    windows: list[list[int]]
    runs: list[Led]


@dataclass(frozen=True)
class _Opened:
    """What a runtime makes of a file. `logits` of golden rows come before `losses` of windows."""

    facts: RuntimeFacts
    tokenize: Callable[[str], list[int]]
    logits: Iterable[Logits]
    losses: Iterable[Losses]
    ran: list[Ran] | str
    loop: str


def check(path: Path, reference: Artifact, *, max_kl: float) -> list[Check]:
    """Run a `.gguf` file, or a folder with `genai_config.json`, and compare it with a `model` artifact.

    `max_kl` is the mean KL(reference || file) a token that is allowed, nats, and the mean difference of the log
    likelihood of general text. Raises SourceError for what is neither and for a file that llama.cpp does not load,
    UnsupportedError for another kind of reference, ArtifactError for a damaged one.
    """
    if reference.manifest.kind != "model":
        raise UnsupportedError(
            f"{reference.path} is of kind {reference.manifest.kind}; a model is what to check against"
        )
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    golden = Golden.read(reference.path)
    given = _Rows(
        [c.ids for c in golden.conversations] + [t.ids for t in golden.texts], text_windows(reference.path),
        lead(golden),
    )  # fmt: skip
    texts = [c.text for c in golden.conversations] + [t.text for t in golden.texts]
    with tempfile.TemporaryDirectory() as scratch:
        if path.is_dir() and (path / "genai_config.json").is_file():
            opened = _onnx(path, given, composed=composes(reference.path))
        elif path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
            composed = [normalize("NFC", text) for text in texts] if composes(reference.path) else texts
            opened = _gguf(path, dict(zip(texts, composed, strict=True)), given, Path(scratch))
        else:
            raise SourceError(f"{path} is neither a .gguf file nor an ONNX folder with genai_config.json")
        found = [_tried(name, one) for name, one in checks(golden, opened.facts, opened.tokenize).items()]
        return found + _computed(reference, golden, given, opened, max_kl)


def _tried(name: str, one: Callable[[], int | str]) -> Check:
    try:
        said = one()
    except ContractError as error:
        return Check(name, False, str(error))
    if isinstance(said, str):
        return Check(name, True, said)
    return Check(name, True, f"equal, {said} tokens" if said else "equal")


def _computed(reference: Artifact, golden: Golden, given: _Rows, opened: _Opened, max_kl: float) -> list[Check]:
    """Compare what the reference computes: logits, where answers end, and the perplexity of general text."""
    import torch

    from edgetune.compress.layerwise import load_whole

    model = load_whole(reference.path, torch.float32)
    ends = Ends(golden, opened.facts.stop_ids)

    def logits() -> str:
        result = parity((torch_logits(model, row) for row in given.golden), opened.logits, ends.see)
        hold(result, Tolerance(mean_kl=max_kl), "the file")
        return (
            f"mean KL {result.mean_kl:.4g} of at most {max_kl:g}, the same first choice at {result.top1_agreement:.1%} "
            f"of {result.n_positions} positions"
        )

    def losses() -> str:
        limit = math.expm1(max_kl)
        deque(opened.logits, maxlen=0)  # what a broken comparison left of the golden rows
        wanted = (token_losses(torch_logits(model, row), row) for row in given.windows)
        result = compare(wanted, opened.losses)
        hold_perplexity(result, "the file", limit)
        return (
            f"{result.runtime:.4g}, the reference's {result.reference:.4g}: {result.difference:+.2%}, standard error "
            f"{result.error:.2%}, of at most {limit:.2%}, on {result.n_tokens} tokens"
        )

    def generation() -> str:
        hold_loop(given.runs, opened.ran, opened.loop)
        places = ends.hold()["positions"]
        return f"ends at {golden.stop_ids} in {opened.loop}, and where the reference does at {places} places"

    lines = {"logits": logits, "perplexity": losses, "end of generation": generation}
    return [_tried(name, one) for name, one in lines.items()]


def _gguf(path: Path, texts: dict[str, str], given: _Rows, work: Path) -> _Opened:
    require("llama_cpp")
    try:
        said = gguf_verify.ask(path, list(texts.values()), given.golden, given.windows, given.runs, work)
    except StageError as error:
        raise SourceError(f"{path} does not run in llama.cpp: {error}") from error
    ids = dict(zip(texts, said.ids, strict=True))
    return _Opened(said.facts, ids.__getitem__, said.logits, said.losses, said.ran, gguf_verify.LOOP)


def _onnx(folder: Path, given: _Rows, *, composed: bool) -> _Opened:
    from edgetune.export import onnx_run
    from edgetune.export.onnx import encoder, runtime_facts
    from edgetune.runtime.engines.onnx_folder import load_tokenizer

    tokenizer = load_tokenizer(folder)
    facts = runtime_facts(folder, tokenizer)
    tokenizer.update_options(add_special_tokens="false")
    found = onnx_run.run_rows(folder, given.golden + given.windows)
    return _Opened(
        facts, encoder(tokenizer, composed=composed), islice(found, len(given.golden)),
        map(token_losses, found, given.windows), onnx_run.lead_loop(folder, given.runs), onnx_run.LOOP,
    )  # fmt: skip
