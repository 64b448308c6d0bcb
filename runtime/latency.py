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
from functools import partial
from itertools import chain, cycle, islice, pairwise

import numpy as np

from edgetune.artifact import json_digest
from edgetune.errors import EdgetuneError, UsageError
from edgetune.recipe import Bench
from edgetune.runtime import probes, sensors
from edgetune.runtime.evidence import Failure, Generation, Latency, LatencyCase, Load
from edgetune.runtime.machine import LoadMeter
from edgetune.runtime.percentiles import percentile_bounds
from edgetune.runtime.statistics import Interval, repeatability
from edgetune.runtime.worker import Job, Worker

STEADY = 0.05  # the last two warm-ups' medians differ by less
EXTRA_WARMUPS = 6  # at most so many more, to get there
PAUSE_S = 0.05  # lets the threads of the last engine fall asleep before the next one is timed
Progress = Callable[[int, int, str], None]  # rounds done and rounds in all, warm-ups with them; what is done now
Case = tuple[int, int]  # prompt tokens, new tokens


@dataclass
class _Candidate:
    """A job, its child, and what was seen of it in one run."""

    job: Job
    worker: Worker
    version: str = ""
    load_ms: float = 0.0
    n_vocab: int = 0
    peak_rss_bytes: int = 0
    seen: dict[Case, list[Generation]] = field(default_factory=dict)
    steady: dict[Case, bool] = field(default_factory=dict)
    load: Load | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class _Work:
    """The ids of each case: what is read, and what is fed while decoding."""

    prompts: Mapping[int, Sequence[int]]
    fed: Mapping[int, Sequence[int]]

    @classmethod
    def of(cls, prompts: Mapping[int, Sequence[int]], continuation: Sequence[int] | None, n_fed: int) -> _Work:
        return cls(prompts, {n: list(islice(cycle(continuation or ids), n_fed)) for n, ids in prompts.items()})

    def folded(self, n_vocab: int) -> _Work:
        """The same work with ids that a vocabulary of `n_vocab` has."""
        return _Work(
            {n: [token % n_vocab for token in ids] for n, ids in self.prompts.items()},
            {n: [token % n_vocab for token in ids] for n, ids in self.fed.items()},
        )

    def digest(self, cases: Sequence[Case]) -> str:
        return json_digest([[list(self.prompts[n]), list(self.fed[n][: new - 1])] for n, new in cases])


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
    fold: bool = False,
    progress: Progress | None = None,
) -> list[Latency | Failure]:
    """Measure the latency of all jobs together, one result each, in their order.

    `prompts` holds the ids for each prompt length, `continuation` the ids that are fed while decoding (the prompt's
    own again where absent). The first token's time holds the prefill and the choice of a token, each further one's a
    decode and a choice. Warm-ups are kept and named. A job that fails at any time gives a Failure; the others go on.
    `fold` takes ids that the smallest vocabulary lacks modulo its size, so that models of several families can be
    given the same work. With `bench.runs` all is done so many times, each in fresh processes; what else `bench` asks
    for is measured afterwards (`probes`).
    """
    for length, ids in prompts.items():
        if length != len(ids):
            raise UsageError(f"the prompt of {length} tokens has {len(ids)} ids; give exactly {length}")
    if not prompts:
        raise UsageError("no prompt was given to measure with; give at least one length in bench.prompt_tokens")
    cases = [(n, new) for n in prompts for new in bench.output_lengths]
    work = _Work.of(prompts, continuation, max(bench.output_lengths) - 1)
    rng = np.random.default_rng(seed)
    n_runs, runs, before = bench.runs, [], sensors.cpu_state()
    n_rounds = 1 + bench.warmup + EXTRA_WARMUPS + bench.repeats  # of one run, at most

    def told(run: int, n: int, label: str) -> None:
        if progress is not None:
            progress(run * n_rounds + n, n_runs * n_rounds, label)

    for run in range(n_runs):
        found, work = _one_run(jobs, bench, cases, work, run, rng, fold, partial(told, run))
        runs.append(found)
    timed = [_joined(list(parts), cases, work.digest(cases)) for parts in zip(*runs, strict=True)]
    if not probes.is_asked(bench):
        return timed
    return probes.probe(jobs, timed, bench, work.prompts, before=before, seed=seed)


def _one_run(
    jobs: Sequence[Job],
    bench: Bench,
    cases: Sequence[Case],
    work: _Work,
    run: int,
    rng: np.random.Generator,
    fold: bool,
    told: Callable[[int, str], None],
) -> tuple[list[_Candidate], _Work]:
    """Load every job, warm up and measure; the work is given back as it was done."""
    timeout_s = bench.case_timeout_s
    with ExitStack() as stack:
        told(0, "loading")
        candidates = [_Candidate(job, stack.enter_context(Worker(job))) for job in jobs]
        n_ctx = max(n + new for n, new in cases)
        for candidate in candidates:
            _guarded(candidate, lambda c: _load(c, n_ctx, timeout_s))
        sizes = [candidate.n_vocab for candidate in candidates if candidate.failure is None]
        if fold and sizes:
            work = work.folded(min(sizes))
        turns = [(candidate, case) for candidate in candidates for case in cases]

        def generate(candidate: _Candidate, case: Case, *, warmup: bool) -> None:
            n, new = case
            fed = work.fed[n][: new - 1]
            _guarded(candidate, lambda c: _generate(c, case, work.prompts[n], fed, warmup, run, timeout_s))

        def one_round(turns: Sequence[tuple[_Candidate, Case]], *, warmup: bool) -> None:
            for place in rng.permutation(len(turns)):
                generate(*turns[place], warmup=warmup)

        for candidate in candidates:  # the very first generation, on the shortest prompt
            generate(candidate, min(cases), warmup=True)
        told(1, "warm-up")
        for done in range(bench.warmup + EXTRA_WARMUPS):
            unsteady = [(c, case) for c, case in turns if done < bench.warmup or not _is_steady(c.seen.get(case, []))]
            one_round(unsteady, warmup=True)
            told(2 + done, "warm-up")
        for candidate, case in turns:
            candidate.steady[case] = _is_steady(candidate.seen.get(case, []))
        meter = LoadMeter()
        for done in range(bench.repeats):
            one_round(turns, warmup=False)
            told(2 + bench.warmup + EXTRA_WARMUPS + done, "rounds")
        load = meter.stop()
        for candidate in candidates:
            candidate.load = load
            _guarded(candidate, lambda c: _weigh(c, timeout_s))
    return candidates, work


def _joined(parts: Sequence[_Candidate], cases: Sequence[Case], workload: str) -> Latency | Failure:
    """Make one result of a job's runs: the first load and first generation, the highest memory, all samples."""
    failure = next((part.failure for part in parts if part.failure is not None), None)
    if failure is not None:
        return failure
    first = parts[0]
    loads = [part.load for part in parts if part.load is not None]
    return Latency(
        subject=first.job.subject(first.version), workload=workload, load_ms=first.load_ms,
        first_run_ms=first.seen[min(cases)][0].ttft_ms,
        cases=[
            LatencyCase(
                prompt_tokens=n, new_tokens=new, generations=[g for part in parts for g in part.seen[n, new]],
                steady=all(part.steady[n, new] for part in parts),
            )
            for n, new in cases
        ],
        peak_rss_bytes=max(part.peak_rss_bytes for part in parts),
        load=max(loads, key=lambda load: load.others_during),
    )  # fmt: skip


def _guarded(candidate: _Candidate, do: Callable[[_Candidate], None]) -> None:
    """Do something with a candidate that has not failed; where it fails, its child ends and the reason is kept."""
    if candidate.failure is None:
        try:
            do(candidate)
        except EdgetuneError as error:
            job = candidate.job
            candidate.failure = Failure(
                subject=job.name, stage="latency", reason=str(error), artifact_digest=job.artifact_digest
            )
            candidate.worker.kill()


def _load(candidate: _Candidate, n_ctx: int, timeout_s: float) -> None:
    loaded = candidate.worker.load(n_ctx=n_ctx, timeout_s=timeout_s)
    candidate.version, candidate.load_ms, candidate.n_vocab = (loaded[key] for key in ("version", "load_ms", "n_vocab"))


def _generate(
    candidate: _Candidate,
    case: Case,
    ids: Sequence[int],
    fed: Sequence[int],
    warmup: bool,
    run: int,
    timeout_s: float,
) -> None:
    time.sleep(PAUSE_S)
    reply = candidate.worker.call("generate_timed", timeout_s=timeout_s, ids=list(ids), continuation=list(fed))
    start, *stamps = reply["stamps"]
    generation = Generation(
        ttft_ms=(stamps[0] - start) * 1e3,
        itl_ms=[(after - before) * 1e3 for before, after in pairwise(stamps)],
        warmup=warmup,
        run=run,
    )
    candidate.seen.setdefault(case, []).append(generation)


def _weigh(candidate: _Candidate, timeout_s: float) -> None:
    candidate.peak_rss_bytes = candidate.worker.call("memory", timeout_s=timeout_s)["peak_rss_bytes"]


def _is_steady(generations: Sequence[Generation]) -> bool:
    """Tell whether the last two generations agree: the first token's time, and the median of the further ones."""
    if len(generations) < 2:
        return False
    before, last = generations[-2:]
    pairs = [(statistics.median(before.itl_ms), statistics.median(last.itl_ms)), (before.ttft_ms, last.ttft_ms)]
    return all(abs(a - b) <= STEADY * max(a, b) for a, b in pairs)


def case_interval(case: LatencyCase, figure: str, q: float, *, confidence: float = 0.95) -> Interval:
    """Give a percentile of a figure over the measured generations of a case, with one-sided bounds at `confidence`."""
    return percentile_bounds(waits(case, figure), q, confidence=confidence)


def waits(case: LatencyCase, figure: str) -> list[list[float]]:
    """Give `ttft_ms`, `itl_ms` or `tpot_ms` of each measured generation of a case.

    tpot_ms = (t_last - t_first) / (n - 1) of one generation, the mean of its itl_ms.
    """
    measured = [g for g in case.generations if not g.warmup]
    if figure == "itl_ms":
        return [g.itl_ms for g in measured]
    if figure == "tpot_ms":
        return [[sum(g.itl_ms) / len(g.itl_ms)] for g in measured]
    if figure == "ttft_ms":
        return [[g.ttft_ms] for g in measured]
    raise UsageError(f"unknown figure {figure!r}; known: ttft_ms, itl_ms, tpot_ms")


def noise_floor(case: LatencyCase, figure: str) -> float | None:
    """Give the share by which the medians of two runs of this case may differ by chance; None without repeated runs."""
    runs = sorted({g.run for g in case.generations if not g.warmup})
    if len(runs) < 2:
        return None
    parts = [case.model_copy(update={"generations": [g for g in case.generations if g.run == run]}) for run in runs]
    return repeatability([statistics.median(chain(*waits(part, figure))) for part in parts])
