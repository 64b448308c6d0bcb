"""Latency: same work for all, alternating, stamped per token; a failure is a row."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.errors import UsageError
from edgetune.recipe import Bench
from edgetune.runtime import latency
from edgetune.runtime.child import timed
from edgetune.runtime.evidence import Failure, Generation, Latency, LatencyCase
from edgetune.runtime.latency import case_interval, make_prompts, measure
from edgetune.runtime.worker import Job, Worker
from tests.fakes import fake_job

pytestmark = pytest.mark.usefixtures("fakes_in_child")
BENCH = Bench(prompt_tokens=[4, 9], new_tokens=5, threads=1, repeats=3, runs=1, warmup=1, case_timeout_s=30)
PROMPTS = make_prompts(range(3, 30), [4, 9])


def test_candidates_are_measured_side_by_side_and_failures_are_rows() -> None:
    jobs = [
        fake_job("slow", prefill_s=0.03, decode_s=0.01),
        fake_job("crashes", fail="crash", at="decode", after=30),
        fake_job("does not load", fail="raise", at="load"),
        fake_job("nan", fail="nan", at="prefill", after=2),
        fake_job("fast", prefill_s=0.005, decode_s=0.001),
    ]
    rounds: list[tuple[int, int, str]] = []
    found = measure(jobs, BENCH, PROMPTS, progress=lambda *p: rounds.append(p))
    slow, *failed, fast = found
    assert [(f.subject, f.stage) for f in failed if isinstance(f, Failure)] == [
        ("crashes", "latency"), ("does not load", "latency"), ("nan", "latency")
    ]  # fmt: skip
    assert [f.reason for f in failed if isinstance(f, Failure)] == [
        "fake died of SIGSEGV while generating",
        "fake failed while loading: ValueError: bad weights",
        "fake gave logits that are not finite after 0 new tokens",
    ]
    n = 1 + BENCH.warmup + latency.EXTRA_WARMUPS + BENCH.repeats
    assert rounds[:2] == [(0, n, "loading"), (1, n, "warm-up")]
    assert [done for done, _, label in rounds if label == "warm-up"] == [*range(1, n - BENCH.repeats + 1)]
    assert rounds[-3:] == [(n - 2, n, "rounds"), (n - 1, n, "rounds"), (n, n, "rounds")]
    assert isinstance(slow, Latency)
    assert isinstance(fast, Latency)
    assert slow.workload == fast.workload
    assert slow.load == fast.load
    assert slow.peak_rss_bytes > 5e6
    assert slow.load_ms > 0
    for result in (slow, fast):
        assert [case.prompt_tokens for case in result.cases] == [4, 9]
        for case in result.cases:
            assert sum(not g.warmup for g in case.generations) == 3
            assert all(g.warmup for g in case.generations[:-3])
            assert all(len(g.itl_ms) == case.new_tokens - 1 == 4 for g in case.generations)
            assert case.steady is not None
        first = result.cases[0].generations[0]
        assert result.first_run_ms == first.ttft_ms
        assert first.warmup
    case = slow.cases[0]
    assert 30 <= case_interval(case, "ttft_ms", 50).value < 200
    assert 10 <= case_interval(case, "itl_ms", 50).value < 100
    assert case_interval(case, "tpot_ms", 50).value >= 10
    with pytest.raises(UsageError, match="unknown figure 'speed'"):
        case_interval(case, "speed", 50)
    assert case_interval(fast.cases[0], "itl_ms", 50).value < case_interval(case, "itl_ms", 50).value


class Scripted:
    """Takes the place of Worker: tells what was asked, and gives stamps that are told to it."""

    asked: list[tuple[str, int, tuple[int, ...], tuple[int, ...]]]
    tokens_ms: Iterator[float]

    def __init__(self, job: Job) -> None:
        self.job = job

    def __enter__(self) -> Scripted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def load(self, **_: object) -> dict[str, object]:
        return {"version": "1", "load_ms": 1.0, "n_vocab": 9}

    def call(self, verb: str, *, ids: list[int] = [], continuation: list[int] = [], **_: object) -> dict[str, object]:  # noqa: B006
        if verb == "memory":
            return {"peak_rss_bytes": 7}
        self.asked.append((self.job.name, len(ids), tuple(ids), tuple(continuation)))
        step = next(self.tokens_ms) / 1e3
        return {"stamps": [10.0 + step * n for n in range(len(continuation) + 2)]}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    Scripted.asked = []
    Scripted.tokens_ms = iter([5.0] * 1000)
    monkeypatch.setattr(latency, "Worker", Scripted)
    return Scripted


def test_every_candidate_does_the_same_work_in_an_order_drawn_each_round(scripted: type[Scripted]) -> None:
    bench = Bench(prompt_tokens=[4, 9], new_tokens=5, repeats=12, runs=1, warmup=2)
    measure([fake_job("a"), fake_job("b"), fake_job("c")], bench, PROMPTS, seed=3)
    measured = scripted.asked[-12 * 6 :]
    rounds = [[turn[:2] for turn in measured[n : n + 6]] for n in range(0, 72, 6)]
    assert all(sorted(turns) == sorted((name, n) for name in "abc" for n in (4, 9)) for turns in rounds)
    assert len({tuple(turns) for turns in rounds}) > 6
    assert {turn[2:] for turn in measured} == {(tuple(PROMPTS[n]), tuple(PROMPTS[n][:4])) for n in (4, 9)}
    again = list(scripted.asked)
    scripted.asked.clear()
    measure([fake_job("a"), fake_job("b"), fake_job("c")], bench, PROMPTS, seed=3)
    assert scripted.asked == again  # the seed gives the order


def test_warming_up_goes_on_until_steady_and_no_longer_than_its_bound(scripted: type[Scripted]) -> None:
    bench = Bench(prompt_tokens=[4], new_tokens=5, repeats=2, runs=1, warmup=2)
    prompts = {4: PROMPTS[4]}
    scripted.tokens_ms = iter([9.0, 8.0, 7.0, 6.0, 5.0, 5.1, 5.0, 5.0])
    (found,) = measure([fake_job()], bench, prompts)
    assert isinstance(found, Latency)
    (case,) = found.cases
    assert [round(g.ttft_ms) for g in case.generations if g.warmup] == [9, 8, 7, 6, 5, 5]
    assert case.steady is True
    assert found.first_run_ms == pytest.approx(9)
    assert case_interval(case, "itl_ms", 95).value == pytest.approx(5)
    scripted.tokens_ms = iter(1.5**n for n in range(100))
    (found,) = measure([fake_job()], bench, prompts)
    assert isinstance(found, Latency)
    assert found.cases[0].steady is False
    assert sum(g.warmup for g in found.cases[0].generations) == 1 + 2 + latency.EXTRA_WARMUPS


def test_stamps_are_taken_around_each_token() -> None:
    class Slow:
        name = "slow"

        def prefill(self, ids: list[int]) -> np.ndarray:
            time.sleep(0.02 * len(ids))
            return np.zeros(4, np.float32)

        def decode(self, token: int) -> np.ndarray:
            time.sleep(0.01 * token)
            return np.zeros(4, np.float32)

    stamps = timed(Slow(), [1, 1, 1], [1, 4, 2])  # type: ignore[arg-type]
    steps = np.diff(stamps)
    assert len(steps) == 4
    assert (steps >= [0.06, 0.01, 0.04, 0.02]).all()
    if os.getloadavg()[0] < 1:
        assert (steps < [0.08, 0.02, 0.05, 0.03]).all()


def test_wrong_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match="prompt of 4 tokens has 3 ids"):
        measure([], BENCH, {4: [1, 2, 3]})
    with pytest.raises(UsageError, match="no prompt"):
        measure([], BENCH, {})
    with pytest.raises(UsageError, match="there are none"):
        make_prompts([], [4])
    assert make_prompts([1, 2, 3], [2, 5]) == {2: [1, 2], 5: [1, 2, 3, 1, 2]}


def test_percentiles_leave_warm_ups_out() -> None:
    generations = [Generation(ttft_ms=900, itl_ms=[900, 900], warmup=True)]
    generations += [Generation(ttft_ms=10 + n, itl_ms=[1, 3], warmup=False) for n in range(5)]
    case = LatencyCase(prompt_tokens=4, new_tokens=3, generations=generations)
    assert case_interval(case, "ttft_ms", 50) == (12, 10, 14)
    assert case_interval(case, "itl_ms", 50).value == 2
    assert case_interval(case, "tpot_ms", 95) == (2, 2, math.inf)


def test_a_real_model_is_measured(tiny_model: Artifact) -> None:
    bench = Bench(prompt_tokens=[8], new_tokens=4, repeats=2, runs=1, warmup=1)
    (found,) = measure([Job.of("tiny", tiny_model, n_threads=1)], bench, make_prompts(range(3, 50), [8]))
    assert isinstance(found, Latency)
    assert found.subject.size_bytes == tiny_model.size_bytes
    assert found.subject.engine_version.startswith("torch ")
    assert found.peak_rss_bytes > 100e6  # torch itself


def test_an_idle_child_uses_no_time() -> None:
    """Children stay alive while others are timed; one that spins would disturb them."""
    import psutil

    with Worker(fake_job()) as worker:
        worker.load(n_ctx=64, timeout_s=30)
        process = psutil.Process(worker.pid)
        before = sum(process.cpu_times()[:2])
        time.sleep(0.5)
        assert sum(process.cpu_times()[:2]) - before < 0.05
