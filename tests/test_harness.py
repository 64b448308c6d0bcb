"""The parts of benchmarks/harness.py that need no peer to be compiled."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgetune.artifact import Artifact
from edgetune.runtime.worker import Job, Worker

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")

from tests.export.test_onnx import exported

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("harness")


def test_a_gap_is_the_worse_of_prefill_and_decode_by_ratios_within_a_round(harness: ModuleType) -> None:
    ours = harness.Side("a", None, prefill=[100.0, 50.0, 104.0], decode=[10.0, 5.0, 9.0])
    theirs = harness.Side("b", None, prefill=[100.0, 50.0, 100.0], decode=[10.0, 4.0, 10.0])
    assert harness.gap(ours, theirs) == pytest.approx(0.0)
    theirs.decode = [11.0, 5.5, 10.0]
    assert harness.gap(ours, theirs) == pytest.approx(1 / 11)


def test_both_sides_are_timed_and_our_loop_is_small(
    harness: ModuleType, tiny_model: Artifact, tiny_gguf: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> None:
    ids = [3 + n % 300 for n in range(harness.N_PROMPT)]
    overhead = harness.loop_overhead(tiny_gguf.path / "model.gguf", ids, 1, 2)
    assert all(0 < loop < whole for loop, whole in zip(overhead["loop_ms"], overhead["whole_ms"], strict=True))
    with Worker(Job.of("x", tiny_gguf, n_threads=1)) as worker:
        worker.load(n_ctx=harness.N_PROMPT + harness.N_NEW + 1, timeout_s=60)
        assert min(harness.ours(worker, ids)()) > 10
    folder = exported("fp32", tiny_model, tmp_path_factory).path
    peer = subprocess.Popen(
        [sys.executable, BENCHMARKS / "genai_loop.py", folder, "1", str(harness.N_PROMPT + harness.N_NEW + 2)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert min(harness.genai_loop(peer, ids)()) > 10
    finally:
        peer.kill()
        peer.communicate()
