"""The report's part on forgetting: general text and general questions, before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgetune.runtime.evidence import Report, TaskScore
from edgetune.runtime.report import measures
from edgetune.runtime.report.columns import DASH, number
from edgetune.runtime.statistics import flips

BASE = "base"


@dataclass(frozen=True)
class Forgetting:
    """One measure of the base and of what was trained, the reference."""

    measure: str
    over: str
    before: str
    after: str
    change: str
    interval: str
    flips: str
    source: str


def forgetting(report: Report) -> Iterator[Forgetting]:
    """Give perplexity of general text and accuracy of the general probe, as far as both subjects have them."""
    if report.training is None:
        return
    scores = {found.subject.name: i for i, found in reversed(list(enumerate(report.accuracy)))}
    before, after = (scores.get(name) for name in (BASE, report.reference))
    if before is not None and after is not None:
        was, now = (measures.perplexity(report.accuracy[i]) for i in (before, after))
        text = report.accuracy[before].text
        if was is not None and now is not None and text is not None:
            rise = number(100 * (now / was - 1), 1, signed=True)
            yield Forgetting(
                measure="Perplexity", over=f"{number(sum(text.n_tokens), 0)} tokens of general text",
                before=number(was, 2), after=number(now, 2), change=f"{rise} %",
                interval=DASH, flips=DASH, source=f"accuracy[{before}].text, accuracy[{after}].text",
            )  # fmt: skip
    probes = {found.subject.name: i for i, found in enumerate(report.probe)}
    if {BASE, report.reference} <= probes.keys():
        asked, told = report.probe[probes[BASE]], report.probe[probes[report.reference]]
        if asked.workload == told.workload:
            yield _probe(asked, told, f"probe[{probes[BASE]}].rows, probe[{probes[report.reference]}].rows")


def _probe(before: TaskScore, after: TaskScore, source: str) -> Forgetting:
    was, now = ([row.scores["accuracy"] == 1 for row in found.rows] for found in (before, after))
    change, turned, n = measures.paired_change(now, was), flips(now, was), len(was)
    low, high = (number(bound, 1, signed=True) for bound in (change.low, change.high))
    return Forgetting(
        measure="Accuracy", over=f"{number(n, 0)} general questions", before=f"{number(100 * sum(was) / n, 1)} %",
        after=f"{number(100 * sum(now) / n, 1)} %", change=f"{number(change.value, 1, signed=True)} points",
        interval=f"{low} to {high}", source=source,
        flips=f"{turned.harmful} turned wrong, {turned.beneficial} turned right, p = {number(turned.p_value, 3)}",
    )  # fmt: skip
