"""Write a model as a GGUF file for llama.cpp, and prove in llama.cpp that it is the same model."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune import artifact, backends
from edgetune.artifact import Artifact, draft, require_space
from edgetune.compress.architectures import check_architecture
from edgetune.data.golden import FILE as GOLDEN_FILE
from edgetune.data.golden import Golden
from edgetune.errors import UnsupportedError
from edgetune.export import modelfile
from edgetune.export.gguf_allocation import check_types, layer_types, predicted_ms
from edgetune.export.gguf_child import convert
from edgetune.export.gguf_codes import choose_codes
from edgetune.export.gguf_families import common, family, gguf_name, query_width, shared_heads
from edgetune.export.gguf_sensitivity import read as read_sensitivity
from edgetune.export.gguf_times import read as read_times
from edgetune.export.gguf_types import BLOCK, PLAIN, choose_types, n_bytes
from edgetune.export.gguf_verify import verify
from edgetune.export.gguf_vocab import Vocabulary, read_vocabulary
from edgetune.export.gguf_write import Weights, artifact_weights, read_config, tensors, write_gguf, written_shapes
from edgetune.gguf_header import read_header, tensor_bytes
from edgetune.progress import Report, silent
from edgetune.recipe_export import GgufExport

STAGE = "export.gguf/8"
FILE = "model.gguf"
ROUNDED = "allocate chooses types for float weights; drop the gptq or rtn step before it"
TWICE = "gptq: true chooses codes by the float weights; drop the gptq or rtn step before it"


def check(config: GgufExport, model_config: Mapping[str, Any]) -> None:
    """Refuse, before any work, what cannot be exported. Raises UnsupportedError or MissingBackendError."""
    model_config = common(model_config)
    family(model_config)
    backends.require("gguf")
    if config.type not in PLAIN:
        backends.require("llama_cpp")
    if config.gptq or config.weighed:
        try:
            check_architecture(dict(model_config))
        except UnsupportedError as error:
            without = "without gptq and allocate" if config.allocate else "without gptq"
            raise UnsupportedError(f"{error}; {without} and with imatrix: false it can be exported") from error
    if config.allocate is not None:
        check_types(config.allocate, model_config)
    if not config.gptq:
        return
    if config.allocate is None and not config.type.startswith(("Q4", "Q5", "Q6")):
        raise UnsupportedError(
            f"gptq: true chooses codes of Q4, Q5 and Q6 types, {config.type} is none; drop gptq, or take one of these"
        )
    for key, width in _widths(model_config).items():
        if width % BLOCK["Q8_0"]:
            raise UnsupportedError(
                f"gptq: true needs rows in multiples of {BLOCK['Q8_0']}, {key} gives rows of {width}; drop gptq"
            )


def _widths(model_config: Mapping[str, Any]) -> dict[str, int]:
    """Columns of a block's matrices, by what decides them."""
    inner = int(model_config["intermediate_size"])
    return {
        "hidden_size": int(model_config["hidden_size"]),
        "intermediate_size": inner,
        "kv_heads": query_width(model_config),
    }


def check_rows(config: GgufExport, model_config: Mapping[str, Any], chosen: Collection[str]) -> None:
    """Refuse a width that a recipe chose and the type has no blocks for; one that came with the model falls back.

    `chosen` are keys of `prune`. Raises UnsupportedError naming the key.
    """
    if config.type in PLAIN:
        return
    for key, width in _widths(common(model_config)).items():
        if key in chosen and width % BLOCK["Q8_0"]:
            raise UnsupportedError(
                f"prune.{key} leaves rows of {width}, {config.type} packs weights by {BLOCK['Q8_0']}; "
                "choose a multiple, or export F16"
            )


def planned_identity(
    config: GgufExport,
    source_identity: str,
    calibration_digest: str | None,
    sensitivity: str | None = None,
    times: str | None = None,
) -> str:
    """Give the identity of what `run` would make; `sensitivity`, `times` are of the evidence which `allocate` reads."""
    parents = [source_identity, *(one for one in (sensitivity, times) if one)]
    return artifact.identity(STAGE, config.model_dump(), parents, _sources(calibration_digest))


def run(
    config: GgufExport, source: Artifact, out: Path, *, moments: Mapping[str, NDArray[Any]] | None,
    calibration_digest: str | None = None, rows: NDArray[np.int64] | None = None, sensitivity: Artifact | None = None,
    times: Artifact | None = None, device: str = "cpu", progress: Report = silent,
) -> Artifact:  # fmt: skip
    """Write `model.gguf` and hold it to the golden conversations of its source.

    `source` is a `model` or `gptq` artifact. `moments` maps module names ("model.layers.0.self_attn.q_proj") to the
    mean squared inputs [C] of the calibration rows whose digest is given; None quantizes without them. `rows` [N, T]
    are these rows, which GPTQ reads. `allocate` needs `sensitivity`, and `times` where its budget is one of time.
    Raises UnsupportedError, StageError where llama.cpp fails, ContractError where the file is not the same model.
    """
    assert (moments is None and rows is None) == (calibration_digest is None), "they come with their digest"
    assert (rows is not None) == config.gptq, "GPTQ reads rows, nothing else does"
    assert (sensitivity is not None) == (config.allocate is not None), "types are allocated by what was measured"
    model_config = read_config(source.path)
    check(config, model_config)
    if (config.gptq or config.allocate) and source.manifest.kind != "model":
        raise UnsupportedError(TWICE if config.gptq else ROUNDED)
    weights = artifact_weights(source, model_config)
    vocabulary = read_vocabulary(source.path, int(model_config["vocab_size"]))
    golden = Golden.read(source.path)
    shapes = written_shapes(weights, model_config)
    of = family(model_config)
    weighed = {gguf_name(f"{module}.weight", of): values for module, values in (moments or {}).items()}
    given = _kept_types(config, weights, model_config)
    if config.allocate is not None and sensitivity is not None:
        taken = read_times(times) if times is not None else None
        chosen = layer_types(config.allocate, model_config, read_sensitivity(sensitivity), taken)
        given = {gguf_name(f"{module}.weight", of): kind for module, kind in chosen.items()}
    types, fallbacks = choose_types(
        shapes, config.type, gptq=config.gptq, n_shared=shared_heads(model_config), weighed=bool(weighed), given=given
    )
    kept = {name for name, hf in tensors(weights, model_config) if weights.kept(hf, types[name])}
    weighed = {name: values for name, values in weighed.items() if name not in kept}
    require_space(out.parent, n_bytes(shapes, types))
    evidence = [one for one in (sensitivity, times) if one is not None]
    with draft(
        out, kind="gguf", stage=STAGE, config=config.model_dump(), parents=[source, *evidence],
        sources=_sources(calibration_digest), versions=_versions(),
    ) as pending:  # fmt: skip
        pending.calibration = calibration_digest
        pending.fallbacks = [*fallbacks, *vocabulary.remarks]
        if source.manifest.kind == "gptq" and config.type not in PLAIN:
            n_layers = len(weights.integers)
            pending.notes["integers"] = {"layers": n_layers, "kept": len(kept)}
            if len(kept) < n_layers:
                pending.fallbacks.append(
                    f"the integers of GPTQ are rounded again in {n_layers - len(kept)} of {n_layers} layers, "
                    f"to {config.type}"
                )
        try:
            file = pending.path / FILE
            if config.type in PLAIN:
                write_gguf(file, weights, model_config, vocabulary, types, config.type, progress)
            else:
                used = convert(source, file, types, weighed, target=config.type, work=pending.work, progress=progress)
                pending.notes["importance"] = f"{used} of {sum(kind != 'F32' for kind in types.values())} matrices"
            if rows is not None:
                notes, fell_back = choose_codes(
                    file, source, weights, model_config, rows, work=pending.work, device=device, progress=progress,
                    key=planned_identity(config, source.identity, calibration_digest, *(e.identity for e in evidence)),
                )  # fmt: skip
                pending.notes |= notes
                pending.fallbacks += fell_back
            progress(0, 1, "verify")
            pending.notes |= verify(file, config.type, types, weights, source.path, golden, vocabulary, pending.work)
        finally:
            shutil.rmtree(pending.work, ignore_errors=True)  # large, and quicker made again than trusted
        shutil.copyfile(source.path / GOLDEN_FILE, pending.path / GOLDEN_FILE)
        pending.notes["ollama"] = _write_modelfile(pending.path, golden, vocabulary)
        pending.scheme = {"format": "gguf", "type": config.type, "bits_per_weight": _bits(file, shapes)}
        if given:
            pending.scheme["type_of"] = given
        if given and times is not None:
            pending.notes["predicted_ms_per_token"] = predicted_ms(model_config, chosen, read_times(times))
    return pending.artifact


def _kept_types(config: GgufExport, weights: Weights, model_config: Mapping[str, Any]) -> dict[str, str]:
    """Give each layer of a checkpoint the type that holds its integers, where the type that was asked for is one."""
    kinds = {name: kept.kind for name, kept in weights.integers.items() if kept is not None}
    if config.type not in kinds.values():
        return {}
    of = family(model_config)
    return {gguf_name(name, of): kind for name, kind in kinds.items()}


def _write_modelfile(folder: Path, golden: Golden, vocabulary: Vocabulary) -> str:
    """Write Ollama's Modelfile where the chat template allows; give its name, or why there is none."""
    try:
        text = modelfile.modelfile(golden, FILE, [vocabulary.tokens[token] for token in golden.stop_ids])
    except UnsupportedError as error:
        return f"no Modelfile: {error}"
    (folder / modelfile.FILE).write_text(text, encoding="utf-8")
    return modelfile.FILE


def _sources(calibration_digest: str | None) -> dict[str, str]:
    return {"calibration": calibration_digest} if calibration_digest else {}


def _versions() -> dict[str, str]:
    found = {name: backends.version(name) for name in ("gguf", "llama_cpp")}
    return {name: version for name, version in found.items() if version}


def _bits(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> float:
    """Bits a weight, scales counted, header and vocabulary not."""
    taken = sum(map(tensor_bytes, read_header(file).tensors))
    return round(8 * taken / sum(int(np.prod(shape)) for shape in shapes.values()), 4)
