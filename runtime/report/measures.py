"""Figures from raw samples: what each column of the report is computed from. Nothing is written for people here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from edgetune.runtime import clustered, statistics
from edgetune.runtime.evidence import Accuracy, Check, Latency, LatencyCase, Report, RowScore, Seam
from edgetune.runtime.metrics import SlotCounts
from edgetune.runtime.percentiles import percentile_bounds

LEVEL = 0.95  # of intervals that no budget names, two-sided
PERCENTILES = (50, 90, 95, 99)
FEW_TEXTS = 20  # fewer have no interval: resampled they tell too little of others
KL = {"kl": "mean", "kl_p50": "p50", "kl_p99": "p99"}  # column -> what of the divergence of all answer tokens


class Figure(NamedTuple):
    """A value and, where it has one, its interval. None where nothing was measured."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n_rows: int | None = None  # that it is of, where that may be fewer than were scored


class Judged(NamedTuple):
    """The accuracy budget, or its defaults where the recipe judges no accuracy."""

    metric: str
    confidence: float
    max_loss: float | None


def accuracy_budget(report: Report) -> Judged:
    """Read the accuracy budget from the recipe; of one that judges a task, only the confidence."""
    found = (report.recipe.get("budgets") or {}).get("accuracy") or {}
    if found.get("task"):
        return Judged("exact_match", found.get("confidence", LEVEL), None)
    return Judged(found.get("metric", "exact_match"), found.get("confidence", LEVEL), found.get("max_loss"))


def paired(score: Accuracy, reference: Accuracy) -> bool:
    """Say whether two measurements scored the same rows."""
    return score.workload == reference.workload and len(score.rows) == len(reference.rows)


def accuracy_figures(
    score: Accuracy, reference: Accuracy, budget: Judged, checks: Sequence[Check] = (), *, seed: int = 0
) -> dict[str, Figure]:
    """Give the accuracy columns of one subject, in percent, points, rows and nats.

    The loss takes its bounds from the verdict's own check where there is one, so that page and verdict agree.
    """
    rows, n = score.rows, len(score.rows)
    right = sum(row.exact for row in rows)
    n_tokens = sum(row.n_tokens for row in rows)
    made: dict[str, Figure] = {}
    if n:
        made["exact"] = share_interval(right, n)
    counts = [counted for row in rows if (counted := slots_of(row)) is not None]
    if any(counted.predicted + counted.gold for counted in counts):
        doubled, slots = [2 * c.true_positives for c in counts], [c.predicted + c.gold for c in counts]
        found = clustered.share_interval(doubled, slots, confidence=LEVEL)
        made["slot_f1"] = _percent(found)._replace(n_rows=len(counts))
    if score.text is not None and sum(score.text.n_tokens) > 0:
        found = clustered.mean_interval(score.text.nll, score.text.n_tokens, seed=seed, confidence=LEVEL)
        value, low, high = (math.exp(min(700.0, x)) for x in found)
        made["ppl"] = Figure(value, low, high) if len(score.text.nll) >= FEW_TEXTS else Figure(value)
    if score is reference or not n or not paired(score, reference):
        return made
    made["loss"] = _loss(score, reference, budget, checks)
    changed = statistics.flips([r.exact for r in rows], [r.exact for r in reference.rows])
    made["harmful"], made["beneficial"] = Figure(changed.harmful), Figure(changed.beneficial)
    kl = [row.kl for row in rows if row.kl is not None]
    tokens = [row.kl_tokens for row in rows if row.kl_tokens is not None]
    agree = [row.n_agree for row in rows if row.n_agree is not None]
    if len(kl) == n:
        made["kl"] = Figure(sum(kl) / n_tokens)
    if len(tokens) == n:  # evidence of an earlier version has sums only
        spread = clustered.token_intervals(tokens, seed=seed, confidence=LEVEL)
        made |= {key: _bounded(spread[name]) for key, name in KL.items()}
        made["kl_max"] = Figure(spread["max"].value)
    if len(agree) == n:
        found = clustered.share_interval(agree, [row.n_tokens for row in rows], confidence=LEVEL)
        made["agree"] = _percent(found)
        parted = [[row.first_divergence + 1.0] for row in rows if row.first_divergence is not None]
        made["alike"] = share_interval(n - len(parted), n)
        if parted:
            made["parts_at"] = percentile_figure(parted, 50)._replace(n_rows=len(parted))
    return made


def perplexity(score: Accuracy) -> float | None:
    """Give the perplexity of general text, None where none was scored."""
    if score.text is None or sum(score.text.n_tokens) == 0:
        return None
    return math.exp(min(700.0, sum(score.text.nll) / sum(score.text.n_tokens)))


def share_interval(right: int, n: int) -> Figure:
    """Give a share of rows in percent, with Wilson's interval."""
    return _percent(statistics.wilson(right / n, n, LEVEL))


def change(seam: Seam, before: Seam) -> Figure:
    """Give the points of exact match that a hop gained, with Tango's interval where the rows of both are known."""
    gained = (seam.exact_match - before.exact_match) * 100
    now, was = seam.exact_rows, before.exact_rows
    if now is None or was is None or len(now) != len(was):
        return Figure(gained)
    return paired_change([row == "1" for row in now], [row == "1" for row in was])


def paired_change(now: Sequence[bool], was: Sequence[bool]) -> Figure:
    """Give the points that a share of right rows gained, with Tango's two-sided interval."""
    lost = statistics.flips(now, was)
    found = statistics.paired_difference_bounds(lost.harmful, lost.beneficial, len(now), (1 + LEVEL) / 2)
    return Figure((sum(now) - sum(was)) / len(now) * 100, -found.high * 100, -found.low * 100)


def _loss(score: Accuracy, reference: Accuracy, budget: Judged, checks: Sequence[Check]) -> Figure:
    for check in checks:
        if (
            check.budget == f"{budget.metric} loss"
            and check.value is not None
            and check.low is not None
            and check.high is not None
        ):
            return Figure(check.value * 100, check.low * 100, check.high * 100)
    pairs = list(zip(score.rows, reference.rows, strict=True))
    slots = [(mine, theirs) for c, r in pairs if (mine := slots_of(c)) and (theirs := slots_of(r))]
    if budget.metric == "slot_f1" and slots:
        differences = statistics.f1_differences([mine for mine, _ in slots], [theirs for _, theirs in slots])
    else:
        differences = np.array([float(r.exact) - float(c.exact) for c, r in pairs])
    return _percent(statistics.mean_bounds(differences, budget.confidence))


def _percent(share: statistics.Interval) -> Figure:
    return Figure(100 * share.value, 100 * share.low, 100 * share.high)


def mcnemar(report: Report) -> dict[str, float]:
    """Give each candidate's p-value of McNemar's exact test, with Holm's correction for their number."""
    found = {score.subject.name: score for score in report.accuracy}
    reference = found.get(report.reference)
    names = [v.candidate for v in report.verdicts if v.candidate in found]
    if reference is None:
        return {}
    names = [name for name in names if paired(found[name], reference)]
    exact = [[row.exact for row in found[name].rows] for name in names]
    p_values = [statistics.flips(now, [row.exact for row in reference.rows]).p_value for now in exact]
    return dict(zip(names, statistics.holm_adjusted(p_values), strict=True))


def slots_of(row: RowScore) -> SlotCounts | None:
    """Give the slot counts of a row; None where its answer was not made (`data.generated_rows`)."""
    if row.slot_true_positives is None or row.slot_predicted is None or row.slot_gold is None:
        return None
    return SlotCounts(row.slot_true_positives, row.slot_predicted, row.slot_gold)


def latency_figures(latency: Latency, cases: Sequence[dict[str, Figure]]) -> tuple[dict[str, Figure], dict[str, int]]:
    """Give the latency and memory columns of one subject, and for each timed one the place of its case.

    `cases` are the figures of each case. As in the verdict, each is that of the prompt length whose p95 is worst.
    """
    made = {
        "load": Figure(latency.load_ms),
        "first_run": Figure(latency.first_run_ms),
        "size": Figure(latency.subject.size_bytes / 1e6),
        "memory": Figure(latency.peak_rss_bytes / 1e6),
    }
    places: dict[str, int] = {}
    for judge, keys in (
        ("ttft_p95", (*_keys("ttft"), "prefill")),
        ("itl_p95", (*_keys("itl"), *_keys("tpot"), "decode")),
    ):
        held = [i for i, figures in enumerate(cases) if judge in figures]
        if held:
            worst = max(held, key=lambda i: cases[i][judge].value or 0.0)
            made |= {key: cases[worst][key] for key in keys if key in cases[worst]}
            places |= dict.fromkeys(keys, worst)
    return made, places


def percentile_figure(groups: Sequence[Sequence[float]], q: float) -> Figure:
    """Give a percentile with the two-sided interval of its order statistics; None for a bound that so few lack."""
    return _bounded(percentile_bounds(groups, q, confidence=(1 + LEVEL) / 2))


def _bounded(found: statistics.Interval) -> Figure:
    low, high = (bound if math.isfinite(bound) else None for bound in (found.low, found.high))
    return Figure(found.value, low, high)


def case_figures(case: LatencyCase) -> dict[str, Figure]:
    """Give percentiles and rates of one case, warm-up left out. Milliseconds and tokens per second."""
    kept = [g for g in case.generations if not g.warmup]
    firsts = [[g.ttft_ms] for g in kept]
    waits = [g.itl_ms for g in kept if g.itl_ms]
    means = [[sum(wait) / len(wait)] for wait in waits]
    made: dict[str, Figure] = {}
    for name, groups in (("ttft", firsts), ("itl", waits), ("tpot", means)):
        for q in PERCENTILES if groups else ():
            made[f"{name}_p{q}"] = percentile_figure(groups, q)
    if firsts and made["ttft_p50"].value:
        made["prefill"] = Figure(case.prompt_tokens / made["ttft_p50"].value * 1000)
    if waits:
        made["decode"] = Figure(sum(map(len, waits)) / sum(map(sum, waits)) * 1000)
    return made


def _keys(figure: str) -> list[str]:
    return [f"{figure}_p{q}" for q in PERCENTILES]


def bits_per_weight(manifest: dict[str, Any]) -> float | None:
    """Read bits per weight from a manifest: its scheme, else its notes. None where neither says it."""
    for part in (manifest.get("scheme"), manifest.get("notes")):
        found = (part or {}).get("bits_per_weight")
        if isinstance(found, int | float):
            return float(found)
    return None
