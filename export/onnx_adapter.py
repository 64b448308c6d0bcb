"""A LoRA adapter in ONNX Runtime's adapter format, for our own graph with `adapters: true`, and the proof that it fits.

One session holds several: each run names the one that it wants. The file has A [C, r] and B [r, R], the scale within.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune import artifact, backends
from edgetune.artifact import Artifact, draft
from edgetune.data.golden import FILE as GOLDEN_FILE
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, UnsupportedError
from edgetune.export.decoder_layers import lora_input
from edgetune.export.decoder_run import graph_logits, open_graph
from edgetune.export.lora_pairs import Lora, peft_model, read_lora
from edgetune.export.onnx import EXACT, GRAPH
from edgetune.export.parity import HALF, Logits, hold, parity, torch_logits
from edgetune.progress import Report, silent

STAGE = "export.onnx-adapter/1"
FILE = "adapter.onnx_adapter"


def planned_identity(adapter_identity: str, graph_identity: str) -> str:
    """Give the identity of what `run` would make."""
    return artifact.identity(STAGE, {}, [adapter_identity, graph_identity])


def run(adapter: Artifact, base: Artifact, graph: Artifact, out: Path, *, progress: Report = silent) -> Artifact:
    """Write `adapter.onnx_adapter` for a graph of the adapter's base, and hold its logits there to peft's.

    Raises UnsupportedError for a graph of another model or without room for adapters, and for an adapter that is more
    than plain LoRA; ContractError where a name has no input in the graph, or logits differ.
    """
    ort = backends.require("onnxruntime")
    if graph.manifest.kind != "onnx" or not graph.manifest.config.get("adapters"):
        raise UnsupportedError(f"{graph.path} has no room for adapters; export the base with --builder own --adapters")
    if base.identity not in graph.manifest.parents:
        raise UnsupportedError(f"{graph.path} was made of another model than the adapter's base, {base.path}")
    lora, half = read_lora(adapter), graph.manifest.config["precision"] == "fp16"
    with draft(
        out, kind="onnx-adapter", stage=STAGE, config={}, parents=[adapter, graph],
        versions={"onnxruntime": backends.version("onnxruntime") or ""},
    ) as pending:  # fmt: skip
        progress(0, 2, "write")
        factors = _factors(lora, np.float16 if half else np.float32)
        _check_names(factors, graph.path / GRAPH)
        _write(ort, pending.path / FILE, factors)
        progress(1, 2, "logits")
        golden = Golden.read(adapter.path)
        rows = [c.ids for c in golden.conversations] + [t.ids for t in golden.texts]
        model = peft_model(base.path, adapter.path)
        wanted = (torch_logits(model, row) for row in rows)
        tolerance = HALF if half else EXACT
        found = parity(wanted, adapted_logits(graph.path / GRAPH, pending.path / FILE, rows))
        hold(found, tolerance, f"{FILE} in its graph")
        pending.notes |= {"parity": found.note(tolerance), "matrices": len(lora.pairs)}
        shutil.copyfile(adapter.path / GOLDEN_FILE, pending.path / GOLDEN_FILE)
    return pending.artifact


def adapted_logits(graph: Path, adapter: Path, rows: Sequence[Sequence[int]]) -> Iterator[Logits]:
    """Give the logits [T, V] of each row with an adapter active, as any user of ONNX Runtime activates it."""
    ort = backends.require("onnxruntime")
    loaded = ort.LoraAdapter()
    loaded.Load(str(adapter))
    options = ort.RunOptions()
    options.add_active_adapter(loaded)
    session = open_graph(graph)
    for row in rows:
        ids = np.array([row], np.int64)
        yield graph_logits(session, ids, np.ones_like(ids), options=options)[0]


def _factors(lora: Lora, dtype: Any) -> dict[str, Any]:
    made = {}
    for module, (A, B) in lora.pairs.items():
        made[lora_input(module, "A")] = np.ascontiguousarray(A.T).astype(dtype)
        made[lora_input(module, "B")] = np.ascontiguousarray(B.T * lora.scale).astype(dtype)
    return made


def _check_names(factors: dict[str, Any], graph: Path) -> None:
    onnx = backends.require("onnx")
    inputs = {given.name for given in onnx.load(str(graph), load_external_data=False).graph.input}
    missing = sorted(factors.keys() - inputs)
    if missing:
        raise ContractError(f"{graph} has no input {missing[0]} ({len(missing)} of {len(factors)} factors have none)")


def _write(ort: Any, path: Path, factors: dict[str, Any]) -> None:
    form = ort.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in factors.items()})
    form.export_adapter(str(path))
