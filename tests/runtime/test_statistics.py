"""Statistics on simulated data, where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgetune.runtime.metrics import SlotCounts, micro_f1
from edgetune.runtime.statistics import (
    f1_differences,
    flips,
    holm,
    holm_adjusted,
    mean_bounds,
    non_inferiority,
    non_inferiority_f1,
    non_inferiority_t,
    paired_difference_bounds,
    rows_in_words,
    rows_needed,
)  # fmt: skip
from tests.simulated import METRICS, coverage, false_passes, slot_rows, trials


def simulated(rng: np.random.Generator, n: int, harmful: float, beneficial: float) -> tuple[np.ndarray, np.ndarray]:
    """Paired right answers: candidate, reference."""
    kind = rng.choice(4, size=n, p=[harmful, beneficial, 0.7, 0.3 - harmful - beneficial])
    return np.isin(kind, [1, 2]), np.isin(kind, [0, 2])


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "macro_f1"])  # which takes a minute
def test_intervals_hold_and_a_loss_at_the_margin_rarely_ships(metric: str) -> None:
    """The error that matters is to ship what loses as much as the margin: at most 5% of the time."""
    found = trials(metric, 200, times=300, seed=1)
    assert 0.92 < coverage(metric, found) < 0.99
    assert false_passes(found) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [200, 500])
def test_intervals_hold_in_many_trials(metric: str, n: int) -> None:
    found = trials(metric, n, times=2000, seed=3)
    assert 0.93 <= coverage(metric, found) <= 0.97
    assert false_passes(found) <= 0.05


def test_the_score_bounds_are_tangos() -> None:
    """Against the constrained likelihood of Tango (1998), maximised on a grid."""
    for b, c, n in [(9, 10, 44), (12, 2, 350), (3, 0, 40)]:
        found = paired_difference_bounds(b, c, n, 0.975)
        for delta in (found.low, found.high):
            q = np.linspace(max(0, -delta) + 1e-9, (1 - delta) / 2 - 1e-9, 400_001)  # chance of a beneficial flip
            p = q + delta
            likelihood = (b * np.log(p) if b else 0) + (c * np.log(q) if c else 0) + (n - b - c) * np.log(1 - p - q)
            best = int(np.argmax(likelihood))
            z = (b - c - n * delta) / math.sqrt(n * (p[best] + q[best] - delta**2))
            assert abs(z) == pytest.approx(1.96, abs=0.01)


def test_no_flip_at_all_is_not_certainty() -> None:
    same = [True] * 40 + [False] * 10
    few = non_inferiority(same, same, margin=0.02, confidence=0.95)
    assert (few.loss, few.verdict) == (0, "inconclusive")
    assert few.high == pytest.approx(1.645**2 / (50 + 1.645**2) + 0.5 / 50, rel=1e-3)
    assert few.rows_needed is not None
    many = non_inferiority(same * few.rows_needed, same * few.rows_needed, margin=0.02, confidence=0.95)
    assert many.verdict == "ship"


@pytest.mark.parametrize(
    ("harmful", "margin", "verdict"), [(5, 0.05, "ship"), (80, 0.05, "do not ship"), (24, 0.02, "inconclusive")]
)
def test_non_inferiority_needs_the_whole_interval_on_one_side(harmful: int, margin: float, verdict: str) -> None:
    reference = [True] * 800 + [False] * 200
    candidate = [False] * harmful + [True] * (800 - harmful) + [True] * 2 + [False] * 198
    found = non_inferiority(candidate, reference, margin=margin, confidence=0.95)
    assert found.verdict == verdict
    assert found.loss == pytest.approx((harmful - 2) / 1000)
    assert found.low < found.loss < found.high


def test_rows_needed_have_their_power() -> None:
    n = rows_needed(0.03, 0.06, 0.95, power=0.8)
    assert n is not None
    assert n == math.ceil((1.6449 + 0.8416) ** 2 * 0.06 / 0.03**2)
    rng = np.random.default_rng(3)
    shipped = 0
    for _ in range(300):
        candidate, reference = simulated(rng, n, 0.03, 0.03)
        shipped += non_inferiority(candidate, reference, margin=0.03, confidence=0.95).verdict == "ship"
    assert 0.7 < shipped / 300 < 0.9
    assert rows_needed(0.02, 0.1, 0.95, loss=0.02) is None


def test_flips_are_counted_and_tested() -> None:
    found = flips([False] * 10 + [True] * 3 + [True], [True] * 10 + [False] * 3 + [True])
    assert (found.harmful, found.beneficial) == (10, 3)
    expected = 2 * sum(math.comb(13, k) for k in range(4)) / 2**13
    assert found.p_value == pytest.approx(expected)
    assert flips([True], [True]).p_value == 1


def test_f1_differences_have_the_difference_as_their_mean() -> None:
    rng = np.random.default_rng(4)
    ours, theirs = ([SlotCounts(*map(int, row)) for row in side] for side in slot_rows(rng, 80))
    losses = f1_differences(ours, theirs)
    assert losses.mean() == pytest.approx(micro_f1(theirs) - micro_f1(ours), abs=1e-12)
    assert all(loss == 0 for loss, a, b in zip(losses, ours, theirs, strict=True) if a == b)
    none = [SlotCounts(0, 0, 0)] * 3
    assert f1_differences(none, none).tolist() == [0, 0, 0]
    assert f1_differences([SlotCounts(0, 1, 0)] * 3, none).tolist() == [1, 1, 1]
    same = non_inferiority_f1(theirs, theirs, margin=0.02, confidence=0.95)
    assert same.verdict == "inconclusive"  # 80 equal rows are not enough for two points
    assert same.high == pytest.approx(1.6449**2 / (80 + 1.6449**2) + 0.5 / 80, rel=1e-3)


def test_bounds_of_flips_are_tangos_and_bounds_of_many_small_losses_are_normal() -> None:
    losses = [1.0] * 7 + [-1.0] * 2 + [0.0] * 91
    tango = paired_difference_bounds(7, 2, 100, 0.95)
    assert mean_bounds(losses, 0.95) == (tango.value, tango.low, tango.high + 0.005)  # and half a flip
    dense = np.random.default_rng(0).normal(0.01, 0.1, 4000)
    found = mean_bounds(dense, 0.975)
    half = 1.96 * dense.std() / math.sqrt(4000)
    assert found.high - found.value == pytest.approx(half, rel=0.05)
    assert found.value - found.low == pytest.approx(half, rel=0.05)
    mixed = mean_bounds([1e-4, *[-0.5] * 50], 0.95)  # rows that lost are few and tiny
    assert mixed.low < mixed.value < mixed.high < 0


def perplexity_rows(rng: np.random.Generator, n: int, rise: float) -> tuple[np.ndarray, np.ndarray]:
    """Shares of perplexity of texts of several lengths, whose mean rises by `rise` nats: candidate, reference."""
    weight = rng.gamma(16, 1, n)  # tokens of a text
    weight /= weight.mean()
    before = weight * rng.normal(3, 0.4, n)
    return before + weight * rng.normal(rise, 0.01, n), before


@pytest.mark.parametrize("n", [3, 60, 200])
def test_a_perplexity_at_the_margin_rarely_ships(n: int) -> None:
    rng, margin = np.random.default_rng(0), math.log1p(0.02)
    pairs = [perplexity_rows(rng, n, margin) for _ in range(3000)]
    found = [non_inferiority_t(*pair, margin=margin, confidence=0.95) for pair in pairs]
    assert 0.02 < sum(one.verdict == "ship" for one in found) / 3000 <= 0.05
    assert sum(one.verdict == "do not ship" for one in found) / 3000 <= 0.05


def test_bounds_of_a_rise_are_students() -> None:
    from scipy.stats import ttest_rel

    after, before = [3.1, 3.0, 3.4, 2.9], [3.0, 3.0, 3.1, 2.9]
    found = non_inferiority_t(after, before, margin=0.02, confidence=0.95)
    low, high = ttest_rel(after, before).confidence_interval(0.9)
    assert (found.loss, found.low, found.high) == pytest.approx((0.1, low, high))
    assert found.verdict == "inconclusive"
    assert found.rows_needed is not None
    assert found.rows_needed > 4
    one = non_inferiority_t([3.0], [3.0], margin=0.02, confidence=0.95)
    assert (one.low, one.high, one.verdict, one.rows_needed) == (-math.inf, math.inf, "inconclusive", None)


def test_holm_steps_down() -> None:
    p_values = [0.011, 0.03, 0.02, 0.6]
    assert holm_adjusted(p_values) == pytest.approx([0.044, 0.06, 0.06, 0.6])
    levels = holm(4, 0.95, lambda i, level: p_values[i] <= 1 - level + 1e-12)
    # one passes at 1 - 0.05 / 4; none of the others does at 1 - 0.05 / 3
    assert levels == pytest.approx([1 - 0.05 / 4, *[1 - 0.05 / 3] * 3])
    assert holm(1, 0.9, lambda i, level: False) == pytest.approx([0.9])
    assert holm(3, 0.95, lambda i, level: True) == pytest.approx([1 - 0.05 / 3] * 3)
    assert holm(0, 0.95, lambda i, level: True) == []


def test_several_candidates_at_the_margin_rarely_let_one_pass() -> None:
    rng = np.random.default_rng(9)
    shipped = 0
    for _ in range(150):
        reference = rng.random(300) < 0.8
        candidates = [np.where(rng.random(300) < 0.05, False, reference) for _ in range(4)]  # all lose 0.04

        def passes(i: int, level: float, these: list[np.ndarray] = candidates, was: np.ndarray = reference) -> bool:
            return non_inferiority(these[i], was, margin=0.04, confidence=level).verdict == "ship"

        levels = holm(4, 0.95, passes)
        shipped += any(passes(i, level) for i, level in enumerate(levels))
    assert shipped / 150 < 0.09  # 0.15 without the correction


def test_the_plan_of_rows_in_words() -> None:
    said = rows_in_words(500, 0.01, 0.03, 0.95)
    assert said.startswith("500 rows cannot show a loss of at most 1 point; 1,900 can (no loss, 0.03 of the rows")
    assert rows_in_words(2000, 0.02, 0.03, 0.95).startswith(
        "2,000 rows can show a loss of at most 2 points; 470 would do"
    )
    assert rows_in_words(500, 1e-12, 0.03, 0.95) == "no number of rows can show a loss of at most 1e-10 points"
    four = rows_in_words(500, 0.02, 0.03, 0.95, n_candidates=4)
    assert four.startswith("500 rows cannot show a loss of at most 2 points; 720 can")
    assert "0.95 confidence of 4 candidates together, 80% power" in four
