"""LoRA adapters in ONNX Runtime's format: several in one session, each with the logits of peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, UnsupportedError
from edgetune.export import onnx, onnx_adapter
from edgetune.export.decoder_run import graph_logits, open_graph
from edgetune.export.lora_pairs import peft_model
from edgetune.export.onnx import GRAPH
from edgetune.export.onnx_adapter import FILE, planned_identity, run
from edgetune.export.parity import torch_logits
from edgetune.recipe_export import OnnxExport
from tests.export.test_gguf_adapter import make_adapter

ort = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def graph(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = OnnxExport(precision="fp32", builder="own", adapters=True)
    return onnx.run(config, tiny_model, tmp_path_factory.mktemp("graph") / "out")


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["v_proj"], "r": 7}])
def test_an_adapter_fits_its_graph(
    tiny_model: Artifact, graph: Artifact, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter", **settings)
    made = run(adapter, tiny_model, graph, tmp_path / "out")
    assert made.manifest.kind == "onnx-adapter"
    assert made.manifest.notes["parity"]["max_abs"] < 1e-3
    assert made.identity == planned_identity(adapter.identity, graph.identity)
    assert sorted(made.manifest.files) == [FILE, "golden.json"]


def test_in_half_precision(tiny_model: Artifact, tmp_path: Path) -> None:
    half = onnx.run(OnnxExport(precision="fp16", builder="own", adapters=True), tiny_model, tmp_path / "graph")
    made = run(make_adapter(tiny_model, tmp_path / "adapter"), tiny_model, half, tmp_path / "out")
    assert made.manifest.notes["parity"]["tolerance"] == {"mean_kl": 1e-3}


def test_one_session_holds_several(tiny_model: Artifact, graph: Artifact, tmp_path: Path) -> None:
    """Two adapters of different rank in turn, and none between: the base as it was."""
    row = Golden.read(tiny_model.path).conversations[0].ids
    ids = np.array([row], np.int64)
    session, wanted, active, alive = open_graph(graph.path / GRAPH), [], [], []
    for number, settings in enumerate(({"r": 4}, {"r": 9, "target_modules": ["q_proj", "o_proj"]})):
        adapter = make_adapter(tiny_model, tmp_path / f"adapter{number}", **settings)
        made = run(adapter, tiny_model, graph, tmp_path / f"out{number}")
        wanted.append(torch_logits(peft_model(tiny_model.path, adapter.path), row))
        loaded = ort.LoraAdapter()
        loaded.Load(str(made.path / FILE))
        options = ort.RunOptions()
        options.add_active_adapter(loaded)
        active.append(options)
        alive.append(loaded)  # RunOptions does not hold it
    plain = graph_logits(session, ids, np.ones_like(ids))[0]
    for number in (0, 1, 0):
        found = graph_logits(session, ids, np.ones_like(ids), options=active[number])[0]
        np.testing.assert_allclose(found, wanted[number], atol=1e-3)
        assert np.abs(found - wanted[1 - number]).max() > 0.1
        np.testing.assert_array_equal(graph_logits(session, ids, np.ones_like(ids))[0], plain)


def test_onnxruntime_genai_takes_both(tiny_model: Artifact, graph: Artifact, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    made = run(adapter, tiny_model, graph, tmp_path / "out")
    row = Golden.read(tiny_model.path).conversations[0].ids
    model = genai.Model(str(graph.path))
    adapters = genai.Adapters(model)
    adapters.load(str(made.path / FILE), "one")
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=256)
    generator = genai.Generator(model, params)
    generator.set_active_adapter(adapters, "one")
    generator.append_tokens(np.array([row], np.int32))
    found = np.asarray(generator.get_logits())[0, -1]
    np.testing.assert_allclose(found, torch_logits(peft_model(tiny_model.path, adapter.path), row)[-1], atol=1e-3)


def test_a_graph_without_room_or_of_another_model(tiny_model: Artifact, graph: Artifact, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_model, tmp_path / "adapter")
    plain = onnx.run(OnnxExport(precision="fp32", builder="own"), tiny_model, tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="no room for adapters; export the base with --builder own --adapters"):
        run(adapter, tiny_model, plain, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="made of another model than the adapter's base"):
        run(adapter, adapter, graph, tmp_path / "out")


@pytest.mark.parametrize("wrong", ["name", "scale"])
def test_what_does_not_fit_leaves_nothing(
    tiny_model: Artifact, graph: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    made = onnx_adapter._factors

    def factors(lora: Any, dtype: Any) -> dict[str, Any]:
        found = made(lora, dtype)
        return {f"{k}.x" if wrong == "name" else k: 1.1 * v for k, v in found.items()}

    monkeypatch.setattr(onnx_adapter, "_factors", factors)
    with pytest.raises(ContractError, match="has no input" if wrong == "name" else "logits of"):
        run(make_adapter(tiny_model, tmp_path / "adapter"), tiny_model, graph, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"precision": "fp32"}, "is for builder own"),
        ({"precision": "int8", "builder": "own"}, "for precision fp32 and"),
    ],
)
def test_where_adapters_have_no_room(tiny_model: Artifact, config: dict[str, Any], says: str) -> None:
    from edgetune.compress.checkpoint import read_config

    with pytest.raises(UnsupportedError, match=says):
        onnx.check(OnnxExport(adapters=True, **config), read_config(tiny_model.path), None)
