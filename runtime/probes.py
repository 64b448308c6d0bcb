"""What a recipe's `bench` keys ask for beside the timing itself. Each probe has fresh processes, and its own failure.

Sweeps interleave all candidates at each point, as the timing does. A probe that fails is a line of its candidate's
evidence; the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from edgetune.errors import EdgetuneError, UnsupportedError
from edgetune.recipe import Bench
from edgetune.runtime import roofline, sensors
from edgetune.runtime.evidence import (
    ColdStart,
    CpuState,
    Energy,
    Failure,
    Generation,
    Latency,
    MemoryPhases,
    Probes,
    Roofline,
    SweepPoint,
)
from edgetune.runtime.statistics import percentile_ratio
from edgetune.runtime.worker import Job, Worker

SWEEP_REPEATS = 3  # measured generations of a point, after one that warms up


@dataclass
class _Found:
    """What is collected of one candidate."""

    sweep: list[SweepPoint] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def is_asked(bench: Bench) -> bool:
    """Tell whether a recipe asks for any probe."""
    return bool(bench.probes or bench.sweep_threads or bench.sweep_rows)


def probe(
    jobs: Sequence[Job],
    timed: Sequence[Latency | Failure],
    bench: Bench,
    prompts: Mapping[int, Sequence[int]],
    *,
    before: CpuState | None,
    seed: int = 0,
) -> list[Latency | Failure]:
    """Run all probes that `bench` asks for and give the evidence with them; what failed while timing is left out."""
    good = [job for job, one in zip(jobs, timed, strict=True) if isinstance(one, Latency)]
    found = {job.name: _Found() for job in good}
    after = sensors.cpu_state()
    asked = set(bench.probes or ())
    n = min(prompts)
    ids, fed = list(prompts[n]), (list(prompts[n]) * bench.output_lengths[0])[: bench.output_lengths[0] - 1]
    work = _Work(ids, fed, len(ids) + len(fed) + 1, bench.case_timeout_s)
    rng = np.random.default_rng(seed)
    for threads in bench.sweep_threads or ():
        _sweep([replace(job, n_threads=threads) for job in good], [1], work, rng, found)
    if bench.sweep_rows:
        _sweep(good, bench.sweep_rows, work, rng, found)
    bandwidth = roofline.memory_bandwidth(bench.threads) if "roofline" in asked and good else 0.0
    for job, one in zip(jobs, timed, strict=True):
        if not isinstance(one, Latency):
            continue
        tests: dict[str, Callable[[], Any]] = {
            "cold_start": partial(_cold_start, job, work),
            "memory": partial(_memory, job, work),
            "energy": partial(_energy, job, work),
            "roofline": partial(_roofline, job, one, work, bandwidth),
        }
        for name, do in tests.items():
            if name not in asked:
                continue
            try:
                found[job.name].parts[name] = do()
            except EdgetuneError as error:
                found[job.name].failures[name] = str(error)
        if "frequency" in asked:
            found[job.name].parts |= {"cpu_before": before, "cpu_after": after}
    return [
        one.model_copy(update={"probes": Probes(sweep=f.sweep, failures=f.failures, **f.parts)})
        if isinstance(one, Latency) and (f := found[one.subject.name])
        else one
        for one in timed
    ]


@dataclass(frozen=True)
class _Work:
    """The shortest prompt, the ids fed after it, and the context that both need."""

    ids: list[int]
    fed: list[int]
    n_ctx: int
    timeout_s: float


def _sweep(
    jobs: Sequence[Job], n_rows: Sequence[int], work: _Work, rng: np.random.Generator, found: Mapping[str, _Found]
) -> None:
    """Time every job with each number of rows, all jobs interleaved."""
    samples: dict[tuple[str, int], list[Generation]] = {}
    lost: dict[str, str] = {}
    with ExitStack() as stack:
        workers = [(job, stack.enter_context(Worker(job))) for job in jobs]
        for job, worker in workers:
            try:
                worker.load(n_ctx=work.n_ctx, timeout_s=work.timeout_s)
            except EdgetuneError as error:
                lost[job.name] = str(error)
        for rows in n_rows:
            broken = dict(lost)
            for done in range(SWEEP_REPEATS + 1):
                for place in rng.permutation(len(workers)):
                    job, worker = workers[place]
                    if job.name in broken:
                        continue
                    try:
                        generation = _rows(worker, rows, work, warmup=done == 0)
                    except EdgetuneError as error:
                        broken[job.name] = str(error)
                        lost |= {} if worker.alive else {job.name: str(error)}
                    else:
                        samples.setdefault((job.name, rows), []).append(generation)
            for job, _ in workers:
                found[job.name].sweep.append(
                    SweepPoint(
                        n_threads=job.n_threads, n_rows=rows, prompt_tokens=len(work.ids),
                        generations=samples.get((job.name, rows), []), reason=broken.get(job.name),
                    )
                )  # fmt: skip


def _rows(worker: Worker, n_rows: int, work: _Work, *, warmup: bool) -> Generation:
    if n_rows == 1:
        reply = worker.call("generate_timed", timeout_s=work.timeout_s, ids=work.ids, continuation=work.fed)
    else:
        reply = worker.call(
            "generate_rows_timed", timeout_s=work.timeout_s, rows=[work.ids] * n_rows, continuation=work.fed
        )
    start, *stamps = reply["stamps"]
    waits = [(after - before) * 1e3 for before, after in pairwise(stamps)]
    return Generation(ttft_ms=(stamps[0] - start) * 1e3, itl_ms=waits, warmup=warmup)


def _cold_start(job: Job, work: _Work) -> ColdStart:
    """Load and generate once with nothing of the artifact in memory, then again in another process."""
    files = [job.path] if job.path.is_file() else [file for file in job.path.rglob("*") if file.is_file()]
    resident = sensors.drop_from_page_cache(files)
    (cold_load, cold_first), (warm_load, warm_first) = (_first_token(job, work) for _ in range(2))
    return ColdStart(
        resident=resident, load_ms=cold_load, ttft_ms=cold_first, warm_load_ms=warm_load, warm_ttft_ms=warm_first
    )


def _first_token(job: Job, work: _Work) -> tuple[float, float]:
    with Worker(job) as worker:
        load_ms = float(worker.load(n_ctx=work.n_ctx, timeout_s=work.timeout_s)["load_ms"])
        reply = worker.call("generate_timed", timeout_s=work.timeout_s, ids=work.ids, continuation=[])
        return load_ms, (reply["stamps"][1] - reply["stamps"][0]) * 1e3


def _memory(job: Job, work: _Work) -> MemoryPhases:
    with Worker(job) as worker:
        worker.load(n_ctx=work.n_ctx, timeout_s=work.timeout_s)
        found = worker.call("memory_phases", timeout_s=work.timeout_s, ids=work.ids, continuation=work.fed)
        return MemoryPhases.model_validate(found)


def _energy(job: Job, work: _Work) -> Energy:
    n_tokens, on_gpu = len(work.ids) + len(work.fed), job.on_gpu
    why = sensors.EnergyMeter().why_not
    if why is not None and not on_gpu:
        return Energy(joules=None, seconds=0.0, n_tokens=n_tokens, reason=why)
    with Worker(job) as worker:
        worker.load(n_ctx=work.n_ctx, timeout_s=work.timeout_s)
        _rows(worker, 1, work, warmup=True)
        meter, gpu, began = sensors.EnergyMeter(), sensors.GpuEnergyMeter() if on_gpu else None, time.monotonic()
        _rows(worker, 1, work, warmup=False)
        return Energy(
            joules=meter.joules(), seconds=time.monotonic() - began, n_tokens=n_tokens, reason=why,
            gpu_joules=gpu.joules() if gpu is not None else None, gpu_reason=gpu.why_not if gpu is not None else None,
        )  # fmt: skip


def _roofline(job: Job, timed: Latency, work: _Work, bandwidth: float) -> Roofline:
    if job.on_gpu:
        raise UnsupportedError("the bandwidth that was measured is the processor's; a GPU has no roofline here")
    with Worker(job) as worker:
        worker.load(n_ctx=work.n_ctx, timeout_s=work.timeout_s)
        told = worker.call("traffic", timeout_s=work.timeout_s)
    case = min(timed.cases, key=lambda case: (case.prompt_tokens, case.new_tokens))
    waits = [wait for g in case.generations if not g.warmup for wait in g.itl_ms]
    n_past = case.prompt_tokens + case.new_tokens // 2
    weights = roofline.weight_bytes(job, told["weight_bytes"])
    return roofline.roofline(weights, told["kv_bytes_per_token"], n_past, float(np.median(waits)), bandwidth)


def crossover(small: Latency, large: Latency, *, seed: int = 0) -> Iterator[tuple[int, float, float, float]]:
    """Give (rows, speed of `small` over that of `large`, low, high) of each number of rows that both were timed with.

    Where the interval falls to 1 or below, the smaller weights no longer pay: that is the crossover.
    """
    points = [_by_rows(one) for one in (small, large)]
    for n_rows in sorted(points[0].keys() & points[1].keys()):
        ratio = percentile_ratio(points[1][n_rows], points[0][n_rows], 50, seed=seed)
        yield n_rows, ratio.value, ratio.low, ratio.high


def _by_rows(one: Latency) -> dict[int, list[list[float]]]:
    if one.probes is None:
        return {}
    return {
        point.n_rows: [g.itl_ms for g in point.generations if not g.warmup]
        for point in one.probes.sweep
        if point.n_threads == one.subject.n_threads and point.reason is None
    }
