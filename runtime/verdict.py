"""What "ship" means: each budget is held against what was measured, and the worst answer is the verdict.

Candidates are compared with one reference on the same rows, so the accuracy budget's confidence is that of all of them
together: Holm's correction gives each its own (`accuracy_levels`).

Exit codes of a run: 0 where every candidate ships, 1 where any failed, else 3 where any is over a budget, else 4
where any is inconclusive or was built and not run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgetune.errors import DataError
from edgetune.recipe import AccuracyBudget, Budgets
from edgetune.runtime.evidence import (
    Accuracy,
    Check,
    Failure,
    Latency,
    LatencyCase,
    Load,
    Report,
    TaskScore,
    Verdict,
)
from edgetune.runtime.latency import case_interval, noise_floor, waits
from edgetune.runtime.metrics import SlotCounts
from edgetune.runtime.percentiles import groups_needed
from edgetune.runtime.statistics import (
    Interval,
    NonInferiority,
    Outcome,
    holm,
    non_inferiority,
    non_inferiority_f1,
    non_inferiority_t,
)  # fmt: skip
from edgetune.runtime.task_metrics import METRICS

NO_TASKS: Mapping[str, TaskScore] = {}
ONLY_BOUNDS = 1.0  # a margin for those who want a loss and its bounds, and no verdict
MOST_NATS = 700.0  # whose exponential is a float
TIMINGS = (("ttft_ms", 50), ("ttft_ms", 95), ("itl_ms", 50), ("itl_ms", 95))
# worst last
ORDER = ("ship", "inconclusive", "do not ship")


@dataclass(frozen=True)
class Scored:
    """What an accuracy budget may ask of one subject: its held-out rows, and its tasks by name."""

    accuracy: Accuracy | None
    tasks: Mapping[str, TaskScore]


def judge(
    candidate: str,
    budgets: Budgets,
    *,
    size_bytes: int | None = None,
    accuracy: Accuracy | None = None,
    reference: Accuracy | None = None,
    tasks: Mapping[str, TaskScore] = NO_TASKS,
    reference_tasks: Mapping[str, TaskScore] = NO_TASKS,
    level: float | None = None,
    latency: Latency | None = None,
    failures: Sequence[Failure] = (),
    not_run: str | None = None,
) -> Verdict:
    """Judge one candidate. Whatever failed makes it "failed"; a budget without its measurement is inconclusive.

    `level` is the confidence that `accuracy_levels` gave it; the budget's own where it is judged alone. `not_run` says
    why nothing here can run it: it is "built, not run" and no budget is judged.
    """
    if not_run is not None and not failures:
        return Verdict(candidate=candidate, verdict="built, not run", checks=[], reason=not_run)
    checks = []
    if budgets.accuracy is not None:
        scored, before = Scored(accuracy, tasks), Scored(reference, reference_tasks)
        checks.append(_accuracy_check(budgets.accuracy, scored, before, level or budgets.accuracy.confidence))
    for figure, q in TIMINGS:
        limit = getattr(budgets, f"{figure}_p{q}")
        if limit is not None:
            checks.append(_timing_check(figure, q, limit, latency))
    if budgets.size_mb is not None:
        checks.append(_bytes_check("size_mb", budgets.size_mb, size_bytes, "the files that ship take"))
    if budgets.peak_memory_mb is not None:
        peak = latency.peak_rss_bytes if latency is not None else None
        checks.append(_bytes_check("peak_memory_mb", budgets.peak_memory_mb, peak, "the process held at most"))
    if failures:
        reason = "; ".join(f"{failure.stage}: {failure.reason}" for failure in failures)
        return Verdict(candidate=candidate, verdict="failed", checks=checks, reason=reason)
    if not checks:
        return Verdict(candidate=candidate, verdict="ship", checks=[], reason="No budget is set, so none is broken.")
    worst = max((check.verdict for check in checks), key=ORDER.index)
    reasons = [check.reason for check in checks if check.verdict == worst]
    return Verdict(
        candidate=candidate, verdict=worst, checks=checks,
        reason=f"All {len(checks)} budgets hold." if worst == "ship" and len(checks) > 1 else " ".join(reasons),
    )  # fmt: skip


def exit_code(verdicts: Sequence[Verdict]) -> Literal[0, 1, 3, 4]:
    """Give the exit code of a run: 1 failed, 3 over budget, 4 inconclusive or not run, 0 all ship."""
    found = {verdict.verdict for verdict in verdicts}
    return 1 if "failed" in found else 3 if "do not ship" in found else 4 if found - {"ship"} else 0


def accuracy_levels(budgets: Budgets, scored: Mapping[str, Scored], reference: Scored) -> dict[str, float | None]:
    """Give the confidence at which each candidate's accuracy is judged, so that the budget's holds for all together.

    Candidates that were not measured are not compared and do not count.
    """
    budget = budgets.accuracy
    if budget is None:
        return dict.fromkeys(scored)
    held = [name for name, found in scored.items() if _judged(budget, found, reference, budget.confidence)]

    def passes(i: int, level: float) -> bool:
        found = _judged(budget, scored[held[i]], reference, level)
        return found is not None and found.verdict == "ship"

    levels = holm(len(held), budget.confidence, passes)
    return dict.fromkeys(scored) | dict(zip(held, levels, strict=True))


def tasks_of(report: Report, subject: str) -> dict[str, TaskScore]:
    """Give the tasks of one subject by name."""
    return {found.task: found for found in report.tasks if found.subject.name == subject}


def budget_name(budget: AccuracyBudget) -> str:
    """Name the accuracy check: "exact_match loss", or "orders: bleu loss" of a task."""
    return f"{budget.task}: {budget.metric} loss" if budget.task else f"{budget.metric} loss"


def _accuracy_check(budget: AccuracyBudget, scored: Scored, reference: Scored, level: float) -> Check:
    name = budget_name(budget)
    found = _judged(budget, scored, reference, level)
    if found is None:
        return _unmeasured(name, budget.max_loss)
    low, high = _finite(found.low, found.high)
    return Check(
        budget=name, limit=budget.max_loss, value=found.loss, low=low, high=high, verdict=found.verdict,
        reason=_accuracy_reason(budget, found, level),
    )  # fmt: skip


def _judged(budget: AccuracyBudget, scored: Scored, reference: Scored, level: float) -> NonInferiority | None:
    """Hold a candidate's loss against the margin at one-sided confidence `level`; None where it was not measured."""
    if budget.task is not None:
        ours, theirs = scored.tasks.get(budget.task), reference.tasks.get(budget.task)
        return task_loss(ours, theirs, budget.metric, budget.max_loss, level) if ours and theirs else None
    accuracy, before = scored.accuracy, reference.accuracy
    if accuracy is None or before is None:
        return None
    if accuracy.workload != before.workload:
        raise DataError(
            f"{accuracy.subject.name} and {before.subject.name} were scored on other rows; score both on the same"
        )
    if budget.metric == "exact_match":
        exact, was_exact = ([row.exact for row in side.rows] for side in (accuracy, before))
        return non_inferiority(exact, was_exact, margin=budget.max_loss, confidence=level)
    return non_inferiority_f1(_slots(accuracy), _slots(before), margin=budget.max_loss, confidence=level)


def task_loss(ours: TaskScore, theirs: TaskScore, metric: str, margin: float, level: float) -> NonInferiority:
    """Judge the loss of a task's metric against the reference. Raises DataError where the rows or metrics differ."""
    if ours.workload != theirs.workload:
        raise DataError(
            f"task {ours.task!r}: {ours.subject.name} and {theirs.subject.name} were scored on other rows; score both "
            "on the same"
        )
    if metric not in ours.figures or metric not in theirs.figures:
        raise DataError(f"task {ours.task!r} was not scored by {metric}; found {', '.join(ours.figures)}")
    after, before = ([row.scores[metric] for row in side.rows] for side in (ours, theirs))
    found = METRICS[ours.kind].get(metric)
    if found is None or not found.relative:
        return non_inferiority(after, before, margin=margin, confidence=level)
    # lower is better, in nats
    risen = non_inferiority_t(after, before, margin=math.log1p(margin), confidence=level)
    loss, low, high = _rise(min(MOST_NATS, risen.loss)), _rise(risen.low), _rise(risen.high)
    return replace(risen, loss=loss, low=low, high=high, margin=margin)


def _rise(nats: float) -> float:
    """Give a difference of nats as a relative rise; what is too large for a float, and no bound at all, as infinite."""
    return math.expm1(nats) if -math.inf < nats <= MOST_NATS else math.copysign(math.inf, nats)


def _slots(accuracy: Accuracy) -> list[SlotCounts]:
    counts = []
    for number, row in enumerate(accuracy.rows):
        if row.slot_true_positives is None or row.slot_predicted is None or row.slot_gold is None:
            raise DataError(
                f"row {number} of {accuracy.subject.name} has no slot counts; slot_f1 needs targets that are JSON "
                "objects and outputs of every row (generate_rows=None)"
            )
        counts.append(SlotCounts(row.slot_true_positives, row.slot_predicted, row.slot_gold))
    return counts


def _accuracy_reason(budget: AccuracyBudget, found: NonInferiority, level: float) -> str:
    unit = "%" if budget.metric == "perplexity" else " points"
    verb = "rises" if budget.metric == "perplexity" else "falls"
    corrected = "" if math.isclose(level, budget.confidence) else f", which is {budget.confidence:.0%} for all together"
    said = (
        f"{_named(budget)} {verb} by {_points(found.loss)}{unit} ({_bounds(found)} at {100 * level:.3g}% on either "
        f"side{corrected}, {found.n_rows} row{'s' if found.n_rows > 1 else ''})"
    )
    limit = f"{_points(found.margin)}{unit} allowed"
    if found.verdict == "ship":
        return f"{said}, below the {limit}."
    if found.verdict == "do not ship":
        return f"{said}, above the {limit}."
    needed = "no number of rows would decide" if found.n_rows > 1 else "one row tells no spread"
    if found.rows_needed:
        needed = f"about {float(f'{found.rows_needed:.2g}'):,.0f} rows would decide"
    return f"{said}, which does not tell on which side of the {limit} it is; {needed}."


def _timing_check(figure: str, q: int, limit: float, latency: Latency | None) -> Check:
    """Hold a percentile against its limit at every prompt length; the worst answer counts.

    Nothing is decided on a busy machine, by one run, or by fewer generations than tell.
    """
    name = f"{figure} p{q}"
    if latency is None:
        return _unmeasured(name, limit)
    made = [_case_check(name, figure, q, limit, case, latency.load) for case in latency.cases]
    return max(made, key=lambda check: (ORDER.index(check.verdict), check.value))


def _case_check(name: str, figure: str, q: int, limit: float, case: LatencyCase, load: Load) -> Check:
    found, floor, groups = case_interval(case, figure, q), noise_floor(case, figure), waits(case, figure)
    alone = _decided(found, limit)
    spread = found.value * (floor or 0.0)
    least = max(0.0, found.value - spread)  # no wait is below nothing
    found = Interval(found.value, min(found.low, least), max(found.high, found.value + spread))
    chance = f"; runs differ by {floor:.1%} by chance" if floor is not None else ""
    said = (
        f"{name} is {found.value:.3g} ms ({_range(found)} at 95% on either side, {len(groups)} generations, prompts of "
        f"{case.prompt_tokens} tokens{chance})"
    )
    verdict = _decided(found, limit)
    if load.busy:
        verdict = "inconclusive"
        reason = (
            f"{said} against {limit:g} ms, but other processes used {load.others_during:.0%} of the machine; "
            "measure again when it is idle."
        )
    elif floor is None:
        verdict = "inconclusive"
        reason = f"{said} against {limit:g} ms, but one run has no noise floor; set bench.runs to 2 or more."
    elif verdict != "inconclusive":
        reason = f"{said}, {'below' if verdict == 'ship' else 'above'} {limit:g} ms."
    elif alone != "inconclusive":
        reason = f"{said}, too close to {limit:g} ms to tell from chance; more runs would narrow it."
    else:
        needed = groups_needed(groups, limit, q)
        advice = "no number of generations would decide" if needed is None else f"{needed:,} generations would decide"
        reason = f"{said}, which does not tell on which side of {limit:g} ms it is; {advice}."
    if case.steady is False:
        reason = f"{reason[:-1]}; its warm-ups never became steady."
    low, high = _finite(found.low, found.high)
    return Check(budget=name, limit=limit, value=found.value, low=low, high=high, verdict=verdict, reason=reason)


def _finite(*bounds: float) -> list[float | None]:
    return [bound if math.isfinite(bound) else None for bound in bounds]


def _decided(found: Interval, limit: float) -> Outcome:
    return "ship" if found.high < limit else "do not ship" if found.low > limit else "inconclusive"


def _bounds(found: NonInferiority) -> str:
    if math.isinf(found.high):
        return "no bound" if math.isinf(found.low) else f"{_points(found.low)} or more"
    return f"{_points(found.low)} to {_points(found.high)}"


def _range(found: Interval) -> str:
    if math.isinf(found.high):
        return "no bound" if math.isinf(found.low) else f"{found.low:.3g} or more"
    return f"{found.high:.3g} or less" if math.isinf(found.low) else f"{found.low:.3g} to {found.high:.3g}"


def _bytes_check(name: str, limit: float, n_bytes: int | None, what: str) -> Check:
    if n_bytes is None:
        return _unmeasured(name, limit)
    value = n_bytes / 1e6
    over = value > limit
    return Check(
        budget=name, limit=limit, value=value, verdict="do not ship" if over else "ship",
        reason=f"{name}: {what} {value:.1f} MB, {'above' if over else 'within'} {limit:g} MB.",
    )  # fmt: skip


def _unmeasured(name: str, limit: float) -> Check:
    return Check(
        budget=name,
        limit=limit,
        value=None,
        verdict="inconclusive",
        reason=f"{name} was not measured on this candidate.",
    )


def _named(budget: AccuracyBudget) -> str:
    if budget.task is None:
        return {"exact_match": "Exact match", "slot_f1": "Slot F1"}[budget.metric]
    titles = {name: found.title for kind in METRICS.values() for name, found in kind.items()}
    return f"{titles.get(budget.metric, budget.metric)} of {budget.task}"


def _points(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".")
