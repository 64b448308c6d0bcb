"""Figures of tokens and slots, whose intervals hold although those of one row hang together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from edgetune.runtime.clustered import mean_interval, share_interval, token_intervals
from tests import simulated_rows


def test_divergence_of_tokens_has_mean_quantiles_and_intervals_over_rows() -> None:
    rng = np.random.default_rng(8)
    rows = [rng.exponential(0.1, rng.integers(1, 30)).tolist() for _ in range(150)]
    found = token_intervals([*rows, []], seed=0)
    tokens = np.concatenate(rows)
    assert found["mean"].value == pytest.approx(tokens.mean())
    assert found["p50"].value == pytest.approx(np.quantile(tokens, 0.5))
    assert found["p99"].value == pytest.approx(np.quantile(tokens, 0.99))
    assert found["max"] == (tokens.max(),) * 3
    for name in ("mean", "p50", "p99"):
        assert found[name].low < found[name].value < found[name].high
    assert found == token_intervals(rows, seed=0) != token_intervals(rows, seed=1)
    assert token_intervals(rows[:3], seed=0)["p99"].high == math.inf
    with pytest.raises(ValueError, match="at least one value"):
        token_intervals([[]], seed=0)


def test_a_share_of_rows_of_one_has_wilsons_interval() -> None:
    found = share_interval([1.0] * 45 + [0.0] * 5, [1.0] * 50)
    wilson = binomtest(45, 50).proportion_ci(0.95, method="wilson")
    assert found == (0.9, pytest.approx(wilson.low), pytest.approx(wilson.high))


def test_what_no_row_lacks_is_bounded_by_the_number_of_rows() -> None:
    found = share_interval([20.0] * 60 + [0.0], [20.0] * 60 + [0.0])
    wilson = binomtest(60, 60).proportion_ci(0.95, method="wilson")
    assert found == (1.0, pytest.approx(wilson.low), pytest.approx(1.0))
    assert share_interval([0.0] * 60, [20.0] * 60).high == pytest.approx(1 - wilson.low)
    with pytest.raises(ValueError, match="something to count"):
        share_interval([0.0], [0.0])


def test_tokens_that_hang_together_count_for_fewer() -> None:
    whole = share_interval([20.0] * 50 + [0.0] * 10, [20.0] * 60)  # ten rows lack everything
    spread = share_interval([17.0] * 40 + [16.0] * 20, [20.0] * 60)  # each lacks a little
    rows = binomtest(50, 60).proportion_ci(0.95, method="wilson")
    assert whole[1:] == (pytest.approx(rows.low), pytest.approx(rows.high))
    assert spread.high - spread.low < 0.5 * (whole.high - whole.low)


def test_a_mean_has_no_spread_where_all_rows_say_the_same() -> None:
    assert mean_interval([2.0, 4.0], [1.0, 2.0], seed=0) == (2.0, 2.0, 2.0)
    assert mean_interval([2.0], [1.0], seed=0) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="divide by"):
        mean_interval([0.0], [0.0], seed=0)


def test_a_mean_of_like_rows_has_students_interval() -> None:
    from scipy.stats import t

    values = np.random.default_rng(3).normal(5, 1, 400)
    found = mean_interval(values.tolist(), [1.0] * 400, seed=0)
    half = t.ppf(0.975, 399) * values.std(ddof=1) / 20
    assert found == (pytest.approx(values.mean()), pytest.approx(values.mean() - half, rel=0.005),
                     pytest.approx(values.mean() + half, rel=0.005))  # fmt: skip


def test_intervals_of_rows_hold_what_is_true() -> None:
    found = simulated_rows.coverage(60, times=150, seed=5)
    assert min(found.values()) > 0.89  # 95 % and three standard errors
    assert simulated_rows.waits_coverage("drifting", 12, 50, times=150, seed=5) > 0.89


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 200])
def test_intervals_of_rows_hold_in_many_trials(n: int) -> None:
    assert min(simulated_rows.coverage(n, times=1000, seed=6).values()) > 0.925
