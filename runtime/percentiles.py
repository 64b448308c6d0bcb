"""Percentiles of waits, with bounds that hold for whatever distribution the waits have.

An order statistic bounds a percentile by counting alone: of n independent samples, how many lie below the percentile q
is binomial (n, q). So no bound is finer than the samples can show: of fewer than 59 none lies above p95 with 95 %
confidence, however fast all of them were. Tokens of one generation share its disturbances, and are worth fewer samples
than there are (`effective_size`).

Letters: N samples in k groups of m each, n what they are worth, q the percentile as a share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.statistics import Interval

Floats = NDArray[np.float64]
SURE = 0.9  # that tokens of a generation hang together no more than is taken
MOST = 100_000  # samples, beyond which none are called for


def percentile_bounds(groups: Sequence[Sequence[float]], q: float, *, confidence: float = 0.95) -> Interval:
    """Give a percentile of all samples with one-sided bounds, each at `confidence`; infinite where none exists.

    `groups` are the waits of each generation, `q` is in percent. Raises ValueError where there is no sample.
    """
    arrays = _arrays(groups)
    samples = np.sort(np.concatenate(arrays))
    value, n = float(np.percentile(samples, q)), math.floor(effective_size(arrays, q))
    below, above = _ranks(n, q / 100, confidence)
    low = samples[math.floor((below - 1) / n * len(samples))] if below else -math.inf
    high = samples[math.ceil(above / n * len(samples)) - 1] if above <= n else math.inf
    return Interval(value, min(value, float(low)), max(value, float(high)))


def groups_needed(groups: Sequence[Sequence[float]], limit: float, q: float, *, confidence: float = 0.95) -> int | None:
    """Give how many such groups would tell on which side of `limit` the percentile is, were the truth what was seen.

    None where more than MOST samples would be needed.
    """
    from scipy.stats import binom

    arrays = _arrays(groups)
    share = float(np.mean(np.concatenate(arrays) < limit))
    n = np.arange(1, MOST)
    ships = binom.cdf(np.floor(share * n + 1e-9) - 1, n, q / 100) >= confidence
    breaks = binom.cdf(np.ceil(share * n - 1e-9), n, q / 100) <= 1 - confidence
    undecided = np.flatnonzero(~(ships | breaks))
    needed = int(n[undecided[-1]]) + 1 if len(undecided) else 1
    return math.ceil(needed * len(arrays) / effective_size(arrays, q)) if needed < MOST else None


def effective_size(groups: Sequence[Floats], q: float) -> float:
    """Give how many independent samples those of all groups are worth at a percentile: N / (1 + (m - 1) ICC), Kish's
    design effect, with m weighted by itself.

    The intra-class correlation is that of lying above the percentile.
    """
    samples = np.concatenate(groups)
    limit = np.percentile(samples, q)
    above = np.array([float((group > limit).sum()) for group in groups])
    return worth(above, np.array([float(len(group)) for group in groups]))


def worth(hits: Floats, sizes: Floats) -> float:
    """Give how many independent samples those of k groups are worth for the share of hits among them; [k] each.

    The intra-class correlation of a hit is that of a one-way analysis of variance, at the upper end of what the groups
    allow: few groups rarely show all of it. One group alone tells nothing of others and is worth one sample.
    """
    k, total = len(sizes), float(sizes.sum())
    if k == 1 or total == k:
        return float(k)
    return total / (1 + (float(np.sum(sizes**2)) / total - 1) * _correlation(hits, sizes))


def _correlation(hits: Floats, sizes: Floats) -> float:
    """Give the one-sided upper bound of the intra-class correlation of a hit, at SURE."""
    from scipy.stats import f

    k, total = len(sizes), float(sizes.sum())
    shares = hits / sizes
    between = float(np.sum(sizes * (shares - hits.sum() / total) ** 2) / (k - 1))
    within = float(np.sum(hits * (1 - shares)) / (total - k))
    m = (total - np.sum(sizes**2) / total) / (k - 1)
    least = float(f.ppf(1 - SURE, k - 1, total - k)) * within  # of `between`, were there no correlation
    return max(0.0, float((between - least) / (between + (m - 1) * least))) if between > 0 else 0.0


def _ranks(n: int, q: float, confidence: float) -> tuple[int, int]:
    """Give the ranks of n sorted samples, from 1, that lie below and above the percentile; 0 and n + 1 are none."""
    from scipy.stats import binom

    return int(binom.ppf(1 - confidence, n, q)), int(binom.ppf(confidence, n, q)) + 1


def _arrays(groups: Sequence[Sequence[float]]) -> list[Floats]:
    arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    if not arrays:
        raise ValueError("a percentile needs at least one sample")
    return arrays
