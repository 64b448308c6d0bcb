"""The report's part on what compression left of the fine-tune."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from edgetune.runtime.evidence import Accuracy, Report
from edgetune.runtime.report.columns import DASH, number
from edgetune.runtime.report.forgetting import BASE


@dataclass(frozen=True)
class Kept:
    """One candidate between the base and the model that was trained."""

    candidate: str
    away: str  # KL(trained || candidate), nats a token
    base_away: str  # KL(trained || base)
    left: str  # percent of the way from the base that is left
    small: str  # percent of the update's weights below half a quantization step, mean of the layers
    worst: str  # layer with the most, and its percentage
    source: str


def kept(report: Report) -> Iterator[Kept]:
    """Compare each candidate with the base, both against what was trained, on the held-out rows."""
    scores = {found.subject.name: (i, found) for i, found in enumerate(report.accuracy)}
    base = divergence(scores[BASE][1]) if BASE in scores else None
    if report.training is None or not base:
        return
    updates = {one.candidate: (i, one) for i, one in enumerate(report.updates)}
    for verdict in report.verdicts:
        name = verdict.candidate
        away = divergence(scores[name][1]) if name in scores else None
        if away is None:
            continue
        small = worst = DASH
        source = f"accuracy[{scores[name][0]}].rows[].kl, accuracy[{scores[BASE][0]}].rows[].kl"
        if name in updates and updates[name][1].layers:
            i, update = updates[name]
            layer, most = max(update.layers.items(), key=lambda one: one[1])
            small = f"{number(100 * sum(update.layers.values()) / len(update.layers), 1)} %"
            worst, source = f"{layer}: {number(100 * most, 1)} %", f"{source}, updates[{i}].layers"
        yield Kept(
            name, number(away, 4), number(base, 4), f"{number(100 * (1 - away / base), 1)} %", small, worst, source
        )


def divergence(found: Accuracy) -> float | None:
    """Give KL(reference || subject), nats a target token. None where a row has none, or no number."""
    sums = [row.kl for row in found.rows if row.kl is not None]
    n_tokens = sum(row.n_tokens for row in found.rows)
    away = sum(sums) / n_tokens if len(sums) == len(found.rows) and n_tokens else math.nan
    return away if math.isfinite(away) else None
