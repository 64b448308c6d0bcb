"""The verb `bench`: any files and folders side by side, ranked and remembered."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgetune import __version__, bench_detail, found
from edgetune.artifact import write_text
from edgetune.data.general import general_text
from edgetune.errors import EdgetuneError, UsageError
from edgetune.progress import reporting
from edgetune.recipe import Bench
from edgetune.runtime import history as past
from edgetune.runtime.evidence import Failure, Latency, Timings
from edgetune.runtime.latency import case_interval, make_prompts, measure
from edgetune.runtime.machine import describe
from edgetune.runtime.report import beside
from edgetune.runtime.statistics import Interval, percentile_ratio, repeatability
from edgetune.runtime.worker import Job, Worker

TEXT_CHARACTERS = 40_000  # of general text, some 9,000 tokens


def bench(
    paths: Sequence[Path],
    settings: Bench,
    console: Console,
    *,
    engines: Sequence[str] = (),
    json: Path | None = None,
    history: Path | None = None,
) -> bool:
    """Time everything side by side, print it ranked and append it to the history; gives whether all came to their end.

    What is timed needs no manifest and no recipe. All are given the same ids, cut from general text by the first
    one's tokenizer.
    """
    jobs = found.jobs(paths, engines, n_threads=settings.threads)
    stream = prompt_ids(jobs, settings.case_timeout_s)
    with reporting(console, "bench") as progress:
        results = measure(
            jobs, settings, make_prompts(stream, settings.prompt_tokens), fold=True,
            progress=progress,
        )  # fmt: skip
    timings = Timings(
        edgetune=__version__, time=datetime.now(UTC).isoformat(timespec="seconds"), machine=describe(), results=results,
        figures=bench_detail.figures(results),
    )  # fmt: skip
    console.print(ranking(results))
    for table in bench_detail.details(results, timings.figures):
        console.print(table)
    for name, lines in probed(results).items():
        console.print(f"{name}:", highlight=False, markup=False)
        for line in lines:
            console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    for line in remarks(results):
        console.print(f"note: {line}", highlight=False, markup=False)
    if json is not None:
        write_text(json, timings.model_dump_json(indent=1) + "\n")
    if history is not None:
        past.record(history, timings)
    return not any(isinstance(one, Failure) for one in results)


def prompt_text() -> str:
    """The prose that prompts are cut from."""
    return general_text(None, "measure")[:TEXT_CHARACTERS]


def prompt_ids(jobs: Sequence[Job], timeout_s: float) -> list[int]:
    """Token ids to cut prompts from: general text in the tokenizer of the first that loads.

    Raises the error of the last where none does.
    """
    text = prompt_text()
    for job in jobs:
        try:
            with Worker(job) as worker:
                worker.load(n_ctx=1, timeout_s=timeout_s)
                ids: list[int] = worker.call("tokenize", timeout_s=timeout_s, text=text)["ids"]
                return ids
        except EdgetuneError:
            if job is jobs[-1]:
                raise
    raise UsageError("nothing was given to time; give a file or folder")


def ranking(results: Sequence[Latency | Failure]) -> Table:
    """Rank what was timed by the time of all cases together, fastest first.

    Two share a rank where the interval of their ratio, widened by the noise floor, holds 1, or one run told none.
    """
    table = Table(title="latency, ms: p50 / p95", title_justify="left", box=None, pad_edge=False)
    for head in ("", "artifact", "engine", "time", "prompt", "new", "TTFT", "ITL", "peak MB", "size MB"):
        table.add_column(head, justify="left" if head in ("artifact", "engine") else "right", overflow="fold")
    for rank, one, ratio in ranked([one for one in results if isinstance(one, Latency)]):
        shown = [str(rank), one.subject.name, one.subject.engine, f"{ratio.value:.2f}x"]
        for case in one.cases:
            waits = [
                "/".join(f"{case_interval(case, name, q).value:.1f}" for q in (50, 95))
                for name in ("ttft_ms", "itl_ms")
            ]
            peak, size = f"{one.peak_rss_bytes / 1e6:.0f}", f"{one.subject.size_bytes / 1e6:.0f}"
            figures = [str(case.prompt_tokens), str(case.new_tokens), *waits, peak, size]
            table.add_row(*map(Text, [*shown, *figures]))
            shown = [""] * 4
    for lost in results:
        if isinstance(lost, Failure):
            table.add_row("–", Text(lost.subject), "failed", Text(lost.reason))
    return table


def ranked(results: Sequence[Latency]) -> list[tuple[int, Latency, Interval]]:
    """Give (rank, result, time as a multiple of the fastest one's), fastest first; ties share a rank."""
    order = sorted(results, key=lambda one: statistics.median(map(sum, _totals(one))))
    made: list[tuple[int, Latency, Interval]] = []
    for place, one in enumerate(order, start=1):
        rank = place
        if made and not _slower(one, order[place - 2]):
            rank = made[-1][0]
        made.append((rank, one, percentile_ratio(_totals(one), _totals(order[0]), 50, seed=0)))
    return made


def _slower(one: Latency, other: Latency) -> bool:
    """Tell whether one is slower beyond chance; of one run nobody knows what chance does."""
    floors = [floor for side in (one, other) if (floor := _floor(side)) is not None]
    ratio = percentile_ratio(_totals(one), _totals(other), 50, seed=0)
    return len(floors) == 2 and ratio.low > 1 + max(floors)


def _totals(one: Latency) -> list[list[float]]:
    """Milliseconds of each measured round: one generation of every case."""
    per_case = [[g.ttft_ms + sum(g.itl_ms) for g in case.generations if not g.warmup] for case in one.cases]
    return [[sum(round_)] for round_ in zip(*per_case, strict=True)]


def _floor(one: Latency) -> float | None:
    """Give the noise floor of the time of all cases together, from its median in each run; None of one run."""
    runs = [g.run for g in one.cases[0].generations if not g.warmup]
    rounds: dict[int, list[float]] = {}
    for run, (total,) in zip(runs, _totals(one), strict=True):
        rounds.setdefault(run, []).append(total)
    return repeatability([statistics.median(totals) for totals in rounds.values()]) if len(rounds) > 1 else None


def probed(results: Sequence[Latency | Failure]) -> dict[str, list[str]]:
    """Say what the probes of each found, and where the largest, by bytes, is as fast as a smaller one."""
    timed = [one for one in results if isinstance(one, Latency)]
    large = max(timed, key=lambda one: one.subject.size_bytes, default=None)
    said = {one.subject.name: [line.text for line in beside.probed(one)] for one in timed}
    for one in timed:
        if large is not None and one is not large:
            said[one.subject.name] += [line.text for line in beside.crossed(one, large)]
    return {name: lines for name, lines in said.items() if lines}


def remarks(results: Sequence[Latency | Failure]) -> list[str]:
    """Say what a reader of the figures must know."""
    timed = [one for one in results if isinstance(one, Latency)]
    said = []
    busy = max((one.load.others_during for one in timed if one.load.busy), default=None)
    if busy is not None:
        said.append(f"others used {busy:.0%} of the machine meanwhile; measure again when it is idle")
    said += [f"{one.subject.name} never became steady" for one in timed if any(c.steady is False for c in one.cases)]
    floors = [floor for one in timed if (floor := _floor(one)) is not None]
    if floors:
        said.append(f"runs of the same artifact may differ by {max(floors):.1%} by chance (the noise floor)")
    elif timed:
        said.append("one run tells no noise floor, so nothing is called faster; --runs 2 or more measures it")
    return said
