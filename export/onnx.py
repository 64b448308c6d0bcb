"""ONNX export: a folder for ONNX Runtime and onnxruntime-genai, built by the latter's model builder or by ourselves.

Either takes our GPTQ checkpoint and keeps its integers, which is proved afterwards, layer by layer. The output head is
rounded, and tied embeddings with it: 8 bits unless the recipe says 4. An embedding of its own is rounded to 8 bits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

from edgetune.artifact import Artifact, draft, identity, require_space, write_text
from edgetune.backends import require, version
from edgetune.data.golden import FILE, Golden
from edgetune.errors import ContractError, StageError, UnsupportedError
from edgetune.export.contract import RuntimeFacts, check_contract
from edgetune.export.decoder_families import FAMILIES
from edgetune.export.decoder_layers import HEAD_BITS
from edgetune.export.decoder_source import check_named, quantizer_of, shortened
from edgetune.export.gguf_families import FAMILIES as GGUF_FAMILIES
from edgetune.export.gguf_vocab import COMPOSED, composes
from edgetune.export.onnx_graph import (
    head_of,
    operators_of,
    prove_integers,
    read_packed,
    with_float_activations,
)
from edgetune.export.onnx_own import build_own, check_own, read_embedding
from edgetune.export.onnx_repack import settle
from edgetune.export.onnx_run import LOOP, lead_loop, run_rows
from edgetune.export.onnx_shapes import Promise, check_shapes
from edgetune.export.parity import HALF, Tolerance, hold, parity, torch_logits
from edgetune.export.perplexity import EIGHT_BITS, LIMIT, compare, hold_perplexity, text_windows, token_losses
from edgetune.export.stops import Ends, hold_loop, lead
from edgetune.recipe import Gptq, Rtn
from edgetune.recipe_export import OnnxExport

STAGE = "export.onnx/3"
GRAPH = "model.onnx"
# What the builder knows and our tests have built; it knows some forty more.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MIXED_BITS = (4, 8)  # what layers of one graph may have
HEAD_BLOCK = 32  # columns of the head that share a scale, int8 activations included
HEAD_METHODS = {8: "rtn_last", 4: "k_quant"}  # the builder's names: the search of k_quant pays at 4 bits only
HEAD_MAX_ERROR = {8: 0.02, 4: 0.2}  # of the weight's norm
MISTRAL = {"sliding_window": 4096, "max_position_embeddings": 131072}  # Transformers' where config.json has no key
TIMEOUT_S = 3600.0

EXACT = Tolerance(max_abs=1e-3)  # float weights
EXACT_INT4 = Tolerance(max_abs=1e-2, mean_kl=1e-6)  # the same integers, float activations
# int8 activations: a difference in the last bit flips roundings, and 30 layers make noise of it. Measured on the
# 135M model: 0.026 with groups of 64, 0.007 with groups of 32.
SHIPPED = Tolerance(mean_kl=0.1)
INT8_ADVICE = "the export with int8 activations (group_size 32 or a lower accuracy_level brings them closer)"

Progress = Callable[[int, int, str], None]


def check(config: OnnxExport, model_config: dict[str, Any], quantized: Gptq | Rtn | None) -> None:
    """Refuse, before any work, what cannot be exported. Raises UnsupportedError naming the nearest that can."""
    if config.builder == "own":
        check_own(config, model_config)
    elif config.adapters:
        raise UnsupportedError("adapters: true is for builder own, whose graph takes their factors as inputs")
    else:
        _check_genai(config, model_config)
    if config.precision in ("fp32", "fp16"):
        if quantized is not None:
            raise UnsupportedError(f"onnx precision {config.precision} holds no quantized weights; use precision int4, "
                                   "or drop the compress step")  # fmt: skip
        return
    bits = 4 if config.precision == "int4" else 8
    if quantized is None:
        raise UnsupportedError(f"onnx precision {config.precision} writes a checkpoint's integers and rounds nothing "
                               f"itself; add a gptq step (bits {bits}, group_size 32 or 64), "
                               "or use precision fp32")  # fmt: skip
    if quantized.allocate is not None:
        if config.precision != "int4" or not set(quantized.widths) <= set(MIXED_BITS):
            raise UnsupportedError(f"onnx precision {config.precision} cannot hold layers of "
                                   f"{', '.join(map(str, quantized.widths))} bits; use precision int4 and "
                                   f"allocate.choices: {list(MIXED_BITS)}, which MatMulNBits has")  # fmt: skip
        if quantized.allocate.grids:
            raise UnsupportedError("onnx has one group_size for all layers; name bits alone in allocate.choices")
    elif quantized.bits != bits:
        raise UnsupportedError(f"onnx precision {config.precision} cannot hold bits={quantized.bits}; "
                               f"use bits: {bits}")  # fmt: skip
    if quantized.group_size not in (16, 32, 64, 128, 256):
        nearest = min((16, 32, 64, 128, 256), key=lambda size: abs(size - quantized.group_size))
        raise UnsupportedError(f"MatMulNBits has no group_size={quantized.group_size}; "
                               f"use {64 if quantized.group_size == -1 else nearest}")  # fmt: skip
    if config.builder == "genai" and quantized.recover is not None:
        raise UnsupportedError("the genai builder writes no correction beside integers; use builder: own, or leave "
                               "out recover or distill.into: adapter")  # fmt: skip
    if config.builder == "genai" and quantized.checkpoint != "gptq":
        raise UnsupportedError("the genai builder reads checkpoints in AutoGPTQ's format; leave checkpoint out, or use "
                               "builder: own")  # fmt: skip
    if isinstance(quantized, Gptq) and quantized.desc_act and not quantized.static_groups:
        raise UnsupportedError("desc_act without static_groups takes columns out of their groups, which no ONNX "
                               "Runtime kernel reads fast; set static_groups: true")  # fmt: skip


def _check_genai(config: OnnxExport, model_config: dict[str, Any]) -> None:
    check_named(model_config, ARCHITECTURES, {"builder: own": FAMILIES, "gguf": GGUF_FAMILIES})
    heads = int(model_config.get("num_attention_heads") or 1)
    head = int(model_config.get("head_dim") or int(model_config.get("hidden_size") or 0) // heads)
    if head % 16:
        raise UnsupportedError(f"head size {head} is not a multiple of 16, which the genai builder's attention needs; "
                               "use builder: own, or export gguf")  # fmt: skip
    if config.precision not in ("fp32", "int4"):
        raise UnsupportedError(f"onnx precision {config.precision} is not what the genai builder writes for a CPU; "
                               "use builder: own, or precision fp32 or int4")  # fmt: skip
    if model_config["architectures"][0] == "MistralForCausalLM":  # the others' windows are in their layer_types
        window, longest = ((MISTRAL | model_config)[key] for key in MISTRAL)
        if window and int(window) < int(longest):
            raise UnsupportedError(f"sliding_window={window} of a Mistral model is left out by the genai builder; "
                                   "use builder: own")  # fmt: skip


def planned_identity(config: OnnxExport, source_identity: str) -> str:
    """Give the identity of what `run` would make."""
    return identity(STAGE, _settings(config), [source_identity])


def _settings(config: OnnxExport) -> dict[str, Any]:
    """What the identity is made of: the builder only where it is not the first one, which had no name."""
    return config.model_dump(mode="json", exclude={"builder"} if config.builder == "genai" else None)


def run(config: OnnxExport, source: Artifact, out: Path, *, progress: Progress | None = None) -> Artifact:
    """Export a `model` (fp32, fp16) or `gptq` (int8, int4) artifact to an `onnx` artifact, and hold it to its contract.

    Raises UnsupportedError before any work, StageError where the builder fails, and ContractError, leaving nothing,
    where integers, token ids, stop set, BOS, chat template or logits differ from the source's.
    """
    tell = progress or (lambda _done, _total, _what: None)
    model_config = _check_source(config, source)
    for backend in ("onnx", "onnxruntime", "onnxruntime_genai"):
        require(backend)
    golden = Golden.read(source.path)
    require_space(out.parent, 2 * source.size_bytes)
    with draft(
        out, kind="onnx", stage=STAGE, config=_settings(config), parents=[source], versions=_versions()
    ) as pending:
        graph = pending.path / GRAPH
        tell(0, 4, "build")
        if config.builder == "own":
            build_own(config, source, graph)
        else:
            build(config, source.path, pending.path, pending.work)
            settle(graph, rounds=config.precision == "int4")
        _finish_files(source, golden, pending.path)
        pending.notes["graph"] = operators_of(graph) | check_shapes(graph, Promise.of_folder(pending.path))
        pending.scheme = dict(source.manifest.scheme or {}) or None
        pending.seed, pending.calibration = source.manifest.seed, source.manifest.calibration
        pending.fallbacks = [*source.manifest.fallbacks]
        if config.builder == "own":
            pending.fallbacks += shortened(model_config)
        tell(1, 4, "weights")
        reference = _reference(config, source, graph, pending.notes)
        if pending.scheme is not None:
            pending.scheme |= {"head_bits": config.head_bits, "accuracy_level": config.accuracy_level}
        tell(2, 4, "contract")
        from edgetune.runtime.engines.onnx_folder import load_tokenizer

        tokenizer = load_tokenizer(pending.path)
        facts = runtime_facts(pending.path, tokenizer)
        tokenizer.update_options(add_special_tokens="false")
        if composed := composes(source.path):
            pending.fallbacks.append(COMPOSED.format("onnxruntime-genai"))
        pending.notes["contract"] = check_contract(golden, facts, encoder(tokenizer, composed=composed))
        runs = lead(golden)
        hold_loop(runs, lead_loop(pending.path, runs), LOOP)
        tell(3, 4, "logits")
        pending.notes |= _hold_logits(config, reference, source.path, pending.path, golden)
    return pending.artifact


def build(config: OnnxExport, source: Path, out: Path, work: Path) -> None:
    """Run the builder in a child process. Raises StageError with its last line where it fails or hangs."""
    options = ["hf_token=false"]
    if config.precision == "int4":
        options += [
            f"accuracy_level={config.accuracy_level}", f"algo_config={HEAD_METHODS[config.head_bits]}",
            f"block_size={HEAD_BLOCK}",
        ]  # fmt: skip
    command = [
        sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-i", str(source.resolve()),
        "-o", str(out.resolve()), "-p", config.precision, "-e", "cpu", "-c", str((work / "cache").resolve()),
        "--extra_options", *options,
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    log = work / "builder.log"
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=work, env=environment,
                timeout=TIMEOUT_S, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise StageError(f"the onnxruntime-genai builder took more than {TIMEOUT_S:.0f} s on {source}") from error
    if code != 0 or not (out / GRAPH).is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
        raise StageError(f"the onnxruntime-genai builder failed on {source} (exit {code}): {lines[-1][:300]}")


def encoder(tokenizer: Any, *, composed: bool) -> Callable[[str], list[int]]:
    """Give what turns text into ids, `composed` where training composed it and this tokenizer does not."""
    return lambda text: [int(token) for token in tokenizer.encode(normalize("NFC", text) if composed else text)]


def runtime_facts(folder: Path, tokenizer: Any) -> RuntimeFacts:
    """Give what onnxruntime-genai knows of a folder: end tokens, BOS, whether it adds one, the chat template."""
    template = folder / "chat_template.jinja"
    if template.is_file():
        text = template.read_text(encoding="utf-8")
    else:
        text = json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template") or ""
    bos = int(tokenizer.bos_token_id)
    return RuntimeFacts(
        stop_ids=frozenset(int(token) for token in tokenizer.eos_token_ids),
        bos_id=bos,
        adds_bos=[int(token) for token in tokenizer.encode("a")][:1] == [bos],
        chat_template=text,
    )


def _check_source(config: OnnxExport, source: Artifact) -> dict[str, Any]:
    """Check the artifact as `check` does the recipe, and give its config.json."""
    model_config: dict[str, Any] = json.loads((source.path / "config.json").read_bytes())
    kind = source.manifest.kind
    if kind not in ("model", "gptq"):
        raise UnsupportedError(f"onnx exports a model or gptq artifact, {source.path} is of kind {kind}")
    stored = model_config.get("quantization_config") or {}
    method: Gptq | Rtn | None = None
    if kind == "gptq":
        if stored.get("desc_act"):
            raise UnsupportedError(f"{source.path}: columns have left their groups; quantize with static_groups: true")
        if stored.get("checkpoint_format", "gptq") != "gptq":
            raise UnsupportedError(f"{source.path} is {stored['checkpoint_format']}; onnx is written from gptq (v1)")
        method = quantizer_of(source)
    check(config, model_config, method)
    return model_config


def _finish_files(source: Artifact, golden: Golden, folder: Path) -> None:
    """Name the trained stop set and BOS, and carry golden conversations and licences along."""
    path = folder / "genai_config.json"
    genai = json.loads(path.read_bytes())
    genai["model"]["eos_token_id"] = golden.stop_ids if len(golden.stop_ids) > 1 else golden.stop_ids[0]
    if golden.bos_id is not None:
        genai["model"]["bos_token_id"] = golden.bos_id
    write_text(path, json.dumps(genai, indent=1) + "\n")
    for name in source.manifest.files:
        if name == FILE or name.upper().startswith(("LICENSE", "NOTICE")):
            shutil.copyfile(source.path / name, folder / name)


def _reference(config: OnnxExport, source: Artifact, graph: Path, notes: dict[str, Any]) -> Any:
    """Give the torch model with the graph's weights, after proving that they are the source's."""
    import torch

    if config.precision in ("fp32", "fp16"):
        from edgetune.compress.layerwise import load_whole

        return load_whole(source.path, torch.float32 if config.precision == "fp32" else torch.float16).float()
    from edgetune.compress.checkpoint import load_dequantized, read_layers

    packed = read_packed(graph)
    notes["integers"] = {"layers": prove_integers(packed, read_layers(source.path)), "differences": 0}
    reference = load_dequantized(source.path, torch.float32)
    head = head_of(packed)
    if head.bits != config.head_bits:
        raise ContractError(f"the output head has {head.bits} bits, {config.head_bits} were asked for")
    error = _take(reference.get_output_embeddings(), head.dequantize(), head.bits, "output head")
    notes["head"] = {"bits": head.bits, "block_size": head.block_size, "relative_error": float(f"{error:.3g}")}
    if (embedding := read_embedding(graph)) is not None:
        error = _take(reference.get_input_embeddings(), embedding, HEAD_BITS, "embedding")
        if error:  # a tied one has taken the head's place already
            notes["embedding"] = {"bits": HEAD_BITS, "relative_error": float(f"{error:.3g}")}
    return reference


def _take(module: Any, table: Any, bits: int, what: str) -> float:
    """Put a rounded table into the reference, a tied one in both its places; give its distance from the source's.

    Raises ContractError where it is another matrix.
    """
    import torch

    weight, rounded = module.weight.data, torch.from_numpy(table)
    error = float((rounded - weight).norm() / weight.norm())
    if not error <= HEAD_MAX_ERROR[bits]:
        raise ContractError(f"the {what} lies {error:.3g} of its norm from the source's; it is another matrix")
    weight.copy_(rounded)
    return error


def _hold_logits(config: OnnxExport, reference: Any, source: Path, folder: Path, golden: Golden) -> dict[str, Any]:
    """Compare logits on golden rows and losses on general text: as shipped and, for integers, with float activations.

    Gives the notes `parity`, `perplexity` and `generation`.
    """
    rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
    windows = text_windows(source)
    wanted = [torch_logits(reference, ids) for ids in rows]
    losses = [token_losses(torch_logits(reference, ids), ids) for ids in windows]
    shipped, ends = run_rows(folder, rows + windows), Ends(golden, ())
    found = parity(wanted, islice(shipped, len(rows)), ends.see)
    perplexity = compare(losses, map(token_losses, shipped, windows))
    limit, same = LIMIT, {}
    if config.precision in ("fp32", "fp16"):
        tolerance = EXACT if config.precision == "fp32" else HALF
        hold(found, tolerance)
        notes: dict[str, Any] = {config.precision: found.note(tolerance)}
    else:
        with _float_twin(folder / GRAPH) as twin:
            floats = run_rows(twin, rows + windows)
            exact = parity(wanted, islice(floats, len(rows)))
            in_floats = compare(losses, map(token_losses, floats, windows))
        hold(exact, EXACT_INT4, "the export with float activations")
        hold_perplexity(in_floats, "the export with float activations")
        limit, same = EIGHT_BITS, {"float_activations": in_floats.note(LIMIT)}
        tolerance = SHIPPED if config.accuracy_level == 4 else EXACT_INT4
        hold(found, tolerance, INT8_ADVICE if config.accuracy_level == 4 else "the export")
        notes = {"float_activations": exact.note(EXACT_INT4), "shipped": found.note(tolerance)}
    stops = ends.hold()
    hold_perplexity(perplexity, "the export", limit)
    return {"parity": notes, "perplexity": perplexity.note(limit) | same, "generation": {"loop": LOOP, **stops}}


@contextmanager
def _float_twin(graph: Path) -> Iterator[Path]:
    """Give a folder beside the draft that computes with float activations over the same weights; removed after."""
    twin = graph.parent.with_name(graph.parent.name + ".float")
    shutil.rmtree(twin, ignore_errors=True)
    try:
        twin.mkdir()
        with_float_activations(graph, twin / GRAPH)
        shutil.copyfile(graph.parent / "genai_config.json", twin / "genai_config.json")
        for data in graph.parent.glob(f"{GRAPH}.data*"):
            os.link(data, twin / data.name)
        yield twin
    finally:
        shutil.rmtree(twin, ignore_errors=True)


def _versions() -> dict[str, str]:
    own = {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
    return own | {name: version(name) or "" for name in ("onnx", "onnxruntime", "onnxruntime_genai")}
