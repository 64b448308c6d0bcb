"""How fast the shipped file is, in the engine that ships it.

One child process for each candidate, all alive at once; generations of all cases and candidates alternate in an order
that is drawn anew each round, so that drift of the machine hits all alike. Every engine reads the same ids and is fed
the same continuation. Each token is stamped; no figure is a difference of two measurements of different things.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle, islice, pairwise

import numpy as np

from edgetune.artifact import json_digest
from edgetune.errors import EdgetuneError, UsageError
from edgetune.recipe import Bench
from edgetune.runtime.evidence import Failure, Generation, Latency, LatencyCase
from edgetune.runtime.machine import LoadMeter
from edgetune.runtime.statistics import Interval, percentile_interval
from edgetune.runtime.worker import Job, Worker

STEADY = 0.05  # the last two warm-ups' medians differ by less
EXTRA_WARMUPS = 6  # at most so many more, to get there
PAUSE_S = 0.05  # lets the threads of the last engine fall asleep before the next one is timed
Progress = Callable[[int, int], None]  # measured rounds done, rounds in all


@dataclass
class _Candidate:
    """A job, its child, and what was seen of it."""

    job: Job
    worker: Worker
    version: str = ""
    load_ms: float = 0.0
    peak_rss_bytes: int = 0
    seen: dict[int, list[Generation]] = field(default_factory=dict)
    steady: dict[int, bool] = field(default_factory=dict)
    failure: Failure | None = None


def make_prompts(ids: Sequence[int], prompt_tokens: Sequence[int]) -> dict[int, list[int]]:
    """Cut prompts of the asked lengths from a stream of ordinary token ids, which is repeated where it is short."""
    if not ids:
        raise UsageError("prompts are cut from token ids, and there are none; give at least one")
    return {length: list(islice(cycle(ids), length)) for length in prompt_tokens}


def measure(
    jobs: Sequence[Job],
    bench: Bench,
    prompts: Mapping[int, Sequence[int]],
    *,
    continuation: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Latency | Failure]:
    """Measure the latency of all jobs together, one result each, in their order.

    `prompts` holds the ids for each prompt length, `continuation` the ids that are fed while decoding (the prompt's
    own again where absent). The first token's time holds the prefill and the choice of a token, each further one's a
    decode and a choice. Warm-ups are kept and named. A job that fails at any time gives a Failure; the others go on.
    """
    for length, ids in prompts.items():
        if length != len(ids):
            raise UsageError(f"the prompt of {length} tokens has {len(ids)} ids; give exactly {length}")
    if not prompts:
        raise UsageError("no prompt was given to measure with; give at least one length in bench.prompt_tokens")
    n_fed = bench.new_tokens - 1
    fed = {n: list(islice(cycle(continuation or ids), n_fed)) for n, ids in prompts.items()}
    workload = json_digest([[list(ids), fed[n]] for n, ids in prompts.items()])
    rng = np.random.default_rng(seed)
    with ExitStack() as stack:
        candidates = [_Candidate(job, stack.enter_context(Worker(job))) for job in jobs]
        for candidate in candidates:
            _guarded(candidate, lambda c: _load(c, max(prompts) + bench.new_tokens, bench.case_timeout_s))
        cases = [(candidate, n) for candidate in candidates for n in prompts]

        def one_round(turns: Sequence[tuple[_Candidate, int]], *, warmup: bool) -> None:
            for place in rng.permutation(len(turns)):
                candidate, n = turns[place]
                _guarded(candidate, lambda c: _generate(c, prompts[n], fed[n], warmup, bench.case_timeout_s))  # noqa: B023

        first = min(prompts)
        for candidate in candidates:  # the very first generation, on the shortest prompt
            _guarded(candidate, lambda c: _generate(c, prompts[first], fed[first], True, bench.case_timeout_s))
        for done in range(bench.warmup + EXTRA_WARMUPS):
            turns = [(c, n) for c, n in cases if done < bench.warmup or not _is_steady(c.seen.get(n, []))]
            one_round(turns, warmup=True)
        for candidate, n in cases:
            candidate.steady[n] = _is_steady(candidate.seen.get(n, []))
        meter = LoadMeter()
        for done in range(bench.repeats):
            one_round(cases, warmup=False)
            if progress is not None:
                progress(done + 1, bench.repeats)
        load = meter.stop()
        for candidate in candidates:
            _guarded(candidate, lambda c: _weigh(c, bench.case_timeout_s))
    return [
        c.failure
        or Latency(
            subject=c.job.subject(c.version), workload=workload, load_ms=c.load_ms,
            first_run_ms=c.seen[first][0].ttft_ms,
            cases=[
                LatencyCase(prompt_tokens=n, new_tokens=bench.new_tokens, generations=c.seen[n], steady=c.steady[n])
                for n in prompts
            ],
            peak_rss_bytes=c.peak_rss_bytes, load=load,
        )
        for c in candidates
    ]  # fmt: skip


def _guarded(candidate: _Candidate, do: Callable[[_Candidate], None]) -> None:
    """Do something with a candidate that has not failed; where it fails, its child ends and the reason is kept."""
    if candidate.failure is None:
        try:
            do(candidate)
        except EdgetuneError as error:
            candidate.failure = Failure(subject=candidate.job.name, stage="latency", reason=str(error))
            candidate.worker.kill()


def _load(candidate: _Candidate, n_ctx: int, timeout_s: float) -> None:
    loaded = candidate.worker.load(n_ctx=n_ctx, timeout_s=timeout_s)
    candidate.version, candidate.load_ms = loaded["version"], loaded["load_ms"]


def _generate(candidate: _Candidate, ids: Sequence[int], fed: Sequence[int], warmup: bool, timeout_s: float) -> None:
    time.sleep(PAUSE_S)
    reply = candidate.worker.call("generate_timed", timeout_s=timeout_s, ids=list(ids), continuation=list(fed))
    start, *stamps = reply["stamps"]
    generation = Generation(
        ttft_ms=(stamps[0] - start) * 1e3,
        itl_ms=[(after - before) * 1e3 for before, after in pairwise(stamps)],
        warmup=warmup,
    )
    candidate.seen.setdefault(len(ids), []).append(generation)


def _weigh(candidate: _Candidate, timeout_s: float) -> None:
    candidate.peak_rss_bytes = candidate.worker.call("memory", timeout_s=timeout_s)["peak_rss_bytes"]


def _is_steady(generations: Sequence[Generation]) -> bool:
    """Tell whether the last two generations agree: the first token's time, and the median of the further ones."""
    if len(generations) < 2:
        return False
    before, last = generations[-2:]
    pairs = [(statistics.median(before.itl_ms), statistics.median(last.itl_ms)), (before.ttft_ms, last.ttft_ms)]
    return all(abs(a - b) <= STEADY * max(a, b) for a, b in pairs)


def case_interval(case: LatencyCase, figure: str, q: float, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Give a percentile of `ttft_ms`, `itl_ms` or `tpot_ms` over the measured generations of a case.

    tpot_ms = (t_last - t_first) / (n - 1) of one generation, the mean of its itl_ms.
    """
    measured = [g for g in case.generations if not g.warmup]
    if figure == "itl_ms":
        groups = [g.itl_ms for g in measured]
    elif figure == "tpot_ms":
        groups = [[sum(g.itl_ms) / len(g.itl_ms)] for g in measured]
    elif figure == "ttft_ms":
        groups = [[g.ttft_ms] for g in measured]
    else:
        raise UsageError(f"unknown figure {figure!r}; known: ttft_ms, itl_ms, tpot_ms")
    return percentile_interval(groups, q, seed=seed, confidence=confidence)
