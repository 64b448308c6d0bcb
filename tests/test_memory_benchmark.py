"""benchmarks/memory.py on a tiny shape: models are made, runs are killed, and the figures are those of its samples."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from edgetune.compress.streamed import open_model
from edgetune.counts import Speeds

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("memory")
    monkeypatch.setattr(module, "SHAPES", {"3B": TINY, "0.3B": TINY})
    monkeypatch.setattr(module, "TOKENS", 16)
    return module


def test_a_random_model_is_made_and_its_blocks_predicted(memory: ModuleType, tmp_path: Path) -> None:
    made = memory.make("3B", 3, tmp_path / "model")
    assert sum(name.endswith(".safetensors") for name in made.manifest.files) == 4
    assert len(open_model(made).model.layers) == 3
    slow, fast = (memory.predicted(made.path, Speeds(speed, speed)) for speed in (0.01, 100))
    assert slow > 10 * fast > 0
    told = [{"block": block, "cpu_s": at} for block, at in ((0, 1.0), (1, 9.0), (2, 12.0), (3, 15.5), (-1, 20.0))]
    assert memory.per_block(told, "cpu_s") == 3.25  # without the first one


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [None, 1])
def test_runs_are_killed_and_resumed(memory: ModuleType, blocks: int | None, tmp_path: Path) -> None:
    memory.benchmark(tmp_path, quick=True, layers=2, blocks=blocks, seed=0, out=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["totals"]["block_cpu_s"] > 0
    runs = ("whole", "killed", "resumed", "rounded")  # those of the shape that is promised
    peaks = [line["peak_mib"] for name in runs for line in found["samples"].get(name, [])]
    assert found["totals"]["peak_mib"] == max(peaks) > 100
    if blocks is None:
        assert found["totals"]["different_bytes"] == 0
        assert found["samples"]["killed"][-1]["block"] < 2
        assert found["samples"]["resumed"][-1]["block"] == -1
