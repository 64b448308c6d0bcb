"""The verb `bench`: any files and folders side by side, ranked, and remembered; and the verb `history`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgetune import __version__, found
from edgetune.artifact import MANIFEST, write_text
from edgetune.data.general import general_text
from edgetune.data.golden import FILE as GOLDEN
from edgetune.data.golden import Golden
from edgetune.errors import ArtifactError, EngineError, UsageError
from edgetune.progress import reporting
from edgetune.recipe import Bench
from edgetune.runtime import history as past
from edgetune.runtime import serving
from edgetune.runtime.evidence import Failure, Latency, Report, Timings
from edgetune.runtime.latency import case_interval, make_prompts, measure, noise_floor
from edgetune.runtime.machine import describe
from edgetune.runtime.report import beside
from edgetune.runtime.report.write import read_report
from edgetune.runtime.serving import Endpoint
from edgetune.runtime.statistics import Interval, percentile_ratio
from edgetune.runtime.worker import Job, Worker

TEXT_CHARACTERS = 40_000  # of general text, for prompts of models that bring no golden texts


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
    stream = _stream(jobs, settings)
    with reporting(console, "bench") as progress:
        results = measure(
            jobs, settings, make_prompts(stream, settings.prompt_tokens), fold=True,
            progress=lambda done, total: progress(done, total, "rounds"),
        )  # fmt: skip
    timings = Timings(
        edgetune=__version__, time=datetime.now(UTC).isoformat(timespec="seconds"), machine=describe(), results=results
    )
    if json is not None:
        write_text(json, timings.model_dump_json(indent=1) + "\n")
    if history is not None:
        past.record(history, timings)
    console.print(ranking(results))
    for line in remarks(results):
        console.print(f"note: {line}", highlight=False, markup=False)
    return not any(isinstance(one, Failure) for one in results)


def bench_http(
    endpoint: Endpoint,
    console: Console,
    *,
    concurrency: Sequence[int],
    rates: Sequence[float],
    n_requests: int,
    prompt_words: int,
    n_tokens: int,
    ttft_slo: float | None = None,
    tpot_slo: float | None = None,
    json: Path | None = None,
) -> bool:
    """Time a server and print a row for each case; gives whether every request was answered."""
    words = general_text(None, "measure").split()
    n_prompts = (len(concurrency) + len(rates)) * n_requests + 1
    places = [n * prompt_words % (len(words) - prompt_words) for n in range(n_prompts)]
    prompts = [" ".join(words[place : place + prompt_words]) for place in places]
    with reporting(console, "bench-http") as progress:
        served = serving.measure(
            endpoint, prompts, n_tokens=n_tokens, concurrency=concurrency, rates=rates, n_requests=n_requests,
            progress=lambda done, total: progress(done, total, "requests"),
        )  # fmt: skip
    if json is not None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        timings = Timings(edgetune=__version__, time=time, machine=describe(), results=[], served=[served])
        write_text(json, timings.model_dump_json(indent=1) + "\n")
    table = Table(title=f"{endpoint.model}, ms: p50 / p95", title_justify="left", box=None, pad_edge=False)
    for head in ("clients", "TTFT", "ITL", "tokens/s", "goodput/s", "failed"):
        table.add_column(head, justify="right")
    for case in served.cases:
        failed = [one.error for one in case.requests if one.error is not None]
        who = str(case.concurrency) if case.concurrency is not None else f"{case.rate:g}/s"
        good = f"{serving.goodput(case, ttft_ms=ttft_slo, tpot_ms=tpot_slo):.2f}"
        if len(failed) == len(case.requests):
            table.add_row(who, "failed", "", "", good, str(len(failed)))
            continue
        waits = [
            "/".join(f"{serving.figure(case, name, q).value:.1f}" for q in (50, 95)) for name in ("ttft_ms", "itl_ms")
        ]
        table.add_row(who, *waits, f"{serving.throughput(case):.1f}", good, str(len(failed)))
    console.print(table)
    errors = dict.fromkeys(one.error for case in served.cases for one in case.requests if one.error is not None)
    for error in errors:
        console.print(f"note: {error}", highlight=False, markup=False)
    return not errors


def _stream(jobs: Sequence[Job], settings: Bench) -> list[int]:
    """Token ids to cut prompts from: golden texts of an artifact, else general text in the first tokenizer that works.

    Raises EngineError where none does.
    """
    folder = jobs[0].path
    if (folder / MANIFEST).is_file() and (folder / GOLDEN).is_file():
        return Golden.read(folder).texts[0].ids
    text = general_text(None, "measure")[:TEXT_CHARACTERS]
    reasons = []
    for job in jobs:
        try:
            with Worker(job) as worker:
                worker.load(n_ctx=1, timeout_s=settings.case_timeout_s)
                ids: list[int] = worker.call("tokenize", timeout_s=settings.case_timeout_s, text=text)["ids"]
                return ids
        except EngineError as error:
            reasons.append(f"{job.name}: {error}")
    raise EngineError(f"none could be loaded: {'; '.join(reasons)}")


def ranking(results: Sequence[Latency | Failure]) -> Table:
    """Rank what was timed by the time of all cases together, fastest first.

    Two share a rank where the interval of their ratio, widened by the noise floor where runs were repeated, holds 1.
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
    for one in results:
        if isinstance(one, Failure):
            table.add_row("–", Text(one.subject), "failed", Text(one.reason))
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
    """Tell whether one is slower beyond chance."""
    floors = [floor for side in (one, other) for case in side.cases if (floor := noise_floor(case, "tpot_ms"))]
    return percentile_ratio(_totals(one), _totals(other), 50, seed=0).low > 1 + max(floors, default=0.0)


def _totals(one: Latency) -> list[list[float]]:
    """Milliseconds of each measured round: one generation of every case."""
    per_case = [[g.ttft_ms + sum(g.itl_ms) for g in case.generations if not g.warmup] for case in one.cases]
    return [[sum(round_)] for round_ in zip(*per_case, strict=True)]


def remarks(results: Sequence[Latency | Failure]) -> list[str]:
    """Say what a reader of the figures must know."""
    timed = [one for one in results if isinstance(one, Latency)]
    said = []
    busy = max((one.load.others_during for one in timed if one.load.busy), default=None)
    if busy is not None:
        said.append(f"others used {busy:.0%} of the machine meanwhile; measure again when it is idle")
    said += [f"{one.subject.name} never became steady" for one in timed if any(c.steady is False for c in one.cases)]
    said += [f"{one.subject.name}: {line}" for one in timed for line in beside.probed(one)]
    floors = [floor for one in timed for case in one.cases if (floor := noise_floor(case, "tpot_ms")) is not None]
    if floors:
        said.append(f"runs of the same artifact may differ by {max(floors):.1%} by chance (the noise floor)")
    elif timed:
        said.append("one run tells no noise floor: ranks rest on the spread within it; --runs 3 measures one")
    return said


def history(place: Path, console: Console, *, artifact: str, machine: str, add: Path | None) -> None:
    """Print the trend of everything that was timed, by machine and artifact; `add` takes a report or `--json` in."""
    if add is not None:
        console.print(f"{past.record(place, read_timings(add))} figures added to {place}", highlight=False)
    trends = past.trends(place, artifact=artifact, machine=machine)
    if not trends:
        raise UsageError(f"{place} holds nothing of that kind; edgetune bench fills it")
    machines = {trend.machine: trend.cpu for trend in trends}
    for key, cpu in machines.items():
        console.print(f"machine {key}: {cpu}", highlight=False, markup=False)
        table = Table(box=None, pad_edge=False)
        for head in ("artifact", "engine", "prompt", "new", "runs", "TTFT", "ITL", "change of ITL"):
            table.add_column(head, justify="left" if head in ("artifact", "engine") else "right", overflow="fold")
        for trend in trends:
            if trend.machine == key:
                last = trend.points[-1]
                name = f"{trend.subject} {trend.artifact[:8]}"
                engine = f"{trend.engine}, {trend.n_threads} threads"
                cells = (name, engine, trend.prompt_tokens, trend.new_tokens, len(trend.points),
                         f"{last.ttft_ms:.1f}", f"{last.itl_ms:.2f}", change(trend))  # fmt: skip
                table.add_row(*(Text(str(cell)) for cell in cells))
        console.print(table)


def change(trend: past.Trend) -> str:
    """Say how the last run stands to those before, and whether that may be chance."""
    if len(trend.points) == 1:
        return "first run"
    share, floor = trend.change("itl_ms")
    if trend.points[-1].busy:
        return f"{share:+.1%}, but the machine was busy"
    if floor is None:
        return f"{share:+.1%}; two quiet runs before it would tell a noise floor"
    if abs(share) <= floor:
        return f"{share:+.1%}, within the noise of {floor:.1%}"
    versions = dict.fromkeys(point.engine_version for point in trend.points[-2:])
    said = f"{share:+.1%}, {'slower' if share > 0 else 'faster'} beyond the noise of {floor:.1%}"
    return f"{said}; {' -> '.join(versions)}" if len(versions) > 1 else said


def read_timings(path: Path) -> Timings:
    """Read what `bench --json` wrote, or the latency of a run's report. Raises ArtifactError."""
    file = path / "report.json" if path.is_dir() else path
    try:
        return Timings.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError:
        report = read_report(file)
    written = datetime.fromtimestamp(file.stat().st_mtime, UTC).isoformat(timespec="seconds")
    return Timings(edgetune=report.edgetune, time=written, machine=report.machine, results=[*report.latency])


def merge_timings(report: Report, path: Path) -> Report:
    """Give a report with what another machine timed of the same files: matched by digest, never by name.

    The same evidence twice is kept once. Raises UsageError where it is of other files only.
    """
    timings = read_timings(path)
    names = {found.subject.artifact_digest: found.subject.name for found in (*report.latency, *report.accuracy)}
    known = [
        one.model_copy(update={"subject": one.subject.model_copy(update={"name": names[one.subject.artifact_digest]})})
        for one in timings.results
        if isinstance(one, Latency) and one.subject.artifact_digest in names
    ]
    if not known:
        raise UsageError(f"{path} has timed none of the files of report {report.name!r}; their digests differ")
    merged = timings.model_copy(update={"results": known})
    return (
        report if merged in report.elsewhere else report.model_copy(update={"elsewhere": [*report.elsewhere, merged]})
    )
