"""Figures of tokens and slots, with intervals that know that those of one row hang together.

Letters: n rows; a row has `wholes` tokens or slots, of which `parts` are what is counted. n or k groups as in
`percentiles.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edgetune.runtime.percentiles import Floats, percentile_bounds, worth
from edgetune.runtime.statistics import Interval, wilson

N_RESAMPLES = 1000


def share_interval(parts: Sequence[float], wholes: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Give sum(parts) / sum(wholes) over rows, [n] each, with Wilson's score interval at what all are worth.

    What they are worth is their number over the design effect, so Korn and Graubard (Survey Methodology 24:193, 1998)
    bound a share of a clustered sample. Where no row lacks anything, or none has anything, nothing tells how it comes
    in rows: each row is worth one. Raises ValueError where `wholes` is zero in every row.
    """
    hits, sizes = (np.asarray(side, dtype=np.float64)[np.asarray(wholes) > 0] for side in (parts, wholes))
    if not len(sizes):
        raise ValueError("a share needs a row that has something to count")
    share = float(hits.sum() / sizes.sum())
    n = worth(hits, sizes) if 0 < share < 1 else float(len(sizes))
    return wilson(share, n, confidence)


def mean_interval(sums: Sequence[float], sizes: Sequence[float], *, seed: int, confidence: float = 0.95) -> Interval:
    """Give sum(sums) / sum(sizes) over rows, [n] each, with a bootstrap-t interval over whole rows.

    Its pivot is divided by its own standard error (Efron and Tibshirani, An Introduction to the Bootstrap, 12.5), so
    it holds for the skew sums of divergences, where percentiles of the mean come out too narrow. Raises ValueError
    where `sizes` is zero in every row.
    """
    tops, bottoms = np.asarray(sums, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    n = len(tops)
    if not bottoms.any():
        raise ValueError("a mean needs a row to divide by")
    value = float(tops.sum() / bottoms.sum())
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES).astype(np.float64)
    weights = weights[weights @ bottoms > 0]
    drawn, error = _ratio(weights, tops, bottoms)
    (_, own) = _ratio(np.ones((1, n)), tops, bottoms)
    pivots = (drawn - value)[error > 0] / error[error > 0]
    if not len(pivots):
        return Interval(value, value, value)
    high, low = np.quantile(pivots, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, value - float(low * own[0]), value - float(high * own[0]))


def _ratio(weights: Floats, tops: Floats, bottoms: Floats) -> tuple[Floats, Floats]:
    """Give the ratio of each resample, a row of `weights` [R, n], and its standard error by linearization."""
    n, below = weights.shape[1], weights @ bottoms
    ratio = weights @ tops / below
    squares = weights @ tops**2 - 2 * ratio * (weights @ (tops * bottoms)) + ratio**2 * (weights @ bottoms**2)
    return ratio, np.sqrt(np.maximum(squares, 0.0) * n / max(n - 1, 1)) / below


def token_intervals(groups: Sequence[Sequence[float]], *, seed: int, confidence: float = 0.95) -> dict[str, Interval]:
    """Give mean, median and p99 of all tokens' values, each with an interval over whole rows, and their max.

    The mean's is a bootstrap-t (`mean_interval`), those of the quantiles are order statistics (`percentile_bounds`),
    infinite where so few tokens have no bound. No interval of a maximum holds: its own is the value itself.
    """
    rows = [group for group in groups if len(group)]
    if not rows:
        raise ValueError("an interval needs at least one value")
    largest = max(map(max, rows))
    return {
        "mean": mean_interval([math.fsum(row) for row in rows], list(map(len, rows)), seed=seed, confidence=confidence),
        "p50": percentile_bounds(rows, 50, confidence=(1 + confidence) / 2),
        "p99": percentile_bounds(rows, 99, confidence=(1 + confidence) / 2),
        "max": Interval(largest, largest, largest),
    }
