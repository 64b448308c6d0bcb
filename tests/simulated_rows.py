"""Rows whose true divergence, agreement and slot F1 are known, and how often the intervals that tables show hold them.

`benchmarks/intervals.py` runs them many times, the tests a few.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.clustered import share_interval, token_intervals
from edgetune.runtime.percentiles import percentile_bounds
from edgetune.runtime.report.measures import LEVEL
from edgetune.runtime.statistics import Interval
from tests.simulated import slot_rows
from tests.simulated_waits import KINDS

Floats = NDArray[np.float64]
MANY = 200_000  # rows that tell the truth
TOKENS = (8, 40)  # of an answer
FIGURES = ("kl", "kl_p50", "kl_p99", "agree", "slot_f1")


def divergences(rng: np.random.Generator, n: int) -> list[Floats]:
    """KL of each answer token, row by row: most are near 0, few are large, and rows differ in how hard they are."""
    sizes, scale = rng.integers(*TOKENS, n), rng.lognormal(0, 0.8, n)
    tokens = 0.01 * rng.gamma(0.3, 1, int(sizes.sum())) * np.repeat(scale, sizes)
    return np.split(tokens, np.cumsum(sizes)[:-1])


def agreements(rng: np.random.Generator, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens that rank the same first, and all tokens, of each row; rows differ in how many do not."""
    sizes = rng.integers(*TOKENS, n)
    return sizes - rng.binomial(sizes, rng.beta(0.5, 20, n)), sizes


def slots(rng: np.random.Generator, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Twice the right slots, and the predicted and gold ones, of each row."""
    counts = slot_rows(rng, n)[0]
    return 2 * counts[:, 0], counts[:, 1:].sum(1)


@cache
def truths() -> dict[str, float]:
    """Each figure of very many rows."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate(divergences(rng, MANY))
    found = {"kl": tokens.mean(), "kl_p50": np.quantile(tokens, 0.5), "kl_p99": np.quantile(tokens, 0.99)}
    for name, draw in (("agree", agreements), ("slot_f1", slots)):
        top, bottom = draw(rng, MANY)
        found[name] = top.sum() / bottom.sum()
    return {name: float(value) for name, value in found.items()}


def shown(rng: np.random.Generator, n: int, *, seed: int) -> dict[str, Interval]:
    """Draw `n` rows and give each figure with the interval that the report shows."""
    spread = token_intervals(divergences(rng, n), seed=seed, confidence=LEVEL)
    found = {"kl": spread["mean"], "kl_p50": spread["p50"], "kl_p99": spread["p99"]}
    for name, draw in (("agree", agreements), ("slot_f1", slots)):
        top, bottom = draw(rng, n)
        found[name] = share_interval(top.tolist(), bottom.tolist(), confidence=LEVEL)
    return found


def coverage(n: int, *, times: int, seed: int) -> dict[str, float]:
    """Share of trials whose interval holds the truth, of each figure of FIGURES."""
    rng, truth = np.random.default_rng(seed), truths()
    found = [shown(rng, n, seed=trial) for trial in range(times)]
    return {name: _held([one[name] for one in found], truth[name]) for name in FIGURES}


def waits_coverage(kind: str, n: int, q: int, *, times: int, seed: int) -> float:
    """Share of trials whose two-sided interval holds the percentile `q` of waits."""
    rng = np.random.default_rng(seed)
    found = [percentile_bounds(KINDS[kind](rng, n).tolist(), q, confidence=(1 + LEVEL) / 2) for _ in range(times)]
    return _held(found, true_wait(kind, q))


@cache
def true_wait(kind: str, q: int) -> float:
    """The percentile of very many generations."""
    return float(np.percentile(KINDS[kind](np.random.default_rng(0), 400_000), q))


def _held(found: list[Any], truth: float) -> float:
    return sum(one.low <= truth <= one.high for one in found) / len(found)
