"""The parts of benchmarks/checkpoints.py that need no environment of its own."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("checkpoints")


def test_logits_are_apart_by_their_largest_difference_and_kl(checkpoints: ModuleType) -> None:
    wanted = np.log(np.array([[[0.5, 0.25, 0.25]]], dtype=np.float32))
    found = np.log(np.array([[[0.25, 0.5, 0.25]]], dtype=np.float32))
    apart = checkpoints.apart(found, wanted)
    assert apart["max_abs"] == pytest.approx(np.log(2), rel=1e-2)
    assert apart["kl"] == pytest.approx(0.25 * np.log(2), rel=1e-2)
    assert checkpoints.apart(wanted + 3, wanted)["kl"] == 0  # a constant moves no distribution


def test_what_refused_counts_as_neither_same_nor_different(checkpoints: ModuleType) -> None:
    loaded = {"refused": None, "same": False, "max_abs": 2.0, "kl": 0.5, "moved": {"max_abs": 9.0}}
    found = checkpoints.totals([loaded, {"refused": "no"}])
    assert found == {"loaded": 1, "refused": 1, "different": 1, "worst_max_abs": 2.0, "worst_kl": 0.5, "least_moved": 9}
    assert checkpoints.totals([{"refused": "no"}])["loaded"] == 0
