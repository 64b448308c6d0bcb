"""What was timed before: the verb `history`, and evidence that is brought from another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgetune.errors import ArtifactError, UsageError
from edgetune.runtime import history as past
from edgetune.runtime.evidence import Accuracy, Failure, Latency, Report, Subject, Timings
from edgetune.runtime.report.write import read_report

Measured = TypeVar("Measured", Accuracy, Latency)


class Run(NamedTuple):
    """A file, and what it runs in."""

    artifact_digest: str
    engine: str
    settings: str  # as JSON

    @classmethod
    def of(cls, subject: Subject) -> Run:
        return cls(subject.artifact_digest, subject.engine, json.dumps(subject.settings, sort_keys=True))


def history(place: Path, console: Console, *, artifact: str, machine: str, add: Path | None) -> None:
    """Print the trend of everything that was timed, by machine and artifact; `add` takes a report or `--json` in."""
    if add is not None:
        timings = read_timings(add)
        if past.holds(place, timings):
            console.print(f"{place} holds this already; nothing added", highlight=False)
        else:
            console.print(f"{past.record(place, timings)} figures added to {place}", highlight=False)
    trends = past.trends(place, artifact=artifact, machine=machine)
    if not trends:
        raise UsageError(f"{place} holds nothing of that kind; edgetune bench fills it")
    machines = {trend.machine: trend.cpu for trend in trends}
    for key, cpu in machines.items():
        console.print(f"machine {key}: {cpu}", highlight=False, markup=False)
        table = Table(box=None, pad_edge=False)
        for head in ("artifact", "engine", "prompt", "new", "runs", "TTFT ms", "ITL ms", "change of ITL"):
            table.add_column(head, justify="left" if head in ("artifact", "engine") else "right", overflow="fold")
        for trend in trends:
            if trend.machine == key:
                last = trend.points[-1]
                name = f"{trend.subject} {trend.artifact[:8]}"
                engine = f"{trend.engine}, {trend.n_threads} threads" if trend.n_threads else trend.engine
                cells = (name, engine, trend.prompt_tokens or "–", trend.new_tokens, len(trend.points),
                         f"{last.ttft_ms:.1f}", f"{last.itl_ms:.2f}", change(trend))  # fmt: skip
                table.add_row(*(Text(str(cell)) for cell in cells))
        console.print(table)


def change(trend: past.Trend) -> str:
    """Say how the last run stands to those before, and whether that may be chance."""
    if len(trend.points) == 1:
        return "first run"
    share, floor = trend.change("itl_ms")
    if share is None:
        return "no quiet run before it"
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
    lost = [failure for failure in report.failures if failure.stage == "latency"]
    return Timings(edgetune=report.edgetune, time=written, machine=report.machine, results=[*report.latency, *lost])


def merge_timings(report: Report, path: Path) -> Report:
    """Give a report with what another machine timed and scored of the same files, failures too: matched by digest.

    Of several candidates with one file the one that runs it in the same engine with the same settings is taken. What a
    server was timed to do without naming its file stands under the server's own name. The same evidence twice is kept
    once. Raises UsageError where it is of other files only.
    """
    timings, names = read_timings(path), _names(report)
    known: list[Latency | Failure] = []
    for one in timings.results:
        if isinstance(one, Latency):
            if one.subject.artifact_digest in names:
                known.append(_renamed(one, names))
        elif one.artifact_digest in names:
            known.append(one.model_copy(update={"subject": names[one.artifact_digest]}))
    rows = {found.workload for found in report.accuracy}
    scored = [
        _renamed(one, names) for one in timings.scored if one.subject.artifact_digest in names and one.workload in rows
    ]
    served = [one for one in timings.served if one.artifact_digest is None or one.artifact_digest in names]
    if not (known or scored or served):
        raise UsageError(
            f"{path} has timed and scored none of the files of report {report.name!r}; their digests or rows differ"
        )
    merged = timings.model_copy(
        update={"results": known, "scored": scored, "served": served, "figures": []}  # the page computes its own
    )
    return (
        report if merged in report.elsewhere else report.model_copy(update={"elsewhere": [*report.elsewhere, merged]})
    )


def _names(report: Report) -> dict[str | Run | None, str]:
    """Give the report's name of each file, by its digest, and of each way to run one."""
    subjects = [*(found.subject for found in report.latency), *(found.subject for found in report.accuracy)]
    names: dict[str | Run | None, str] = {lost.artifact_digest: lost.subject for lost in report.failures}
    for subject in subjects:
        names |= {subject.artifact_digest: subject.name, Run.of(subject): subject.name}
    names.pop(None, None)  # of what failed before it was made
    return names


def _renamed(one: Measured, names: Mapping[str | Run | None, str]) -> Measured:
    """Give evidence under the name that its file has in a report."""
    digest = one.subject.artifact_digest
    subject = one.subject.model_copy(update={"name": names.get(Run.of(one.subject), names[digest])})
    return one.model_copy(update={"subject": subject})
