"""What a path is, without a manifest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgetune.artifact import Artifact, Store, draft
from edgetune.errors import EdgetuneError, SourceError, UnsupportedError, UsageError
from edgetune.found import find, jobs


def bare(artifact: Artifact, out: Path) -> Path:
    """Copy an artifact without what makes it one."""
    shutil.copytree(artifact.path, out)
    for name in ("manifest.json", "golden.json"):
        (out / name).unlink(missing_ok=True)
    return out


def config(folder: Path, **quantization: object) -> Path:
    folder.mkdir()
    found = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (folder / "config.json").write_text(json.dumps(found))
    return folder


def test_each_kind_is_told_by_what_it_holds(tiny_model: Artifact, tmp_path: Path) -> None:
    whole = find(tiny_model.path)
    assert (whole.kind, whole.digest, whole.size_bytes) == ("model", tiny_model.digest, tiny_model.size_bytes)
    folder = bare(tiny_model, tmp_path / "bare")
    found = find(folder)
    assert found.kind == "model"
    assert found.size_bytes == sum(file.stat().st_size for file in folder.iterdir())
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert find(folder).digest != found.digest
    assert find(config(tmp_path / "gptq", quant_method="gptq", bits=4)).kind == "gptq"
    old = config(tmp_path / "old")
    (old / "quantize_config.json").write_text("{}")
    assert find(old).kind == "gptq"
    graph = tmp_path / "onnx"
    graph.mkdir()
    (graph / "genai_config.json").write_text("{}")
    assert find(graph).engines == ("onnxruntime", "onnxruntime-genai")


def test_an_adapter_runs_on_its_base_where_it_was_made(tiny_model: Artifact, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    shutil.copytree(tiny_model.path, store.place(tiny_model.identity))
    made = tmp_path / "store" / "adapter"
    with draft(made, kind="adapter", stage="adapt/1", config={"method": "qlora"}, parents=[tiny_model]) as pending:
        (pending.path / "adapter_config.json").write_text("{}")
    (job,) = jobs([made], [], n_threads=1)
    assert (job.kind, job.engine, job.path) == ("adapter", "torch", store.place(tiny_model.identity))
    assert job.settings == {"adapter": str(made), "quantize_base": True}
    assert (job.artifact_digest, job.size_bytes) == (pending.artifact.digest, tiny_model.size_bytes + 2)
    with pytest.raises(UsageError, match=r"its base is not in .*; give an adapter where it was made"):
        find(Path(shutil.copytree(made, tmp_path / "alone")))


def test_what_no_engine_runs_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes(b"")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("[")
    awq = config(tmp_path / "awq", quant_method="awq")
    cases: list[tuple[Path, type[EdgetuneError], str]] = [
        (tmp_path / "none", UsageError, "is not there"),
        (tmp_path / "notes.txt", SourceError, "damaged GGUF file"),
        (tmp_path / "empty", UsageError, "holds no model"),
        (tmp_path / "graph", UnsupportedError, r"without genai_config\.json"),
        (tmp_path / "broken", UsageError, r"config\.json cannot be read"),
        (awq, UnsupportedError, "quantized as 'awq'"),
    ]
    for path, kind, said in cases:
        with pytest.raises(kind, match=said):
            find(path)


def test_an_asked_engine_runs_what_it_can_and_nothing_twice(tmp_path: Path) -> None:
    graph = tmp_path / "onnx"
    graph.mkdir()
    (graph / "genai_config.json").write_text("{}")
    model = config(tmp_path / "model")
    made = jobs([graph, model], ["onnxruntime-genai"], n_threads=1)
    assert [(job.engine, job.name) for job in made] == [("onnxruntime-genai", "onnx"), ("torch", "model")]
    both = jobs([graph], ["onnxruntime", "onnxruntime-genai"], n_threads=1)
    assert [job.name for job in both] == ["onnx (onnxruntime)", "onnx (onnxruntime-genai)"]
    with pytest.raises(UsageError, match=r"'llama\.cpp' runs none of"):
        jobs([graph], ["llama.cpp"], n_threads=1)
    again = config(tmp_path / "onnx" / "model")
    assert [job.name for job in jobs([model, again], [], n_threads=1)] == [str(model), str(again)]
    with pytest.raises(UsageError, match="given twice"):
        jobs([graph, graph], [], n_threads=1)
