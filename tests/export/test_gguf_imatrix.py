"""An importance matrix in the file that llama.cpp's tools read, and the flags of `export` that ask for one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgetune import single_export
from edgetune.artifact import Artifact
from edgetune.errors import UnsupportedError
from edgetune.export.gguf_imatrix import write_imatrix
from edgetune.export.gguf_write import read_config
from tests.conftest import Call, make_tiny_model

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [{"instruction": "JSON.", "input": f"set light to {n}", "output": f'{{"level":{n}}}'} for n in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_it_says_what_llama_imatrix_says(tiny_model: Artifact, tmp_path: Path) -> None:
    """Sums and counts under the names of its GGUF form, from which in_sum2 / counts gives the means again."""
    means = {"model.layers.0.self_attn.q_proj": np.arange(64.0), "model.layers.1.mlp.down_proj": np.ones(192)}
    write_imatrix(tmp_path / "i.gguf", means, read_config(tiny_model.path), (4, 8), "rows.jsonl")
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["rows.jsonl"]
    assert (reader.fields["imatrix.chunk_count"].contents(), reader.fields["imatrix.chunk_size"].contents()) == (4, 8)
    found = {tensor.name: np.asarray(tensor.data) for tensor in reader.tensors}
    assert sorted(found) == sorted(
        f"{name}.weight.{kind}" for name in ("blk.0.attn_q", "blk.1.ffn_down") for kind in ("in_sum2", "counts")
    )
    sums, counts = found["blk.0.attn_q.weight.in_sum2"], found["blk.0.attn_q.weight.counts"]
    assert (sums.shape, counts.shape) == ((1, 64), (1, 1))
    np.testing.assert_array_equal((sums / counts)[0], np.arange(64.0))
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def test_a_layer_without_a_place_leaves_no_file(tiny_model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        write_imatrix(tmp_path / "i.gguf", {"model.vision.0": np.ones(4)}, read_config(tiny_model.path), (1, 1), "x")
    assert list(tmp_path.iterdir()) == []


def test_the_verb_weighs_by_rows_and_writes_the_matrix(
    call: Call, tiny_model: Artifact, rows: Path, tmp_path: Path
) -> None:
    matrix, out = tmp_path / "i.gguf", tmp_path / "out"
    code, _, err = call(
        "export", str(tiny_model.path), "--out", str(out), "--type", "Q4_0", "--rows", str(rows), "--imatrix",
        str(matrix), "--n-samples", "4",
    )  # fmt: skip
    assert code == 0, err
    assert Artifact.open(out).manifest.notes["importance"].startswith("14 of ")
    assert len(gguf.GGUFReader(matrix).tensors) == 2 * 14
    plain = tmp_path / "plain"
    code, said, _ = call("export", str(tiny_model.path), "--out", str(plain), "--type", "Q4_0")
    assert code == 0
    assert f"run it: llama-server -m {plain}/model.gguf --jinja" in said
    assert (plain / "model.gguf").read_bytes() != (out / "model.gguf").read_bytes()


def test_the_verb_chooses_codes_by_gptq(call: Call, tiny_model: Artifact, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, _, err = call(
        "export", str(tiny_model.path), "--out", str(out), "--type", "Q4_0", "--rows", str(rows), "--gptq",
        "--n-samples", "4",
    )  # fmt: skip
    assert code == 0, err
    assert Artifact.open(out).manifest.config["gptq"] is True


def test_what_cannot_be_written_is_refused_before_it_is_calibrated(
    call: Call, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("calibrated")

    monkeypatch.setattr(single_export, "calibration_rows", never)
    narrow = make_tiny_model(tmp_path / "narrow", hidden=48)
    flags = ("--type", "Q4_0", "--gptq", "--rows", str(rows))
    code, _, err = call("export", str(narrow.path), "--out", str(tmp_path / "out"), *flags)
    assert (code, err.count("\n")) == (2, 1), err
    assert "gptq: true needs rows in multiples of 32, hidden_size gives rows of 48" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--type", "Q8_0", "--rows", "{rows}"), "rounded without an importance matrix"),
        (("--format", "onnx", "--rows", "{rows}"), "are for gguf"),
        (("--adapters",), "--adapters is for onnx"),
        (("--graph", "{rows}"), "--graph is not read by gguf"),
        (("--check", "{rows}"), "--check writes nothing"),
        (("--rows", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--imatrix", "{rows}"), "is there already"),
        (("--rows", "{rows}", "--n-samples", "0"), "n_samples"),
    ],
)
def test_flags_that_cannot_be_obeyed(
    call: Call, tiny_model: Artifact, rows: Path, tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    out = tmp_path / "out"
    code, _, err = call("export", str(tiny_model.path), "--out", str(out), *(f.format(rows=rows) for f in flags))
    assert (code, err.count("\n")) == (2, 1), err
    assert says in err
    assert not out.exists()
