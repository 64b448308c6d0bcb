"""The report's tasks: figures and losses of each, and the rows that fell furthest."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgetune.runtime.evidence import Report, TaskScore
from edgetune.runtime.report import measures
from edgetune.runtime.report.columns import DASH, interval_text, number
from edgetune.runtime.task_metrics import METRICS
from edgetune.runtime.verdict import ONLY_BOUNDS, task_loss, tasks_of

N_WORST = 3  # rows of a task that the page shows of each candidate


@dataclass(frozen=True)
class TaskLine:
    """One metric of one task of one subject, and its loss against the reference with one-sided bounds."""

    task: str
    kind: str
    n_rows: int
    key: str  # of the metric
    metric: str  # as it is written
    subject: str
    figure: str
    loss: str
    bounds: str
    source: str
    loss_source: str  # of the rows of both sides

    @property
    def budget(self) -> str:
        """The name of a budget on this loss."""
        return f"{self.task}: {self.key} loss"


@dataclass(frozen=True)
class WorstRow:
    """A row whose score fell against the reference's."""

    task: str
    subject: str
    row: int
    fell: str
    gold: str
    reference: str
    candidate: str


def task_lines(report: Report) -> Iterator[TaskLine]:
    """Give every metric of every task, task by task, in the order of the evidence.

    The metric that a budget judges has the bounds of its verdict.
    """
    checks = {(v.candidate, check.budget): check for v in report.verdicts for check in v.checks}
    before = tasks_of(report, report.reference)
    places = {found.task: i for i, found in enumerate(report.tasks) if found.subject.name == report.reference}
    confidence = measures.accuracy_budget(report).confidence
    order = list(dict.fromkeys(found.task for found in report.tasks))
    for i, found in sorted(enumerate(report.tasks), key=lambda pair: order.index(pair[1].task)):
        reference = before.get(found.task)
        for metric, figure in found.figures.items():
            known = METRICS[found.kind].get(metric)
            relative = known is not None and known.relative
            loss = bounds = DASH
            source, loss_source = f"tasks[{i}].rows[].scores.{metric}", ""
            if reference is not None and found is not reference and found.workload == reference.workload:
                judged = task_loss(found, reference, metric, ONLY_BOUNDS, confidence)
                check = checks.get((found.subject.name, f"{found.task}: {metric} loss"))
                low, high = (judged.low, judged.high) if check is None else (check.low, check.high)
                loss, bounds = _written(judged.loss, low, high, relative)
                loss_source = f"{source}, tasks[{places[found.task]}].rows[].scores.{metric}"
            yield TaskLine(
                task=found.task, kind=found.kind.replace("_", " "), n_rows=len(found.rows), key=metric,
                metric=known.title if known else "Own scorer", subject=found.subject.name,
                figure=number(figure, 2) if relative else f"{number(figure * 100, 1)} %", loss=loss, bounds=bounds,
                source=source, loss_source=loss_source,
            )  # fmt: skip


def worst_rows(report: Report) -> Iterator[WorstRow]:
    """Give the rows whose first metric fell furthest below the reference's, of each task and candidate."""
    before = tasks_of(report, report.reference)
    for found in report.tasks:
        reference = before.get(found.task)
        if reference is None or found is reference or found.workload != reference.workload:
            continue
        metric = next(iter(found.figures))
        known = METRICS[found.kind].get(metric)
        if known is not None and known.relative:
            continue  # a text has no answer to show
        yield from _worst(found, reference, metric)


def _worst(found: TaskScore, reference: TaskScore, metric: str) -> Iterator[WorstRow]:
    falls = [was.scores[metric] - now.scores[metric] for now, was in zip(found.rows, reference.rows, strict=True)]
    order = sorted(range(len(falls)), key=lambda i: -falls[i])[:N_WORST]
    for i in order:
        if falls[i] > 0 and found.rows[i].output != reference.rows[i].output:
            yield WorstRow(
                found.task, found.subject.name, i, number(falls[i], 2), found.rows[i].gold, reference.rows[i].output,
                found.rows[i].output,
            )  # fmt: skip


def _written(loss: float, low: float | None, high: float | None, relative: bool) -> tuple[str, str]:
    unit = " %" if relative else " points"
    low, high = (x if x is not None and math.isfinite(x) else None for x in (low, high))
    below, above = (None if x is None else 100 * x for x in (low, high))
    return f"{number(100 * loss, 2, signed=True)}{unit}", interval_text(below, above, 2, signed=True) or DASH
