"""Bounds of percentiles, held to scipy's and to waits whose percentile is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import quantile_test

from edgetune.runtime.percentiles import effective_size, groups_needed, percentile_bounds
from tests.simulated_waits import KINDS, false_passes, false_stops, trials


@pytest.mark.parametrize(("n", "q"), [(5, 50), (9, 50), (59, 95), (100, 95), (400, 95), (400, 99)])
def test_the_bounds_are_those_of_scipys_quantile_test(n: int, q: float) -> None:
    waits = np.random.default_rng(n).exponential(10, n)
    found = percentile_bounds([[wait] for wait in waits], q, confidence=0.95)
    above = quantile_test(waits, p=q / 100, alternative="less").confidence_interval(0.95).high
    below = quantile_test(waits, p=q / 100, alternative="greater").confidence_interval(0.95).low
    assert (found.low, found.high) == (pytest.approx(below), pytest.approx(above))
    assert found.value == pytest.approx(np.percentile(waits, q))


@pytest.mark.parametrize(("q", "enough"), [(50, 5), (95, 59), (99, 299)])
def test_fewer_samples_than_tell_have_no_upper_bound(q: float, enough: int) -> None:
    waits = [[float(wait)] for wait in range(enough)]
    assert percentile_bounds(waits[1:], q).high == math.inf
    assert percentile_bounds(waits, q).high == enough - 1
    assert groups_needed(waits[:3], 1000.0, q) == enough  # all that were seen lie below the limit
    with pytest.raises(ValueError, match="at least one sample"):
        percentile_bounds([[]], q)


def test_generations_that_would_decide_are_those_that_decide() -> None:
    seen = [[1.0]] * 97 + [[3.0]] * 3
    needed = groups_needed(seen, 2.0, 95)
    assert needed is not None
    for n, bounded in ((needed - 30, False), (needed + 30, True)):
        n_slow = math.ceil(0.03 * n)
        assert (percentile_bounds([[1.0]] * (n - n_slow) + [[3.0]] * n_slow, 95).high < 2.0) is bounded
    assert groups_needed([[1.0]] * 95 + [[3.0]] * 5, 2.0, 95) is None
    assert groups_needed([[3.0]] * 10, 2.0, 95) == 1  # enough to break it


def test_tokens_of_a_generation_count_for_fewer_samples_than_they_are() -> None:
    rng = np.random.default_rng(0)
    alone = list(rng.lognormal(0, 0.1, (40, 32)))
    slow = [group * factor for group, factor in zip(alone, rng.permutation([1.0] * 36 + [2.0] * 4), strict=True)]
    assert 40 * 32 / 3 < effective_size(alone, 95) <= 40 * 32
    assert effective_size(slow, 90) < 60  # generations are slow or not, whole
    assert effective_size(slow[:1], 95) == 1
    assert effective_size([group[:1] for group in alone], 95) == 40
    uneven = [group[: 4 + i] for i, group in enumerate(alone[:28])]
    assert 1 <= effective_size(uneven, 95) <= sum(map(len, uneven))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [10, 59])
def test_a_percentile_at_the_limit_rarely_passes(kind: str, n: int) -> None:
    found = trials(KINDS[kind], n, times=300, seed=1)
    assert false_passes(KINDS[kind], found) < 0.09  # 5 % and three standard errors
    assert false_stops(KINDS[kind], found) < 0.12
    if n == 10 and kind == "first_tokens":
        assert all(one.high == math.inf for one in found)
    if n == 59:
        assert all(one.high < math.inf for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_percentile_at_the_limit_rarely_passes_in_many_trials(kind: str) -> None:
    for n in (10, 59, 100):
        found = trials(KINDS[kind], n, times=2000, seed=3)
        assert false_passes(KINDS[kind], found) <= 0.06
