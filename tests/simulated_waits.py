"""Waits of generations whose true percentile is known, and how often its bounds hold.

`benchmarks/intervals.py` runs them many times, the tests a few.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.percentiles import percentile_bounds

Floats = NDArray[np.float64]
TOKENS, Q = 32, 95  # waits of a generation; the percentile that is held to a limit


def _jitter(rng: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Waits around 10 ms with a heavy tail: 3 % are 2.5 times as long or, by a Pareto law, longer."""
    far = np.where(rng.random(shape) < 0.03, rng.pareto(2, shape) + 2.5, 1.0)
    return 10 * rng.lognormal(0, 0.1, shape) * far


def first_tokens(rng: np.random.Generator, n: int) -> Floats:
    """One wait a generation."""
    return _jitter(rng, (n, 1))


def alone(rng: np.random.Generator, n: int) -> Floats:
    """Tokens that have nothing in common."""
    return _jitter(rng, (n, TOKENS))


def drifting(rng: np.random.Generator, n: int) -> Floats:
    """Each generation is as fast as its moment: a factor that all its tokens share."""
    return _jitter(rng, (n, TOKENS)) * rng.lognormal(0, 0.15, (n, 1))


def slowed(rng: np.random.Generator, n: int) -> Floats:
    """Three generations of ten are 1.4 times as slow."""
    return _jitter(rng, (n, TOKENS)) * np.where(rng.random((n, 1)) < 0.3, 1.4, 1.0)


def disturbed(rng: np.random.Generator, n: int) -> Floats:
    """Generations differ in how often a token waits: most never, some one time in four."""
    far = rng.random((n, TOKENS)) < rng.beta(0.5, 9, (n, 1))
    return 10 * rng.lognormal(0, 0.05, (n, TOKENS)) * np.where(far, rng.pareto(2, far.shape) + 2, 1.0)


def rare(rng: np.random.Generator, n: int) -> Floats:
    """Six generations of a hundred are twice as slow, and hold the whole tail. Ten mostly show none of them."""
    return 10 * rng.lognormal(0, 0.1, (n, TOKENS)) * np.where(rng.random((n, 1)) < 0.06, 2.0, 1.0)


KINDS: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "first_tokens": first_tokens, "alone": alone, "drifting": drifting, "slowed": slowed, "disturbed": disturbed,
}  # fmt: skip


@cache
def true_percentile(kind: Callable[[np.random.Generator, int], Floats]) -> float:
    """The percentile of very many generations."""
    return float(np.percentile(kind(np.random.default_rng(0), 400_000), Q))


class Trial(NamedTuple):
    """Bounds of one trial, infinite where there is none."""

    low: float
    high: float


def trials(kind: Callable[[np.random.Generator, int], Floats], n: int, *, times: int, seed: int) -> list[Trial]:
    """Draw `n` generations, `times` times, and bound their percentile."""
    rng = np.random.default_rng(seed)
    return [Trial(*percentile_bounds(kind(rng, n).tolist(), Q)[1:]) for _ in range(times)]


def false_passes(kind: Callable[[np.random.Generator, int], Floats], found: list[Trial]) -> float:
    """Share of trials in which a percentile at the limit is taken for one below it."""
    return sum(one.high < true_percentile(kind) for one in found) / len(found)


def false_stops(kind: Callable[[np.random.Generator, int], Floats], found: list[Trial]) -> float:
    """Share of trials in which a percentile at the limit is taken for one above it."""
    return sum(one.low > true_percentile(kind) for one in found) / len(found)
