"""benchmarks/scoring.py on a tiny model: both sides do the work, and the ratios are those of its samples."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

from edgetune.artifact import Artifact

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")

from tests.export.test_onnx import exported

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("scoring")
    for name, value in (("N_TOKENS", 30), ("N_TARGET", 7), ("N_SHARED", 12), ("SLICE", 4), ("N_CTX", 31)):
        monkeypatch.setattr(module, name, value)
    return module


def test_rows_have_one_length_and_share_what_is_asked(scoring: ModuleType) -> None:
    for shared in (0, 12):
        rows = scoring.make_rows(list(range(1000)), 8, shared)
        assert {len(row.ids) for row in rows} == {30}
        assert {row.start for row in rows} == {23}
        assert all(row.ids[:shared] == tuple(range(shared)) for row in rows)
        own = [token for row in rows for token in row.ids[shared:]]
        assert own == list(range(shared, shared + len(own)))


def test_both_sides_of_every_engine_are_timed(
    scoring: ModuleType, tiny_model: Artifact, tiny_gguf: Artifact, tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    folder = exported("fp32", tiny_model, tmp_path_factory).path
    given = argparse.Namespace(quick=False, rows=12, threads=1, seed=0, engine=None, out=tmp_path / "out.json")
    scoring.benchmark(tiny_gguf.path / "model.gguf", folder, given)
    found = json.loads(given.out.read_text())
    assert found["totals"].keys() == {f"{e}_{r}" for e in scoring.ENGINES for r in ("ratio", "shared_ratio")}
    for engine, sets in found["samples"].items():
        for name, key in (("own", "ratio"), ("shared", "shared_ratio")):
            ours, theirs = (sets[name][side] for side in ("ours", "bare"))
            assert len(ours) == len(theirs) == 3
            assert all(one["seconds"] > 0 for one in [*ours, *theirs])
            ratio = statistics.median(a["seconds"] / b["seconds"] for a, b in zip(ours, theirs, strict=True))
            assert found["totals"][f"{engine}_{key}"] == ratio
