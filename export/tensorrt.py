"""TensorRT export: an engine for named GPUs, built ahead of time from our own graph.

On a machine without a GPU an engine cannot be run. So the graph that it is built from is proved in ONNX Runtime, its
integers bit for bit and its logits within a tolerance, and the manifest says of the engine: built, not run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetune.artifact import Artifact, draft, identity, require_space, write_text
from edgetune.backends import require, version
from edgetune.data.contract import declared_stop_ids
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, UnsupportedError
from edgetune.export.contract import RuntimeFacts, check_contract
from edgetune.export.decoder_graph import PlainGraph
from edgetune.export.decoder_layers import BlockLayers, FloatLayers
from edgetune.export.decoder_run import score_rows
from edgetune.export.decoder_source import Sizes, Source, check_decoder, open_source, quantizer_of, shortened
from edgetune.export.gguf_child import run_child
from edgetune.export.onnx_file import OnnxFile
from edgetune.export.onnx_own import copy_tokenizer
from edgetune.export.onnx_shapes import Promise, check_shapes
from edgetune.export.parity import HALF, hold, parity, torch_logits
from edgetune.recipe import Gptq, Rtn
from edgetune.recipe_export import TensorrtExport
from edgetune.runtime.engine import why_not_run

if TYPE_CHECKING:
    from edgetune.compress.scheme import Quantized

STAGE = "export.tensorrt/3"
ENGINE, SETTINGS = "model.engine", "tensorrt.json"
NOT_RUN = "built, not run"
CHUNK = 512  # most tokens of one run
MAX_LENGTH = 2048  # of context, where the recipe names none and the model has more
# What TensorRT for RTX builds for in one file; 7.5 is left out because it has no int4.
CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")

Progress = Callable[[int, int, str], None]


def check(config: TensorrtExport, model_config: dict[str, Any], quantized: Gptq | Rtn | None) -> None:
    """Refuse, before any work, what cannot be built. Raises UnsupportedError naming the nearest that can."""
    sizes = check_decoder(model_config)
    if (config.max_length or 0) > sizes.max_length:
        raise UnsupportedError(f"max_length={config.max_length} is more than the {sizes.max_length} positions of the "
                               f"model; use max_length: {sizes.max_length} or less")  # fmt: skip
    if config.library == "tensorrt" and config.compute_capability is not None:
        raise UnsupportedError("library tensorrt builds for the GPU of this machine; leave compute_capability out, "
                               "or use library: tensorrt-rtx")  # fmt: skip
    if config.library == "tensorrt" and (why := why_not_run("tensorrt")) is not None:
        raise UnsupportedError(f"library tensorrt builds for the GPU of this machine, but {why}; "
                               "use library: tensorrt-rtx")  # fmt: skip
    if config.precision == "int4" and "7.5" in (config.compute_capability or ()):
        raise UnsupportedError("compute_capability 7.5 has no int4; use precision fp16, or leave 7.5 out")
    if config.precision == "fp16":
        if quantized is not None:
            raise UnsupportedError("tensorrt precision fp16 holds no quantized weights; use precision int4, "
                                   "or drop the compress step")  # fmt: skip
        return
    if quantized is None:
        raise UnsupportedError("tensorrt precision int4 writes a checkpoint's integers and rounds nothing itself; "
                               "add a gptq step (bits 4, group_size 32, sym true), or use precision fp16")  # fmt: skip
    if quantized.recover is not None:
        raise UnsupportedError("tensorrt's graph has no correction beside integers; leave out recover or distill.into: "
                               "adapter, or export onnx with builder: own")  # fmt: skip
    if quantized.allocate is not None:
        raise UnsupportedError("tensorrt int4 blocks are of 4 bits in every layer; use bits: 4 in place of allocate")
    wrong = [f"{name}={getattr(quantized, name)}" for name, only in (("bits", 4), ("sym", True))
             if getattr(quantized, name) != only]  # fmt: skip
    wrong += [f"group_size={quantized.group_size}"] if quantized.group_size not in (32, 64, 128) else []
    if wrong:
        raise UnsupportedError(f"tensorrt int4 blocks cannot hold {', '.join(wrong)}; use bits: 4, sym: true and "
                               "group_size: 32, 64 or 128")  # fmt: skip
    if isinstance(quantized, Gptq) and quantized.desc_act and not quantized.static_groups:
        raise UnsupportedError("desc_act without static_groups takes columns out of their blocks; "
                               "set static_groups: true")  # fmt: skip


def planned_identity(config: TensorrtExport, source_identity: str) -> str:
    """Give the identity of what `run` would make."""
    return identity(STAGE, config.model_dump(mode="json"), [source_identity], _sources(config))


def run(config: TensorrtExport, source: Artifact, out: Path, *, progress: Progress | None = None) -> Artifact:
    """Build an engine from a `model` (fp16) or `gptq` (int4) artifact: a `tensorrt` artifact.

    Raises UnsupportedError before any work, StageError with the refused node where TensorRT builds nothing, and
    ContractError, leaving nothing, where integers, token ids, stop set, template or the graph's logits differ.
    """
    tell = progress or (lambda _done, _total, _what: None)
    model_config = _check_source(config, source)
    module = _module(config)
    for backend in ("onnx", "onnxruntime", module):
        require(backend)
    golden = Golden.read(source.path)
    _hold_stops(golden, source.path)
    require_space(out.parent, 3 * source.size_bytes)
    with draft(
        out, kind="tensorrt", stage=STAGE, config=config.model_dump(mode="json"), parents=[source],
        sources=_sources(config), versions=_versions(module),
    ) as pending:  # fmt: skip
        graph = pending.work / "model.onnx"
        try:
            tell(0, 4, "graph")
            opened = open_source(source)
            with OnnxFile(graph) as file:
                PlainGraph(file, (BlockLayers if opened.quantized else FloatLayers)(file, opened, "FLOAT16")).write()
            pending.notes["graph"] = check_shapes(graph, Promise.of_sizes(opened.sizes))
            if opened.quantized:
                pending.notes["integers"] = {"layers": prove_blocks(graph, opened.quantized), "differences": 0}
            tell(1, 4, "logits")
            rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
            reference = _reference(source)
            found = parity((torch_logits(reference, ids) for ids in rows), score_rows(graph, rows))
            hold(found, HALF, "the graph of the engine")
            pending.notes["parity"] = {"graph in onnxruntime": found.note(HALF)}
            del reference
            tell(2, 4, "engine")
            job = {
                "file": str(graph), "out": str(pending.path / ENGINE), "library": module,
                "compute_capability": capabilities(config),
                "profiles": profiles(opened.sizes, context_length(config, opened.sizes)),
            }  # fmt: skip
            built = run_child("edgetune.export.tensorrt_build", job, pending.work / "build.json")
        finally:
            shutil.rmtree(pending.work, ignore_errors=True)  # large, and quicker made again than trusted
        tell(3, 4, "contract")
        copy_tokenizer(source, pending.path)
        settings = engine_settings(config, opened, golden, built["version"])
        write_text(pending.path / SETTINGS, json.dumps(settings, indent=1) + "\n")
        pending.notes["contract"] = _hold_contract(golden, pending.path)
        pending.scheme = dict(source.manifest.scheme or {}) or {"format": "tensorrt", "bits_per_weight": 16.0}
        pending.seed, pending.calibration = source.manifest.seed, source.manifest.calibration
        pending.fallbacks = [*source.manifest.fallbacks, *shortened(model_config)]
        pending.notes |= {"status": NOT_RUN, "engine": {"layers": built["layers"], **settings}, "build": built["log"]}
    return pending.artifact


def _module(config: TensorrtExport) -> str:
    return config.library.replace("-", "_")


def _sources(config: TensorrtExport) -> dict[str, str]:
    """Name what an engine is made with, and runs with alone: the library and, where it is built for it, this GPU."""
    found = {"library": f"{config.library} {version(_module(config)) or ''}".rstrip()}
    if config.library == "tensorrt":
        import torch

        if torch.cuda.is_available():
            found["gpu"] = "{} {}.{}".format(torch.cuda.get_device_name(), *torch.cuda.get_device_capability())
    return found


def capabilities(config: TensorrtExport) -> list[str]:
    """Give the compute capabilities of the engine; none where it is built for the GPU that is there."""
    if config.library == "tensorrt":
        return []
    return list(config.compute_capability or CAPABILITIES)


def context_length(config: TensorrtExport, sizes: Sizes) -> int:
    """Give the most tokens of context."""
    return config.max_length or min(MAX_LENGTH, sizes.max_length)


def profiles(sizes: Sizes, max_length: int) -> list[dict[str, list[list[int]]]]:
    """Give the shapes (smallest, usual, largest) of each input: a profile for prefill, and one for decode."""
    chunk = min(CHUNK, max_length)
    prefill = ((1, 0), (min(128, chunk), 0), (chunk, max_length - 1))
    decode = ((1, 1), (1, max_length // 2), (1, max_length - 1))
    made = []
    for lengths in (prefill, decode):
        shapes = {name: [[1, new] for new, _ in lengths] for name in ("input_ids", "position_ids")}
        shapes["attention_mask"] = [[1, new + past] for new, past in lengths]
        cache = [[1, sizes.n_kv_heads, past, sizes.head_size] for _, past in lengths]
        names = (f"past_key_values.{i}.{part}" for i in range(sizes.n_layers) for part in ("key", "value"))
        made.append(shapes | dict.fromkeys(names, cache))
    return made


def engine_settings(config: TensorrtExport, source: Source, golden: Golden, built_by: str) -> dict[str, Any]:
    """Give what the engine's runtime has to know, which `tensorrt.json` carries."""
    sizes = source.sizes
    max_length = context_length(config, sizes)
    return {
        "library": config.library, "version": built_by, "precision": config.precision,
        "compute_capability": capabilities(config), "max_length": max_length,
        "chunk": min(CHUNK, max_length), "n_layers": sizes.n_layers, "n_kv_heads": sizes.n_kv_heads,
        "head_size": sizes.head_size, "n_vocab": sizes.n_vocab, "stop_ids": golden.stop_ids,
    }  # fmt: skip


def prove_blocks(graph: Path, layers: Mapping[str, Quantized]) -> int:
    """Hold every block of int4 to the checkpoint, codes and scales bit for bit; give the number of layers.

    Raises ContractError naming the first layer that differs or is missing.
    """
    onnx = require("onnx")
    model = onnx.load(str(graph), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {node.input[0].removesuffix(".int4"): node for node in model.graph.node if node.op_type.startswith("Deq")}
    for name, layer in layers.items():
        if name not in found:
            raise ContractError(f"layer {name} of the checkpoint is not in the graph as integers")
        codes, scales = (
            onnx.numpy_helper.to_array(stored[part], base_dir=str(graph.parent)) for part in found[name].input[:2]
        )
        pairs = (("codes", codes.astype(np.int8).T, layer.q.numpy().astype(np.int8) - 8),
                 ("scales", scales.T, layer.scales.numpy()))  # fmt: skip
        for what, ours, wanted in pairs:
            if ours.shape != wanted.shape or (ours != wanted).any():
                raise ContractError(f"{what} of {name} differ from the checkpoint's")
    return len(layers)


def _check_source(config: TensorrtExport, source: Artifact) -> dict[str, Any]:
    """Check the artifact as `check` does the recipe, and give its config.json."""
    kind = source.manifest.kind
    if kind not in ("model", "gptq"):
        raise UnsupportedError(f"tensorrt exports a model or gptq artifact, {source.path} is of kind {kind}")
    model_config: dict[str, Any] = json.loads((source.path / "config.json").read_bytes())
    stored = model_config.get("quantization_config") or {}
    if stored.get("desc_act"):
        raise UnsupportedError(f"{source.path}: columns have left their blocks; quantize with static_groups: true")
    check(config, model_config, quantizer_of(source) if kind == "gptq" else None)
    if not (source.path / "tokenizer.json").is_file():
        raise UnsupportedError(f"{source.path} has no tokenizer.json, which the engine's tokenizer is read from")
    return model_config


def _reference(source: Artifact) -> Any:
    """Give the torch model with the graph's weights: rounded to float16, computed in float32."""
    import torch

    if source.manifest.kind == "gptq":
        from edgetune.compress.checkpoint import load_dequantized

        return load_dequantized(source.path, torch.float16).float()
    from edgetune.compress.layerwise import load_whole

    return load_whole(source.path, torch.float16).float()


def _hold_stops(golden: Golden, source: Path) -> None:
    """Raise ContractError where the source declares other end tokens than those that training used."""
    declared = declared_stop_ids(source) or golden.stop_ids
    if set(declared) != set(golden.stop_ids):
        raise ContractError(
            f"stop set differs: the checkpoint declares {declared}, training ended answers at {golden.stop_ids}"
        )


def _hold_contract(golden: Golden, folder: Path) -> dict[str, Any]:
    """Hold what the engine's runtime reads to the golden conversations; it adds no BOS, whatever the tokenizer says."""
    from edgetune.runtime.engines.tensorrt_engine import EngineFiles

    files = EngineFiles.read(folder)
    bos = json.loads((folder / "tokenizer_config.json").read_bytes()).get("bos_token")
    bos_id = files.tokenizer.token_to_id(bos["content"] if isinstance(bos, dict) else bos or "")
    facts = RuntimeFacts(frozenset(files.settings["stop_ids"]), bos_id, False, files.chat_template())
    return check_contract(golden, facts, files.tokenize)


def _versions(module: str) -> dict[str, str]:
    own = {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
    return own | {name: version(name) or "" for name in ("onnx", "onnxruntime", module)}
