"""What changed between two reports: verdicts, versions, size, answers, tasks, memory, latency, and what is chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgetune.runtime import statistics
from edgetune.runtime.evidence import Accuracy, Latency, LatencyCase, Report, Subject, TaskScore
from edgetune.runtime.latency import noise_floor
from edgetune.runtime.task_metrics import METRICS
from edgetune.runtime.verdict import ONLY_BOUNDS, task_loss, tasks_of

Kind = Literal["better", "worse", "changed", "same", "not comparable"]
FIGURES = (("TTFT", "ttft_ms"), ("ITL", "itl_ms"))
DECIDED = ("ship", "do not ship", "failed")  # worst last
MEMORY_NOISE = 0.05  # share by which the peak of the same file may differ from process to process


@dataclass(frozen=True)
class Difference:
    """One thing of one subject that was compared. `kind` is "same" where the difference may be chance."""

    subject: str
    what: str
    kind: Kind
    says: str


def compare(before: Report, after: Report, *, seed: int = 0, confidence: float = 0.95) -> list[Difference]:
    """Compare every subject that is in either report, in the order of the later one."""
    found: list[Difference] = []
    if before.edgetune != after.edgetune:
        found.append(Difference("edgetune", "version", "changed", f"{before.edgetune} to {after.edgetune}"))
    if before.machine != after.machine:
        says = f"{before.machine.cpu} to {after.machine.cpu}: latency is not compared"
        found.append(Difference("machine", "machine", "changed", says))
    names = dict.fromkeys([*_subjects(after), *_subjects(before)])
    for name in names:
        if name not in _subjects(before) or name not in _subjects(after):
            says = "only in the later report" if name in _subjects(after) else "only in the earlier report"
            found.append(Difference(name, "subject", "changed", says))
            continue
        found += _verdicts(name, before, after)
        found += _versions(name, before, after)
        found += _size(name, before, after)
        old, new = _accuracy(before, name), _accuracy(after, name)
        if old is not None and new is not None:
            found += _answers(name, old, new, confidence)
        found += _tasks(name, before, after, confidence)
        timed, retimed = _latency(before, name), _latency(after, name)
        if timed is not None and retimed is not None and before.machine == after.machine:
            found += _memory(name, timed, retimed)
            found += _timings(name, timed, retimed, seed, confidence)
    return found


def _subjects(report: Report) -> dict[str, None]:
    return dict.fromkeys([*(s.name for s in _measured(report)), *(v.candidate for v in report.verdicts)])


def _measured(report: Report) -> list[Subject]:
    """Give the subject of every measurement."""
    measurements: list[Accuracy | Latency | TaskScore] = [*report.accuracy, *report.latency, *report.tasks]
    return [found.subject for found in measurements]


def _accuracy(report: Report, name: str) -> Accuracy | None:
    return next((found for found in report.accuracy if found.subject.name == name), None)


def _latency(report: Report, name: str) -> Latency | None:
    return next((found for found in report.latency if found.subject.name == name), None)


def _verdicts(name: str, before: Report, after: Report) -> Iterator[Difference]:
    """Compare verdicts. One that was or became undecided tells nothing of the candidate: the machine may be why."""
    old, new = (next((v for v in r.verdicts if v.candidate == name), None) for r in (before, after))
    if old is not None and new is not None and old.verdict != new.verdict:
        kind: Kind = "changed"
        if old.verdict in DECIDED and new.verdict in DECIDED:
            kind = "better" if DECIDED.index(new.verdict) < DECIDED.index(old.verdict) else "worse"
        yield Difference(name, "verdict", kind, f"{old.verdict} to {new.verdict}: {new.reason}")


def _versions(name: str, before: Report, after: Report) -> Iterator[Difference]:
    """Compare the engine that ran a subject, and the packages that made it."""
    engines = [_engines(r, name) for r in (before, after)]
    if all(engines) and set(engines[0]) != set(engines[1]):
        yield Difference(name, "engine", "changed", f"{' and '.join(engines[0])} to {' and '.join(engines[1])}")
    old, new = (r.artifacts.get(name, {}).get("versions", {}) for r in (before, after))
    changed = [
        f"{package} {old.get(package, 'absent')} to {new.get(package, 'absent')}"
        for package in sorted(old.keys() | new.keys())
        if old.get(package) != new.get(package)
    ]
    if old and new and changed:
        yield Difference(name, "made by", "changed", ", ".join(changed))


def _engines(report: Report, name: str) -> list[str]:
    return list(dict.fromkeys(f"{s.engine} {s.engine_version}" for s in _measured(report) if s.name == name))


def _size(name: str, before: Report, after: Report) -> Iterator[Difference]:
    old, new = (next((s.size_bytes for s in _measured(r) if s.name == name), None) for r in (before, after))
    if old is not None and new is not None and old != new:
        kind: Kind = "better" if new < old else "worse"
        yield Difference(name, "size", kind, f"{old / 1e6:.1f} to {new / 1e6:.1f} MB")


def _tasks(name: str, before: Report, after: Report, confidence: float) -> Iterator[Difference]:
    """Compare every metric of every task that both scored, row by row."""
    old, new = tasks_of(before, name), tasks_of(after, name)
    for task in (task for task in new if task in old):
        was, now = old[task], new[task]
        if was.workload != now.workload:
            yield Difference(name, f"task {task}", "not comparable", "the two reports scored other rows")
            continue
        for metric in (metric for metric in now.figures if metric in was.figures):
            found = task_loss(now, was, metric, ONLY_BOUNDS, (1 + confidence) / 2)
            known = METRICS[now.kind].get(metric)
            relative = known is not None and known.relative
            kind: Kind = "worse" if found.low > 0 else "better" if found.high < 0 else "same"
            rise = (found.loss, found.low, found.high) if relative else (-found.loss, -found.high, -found.low)
            value, low, high = (100 * share for share in rise)
            title = known.title if known is not None else "own scorer"
            unit = " %" if relative else " points"
            bounds = "no bound" if math.isinf(low) or math.isinf(high) else f"{low:+.2f} to {high:+.2f}"
            says = f"{title} {value:+.2f}{unit} ({bounds})"
            yield Difference(name, f"task {task}", kind, says)


def _answers(name: str, old: Accuracy, new: Accuracy, confidence: float) -> Iterator[Difference]:
    if old.workload != new.workload:
        yield Difference(name, "answers", "not comparable", "the two reports scored other rows")
        return
    was, now = [row.exact for row in old.rows], [row.exact for row in new.rows]
    flips = statistics.flips(now, was)
    said = sum(a.output != b.output for a, b in zip(old.rows, new.rows, strict=True) if not (a.exact or b.exact))
    bounds = statistics.paired_difference_bounds(flips.harmful, flips.beneficial, len(now), (1 + confidence) / 2)
    gain, low, high = (-100 * share for share in (bounds.value, bounds.high, bounds.low))
    says = (
        f"{flips.harmful} rows became wrong and {flips.beneficial} right, exact match {gain:+.2f} points "
        f"({low:+.2f} to {high:+.2f}), McNemar p = {flips.p_value:.2g}; {said} wrong answers are worded differently"
    )
    kind: Kind = "same"
    if flips.p_value < 1 - confidence:
        kind = "worse" if flips.harmful > flips.beneficial else "better"
    yield Difference(name, "answers", kind, says)


def _memory(name: str, old: Latency, new: Latency) -> Iterator[Difference]:
    if old.subject.n_threads != new.subject.n_threads:
        return
    share = new.peak_rss_bytes / old.peak_rss_bytes - 1
    kind: Kind = "same" if abs(share) <= MEMORY_NOISE else "better" if share < 0 else "worse"
    says = f"{old.peak_rss_bytes / 1e6:.0f} to {new.peak_rss_bytes / 1e6:.0f} MB at the peak, {share:+.1%}"
    if kind == "same" and share:
        says += f"; up to {MEMORY_NOISE:.0%} is taken as chance"
    yield Difference(name, "memory", kind, says)


def _timings(name: str, old: Latency, new: Latency, seed: int, confidence: float) -> Iterator[Difference]:
    if old.subject.n_threads != new.subject.n_threads:
        says = f"{old.subject.n_threads} to {new.subject.n_threads} threads"
        yield Difference(name, "latency", "not comparable", says)
        return
    busy = [label for label, found in (("earlier", old), ("later", new)) if found.load.busy]
    cases = {(case.prompt_tokens, case.new_tokens): case for case in old.cases}
    for case in new.cases:
        earlier = cases.get((case.prompt_tokens, case.new_tokens))
        if earlier is None:
            continue
        for title, figure in FIGURES:
            ratio = statistics.percentile_ratio(
                _samples(case, figure), _samples(earlier, figure), 50, seed=seed,
                confidence=confidence,
            )  # fmt: skip
            floors = [noise_floor(side, figure) for side in (earlier, case)]
            floor = max((f for f in floors if f is not None), default=0.0)
            kind: Kind = "worse" if ratio.low > 1 + floor else "better" if ratio.high < 1 - floor else "same"
            says = f"median {ratio.value:.3f} times as long ({ratio.low:.3f} to {ratio.high:.3f})"
            says += f", runs differ by {floor:.1%} by chance" if floor else ""
            if None in floors and kind != "same":
                kind, says = "changed", f"{says}; without repeated runs (bench.runs) that may be chance"
            if busy:
                kind, says = "not comparable", f"{says}; the machine was busy in the {' and the '.join(busy)} report"
            yield Difference(name, f"{title}, prompts of {case.prompt_tokens}", kind, says)


def _samples(case: LatencyCase, figure: str) -> list[list[float]]:
    measured = [g for g in case.generations if not g.warmup]
    return [[g.ttft_ms] if figure == "ttft_ms" else g.itl_ms for g in measured]
