"""What "ship" means: each budget is held against what was measured, and the worst answer is the verdict.

Exit codes of a run: 0 where every candidate ships, 1 where any failed, else 3 where any is over a budget, else 4
where any is inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edgetune.errors import DataError
from edgetune.recipe import AccuracyBudget, Budgets
from edgetune.runtime.evidence import Accuracy, Check, Failure, Latency, Verdict
from edgetune.runtime.latency import case_interval, noise_floor
from edgetune.runtime.metrics import SlotCounts
from edgetune.runtime.statistics import Interval, NonInferiority, non_inferiority, non_inferiority_f1

# worst last
ORDER = ("ship", "inconclusive", "do not ship")


def judge(
    candidate: str,
    budgets: Budgets,
    *,
    size_bytes: int | None = None,
    accuracy: Accuracy | None = None,
    reference: Accuracy | None = None,
    latency: Latency | None = None,
    failures: Sequence[Failure] = (),
    seed: int = 0,
) -> Verdict:
    """Judge one candidate. Whatever failed makes it "failed"; a budget without its measurement is inconclusive."""
    checks = []
    if budgets.accuracy is not None:
        checks.append(_accuracy_check(budgets.accuracy, accuracy, reference, seed))
    for figure, limit in (("ttft_ms", budgets.ttft_ms_p95), ("itl_ms", budgets.itl_ms_p95)):
        if limit is not None:
            checks.append(_timing_check(figure, limit, latency, seed))
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
    """Give the exit code of a run: 1 failed, 3 over budget, 4 inconclusive, 0 all ship."""
    found = {verdict.verdict for verdict in verdicts}
    return 1 if "failed" in found else 3 if "do not ship" in found else 4 if "inconclusive" in found else 0


def _accuracy_check(budget: AccuracyBudget, accuracy: Accuracy | None, reference: Accuracy | None, seed: int) -> Check:
    name = f"{budget.metric} loss"
    if accuracy is None or reference is None:
        return _unmeasured(name, budget.max_loss)
    if accuracy.workload != reference.workload:
        raise DataError(
            f"{accuracy.subject.name} and {reference.subject.name} were scored on other rows; score both on the same"
        )
    if budget.metric == "exact_match":
        found = non_inferiority(
            [row.exact for row in accuracy.rows], [row.exact for row in reference.rows],
            margin=budget.max_loss, confidence=budget.confidence,
        )  # fmt: skip
    else:
        ours, theirs = _slots(accuracy), _slots(reference)
        found = non_inferiority_f1(ours, theirs, margin=budget.max_loss, confidence=budget.confidence, seed=seed)
    return Check(
        budget=name, limit=budget.max_loss, value=found.loss, low=found.low, high=found.high, verdict=found.verdict,
        reason=_accuracy_reason(budget, found),
    )  # fmt: skip


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


def _accuracy_reason(budget: AccuracyBudget, found: NonInferiority) -> str:
    said = (
        f"{_named(budget.metric)} falls by {_points(found.loss)} points ({_points(found.low)} to "
        f"{_points(found.high)} at {budget.confidence:.0%} on either side, {found.n_rows} rows)"
    )
    limit = f"{_points(found.margin)} points allowed"
    if found.verdict == "ship":
        return f"{said}, below the {limit}."
    if found.verdict == "do not ship":
        return f"{said}, above the {limit}."
    needed = f"about {found.rows_needed} rows would decide" if found.rows_needed else "no number of rows would decide"
    return f"{said}, which does not tell on which side of the {limit} it is; {needed}."


def _timing_check(figure: str, limit: float, latency: Latency | None, seed: int) -> Check:
    """Hold the worst prompt length's p95 against its limit; a busy machine decides nothing."""
    name = f"{figure} p95"
    if latency is None:
        return _unmeasured(name, limit)
    case, found = max(
        ((case, case_interval(case, figure, 95, seed=seed)) for case in latency.cases), key=lambda pair: pair[1].value
    )
    n = sum(not g.warmup for g in case.generations)
    said = (
        f"{name} is {found.value:.3g} ms ({found.low:.3g} to {found.high:.3g}, {n} generations, prompts of "
        f"{case.prompt_tokens} tokens)"
    )
    floor = noise_floor(case, figure)
    if floor is not None:
        spread = found.value * floor
        found = Interval(found.value, min(found.low, found.value - spread), max(found.high, found.value + spread))
        said = f"{said[:-1]}; runs differ by {floor:.1%} by chance)"
    verdict: Literal["ship", "do not ship", "inconclusive"]
    if latency.load.busy:
        verdict = "inconclusive"
        reason = (
            f"{said} against {limit:g} ms, but other processes used {latency.load.others_during:.0%} of the machine; "
            "measure again when it is idle."
        )
    elif found.high < limit:
        verdict, reason = "ship", f"{said}, below {limit:g} ms."
    elif found.low > limit:
        verdict, reason = "do not ship", f"{said}, above {limit:g} ms."
    else:
        verdict = "inconclusive"
        reason = f"{said}, too close to {limit:g} ms to tell; more repeats would narrow it."
    if case.steady is False:
        reason = f"{reason[:-1]}; its warm-ups never became steady."
    return Check(
        budget=name, limit=limit, value=found.value, low=found.low, high=found.high, verdict=verdict, reason=reason
    )


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


def _named(metric: str) -> str:
    return {"exact_match": "Exact match", "slot_f1": "Slot F1"}[metric]


def _points(share: float) -> str:
    return f"{100 * share:.2f}".rstrip("0").rstrip(".")
