"""Statistics of paired rows and of timings. Every random choice comes from a seed that is passed in.

Letters: n rows, b harmful flips (right in the reference, wrong in the candidate), c beneficial flips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.metrics import SlotCounts

Floats = NDArray[np.float64]
FEW = 20  # flips that do not tell how large the largest are
Outcome = Literal["ship", "do not ship", "inconclusive"]


class Interval(NamedTuple):
    """A figure and the interval around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class NonInferiority:
    """A loss against the reference, with one-sided bounds at the stated confidence, and what it means at a margin."""

    loss: float
    low: float
    high: float
    margin: float
    verdict: Outcome
    n_rows: int
    rows_needed: int | None  # to decide, were the truth what was seen; None where no number would


class Flips(NamedTuple):
    """Rows whose answer changed, and the exact McNemar p-value of the two directions being equally likely."""

    harmful: int
    beneficial: int
    p_value: float


def percentile_ratio(
    after: Sequence[Sequence[float]],
    before: Sequence[Sequence[float]],
    q: float,
    *,
    seed: int,
    confidence: float = 0.95,
    n_resamples: int = 2000,
) -> Interval:
    """Give a percentile of one set of samples over that of another, with a bootstrap interval over whole groups."""
    rng = np.random.default_rng(seed)
    sides = []
    for groups in (after, before):
        arrays = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
        if not arrays:
            raise ValueError("a percentile needs at least one sample")
        picks = rng.integers(len(arrays), size=(n_resamples, len(arrays)))
        sides.append((float(np.percentile(np.concatenate(arrays), q)), _percentiles(arrays, picks, q)))
    (value_after, drawn_after), (value_before, drawn_before) = sides
    low, high = np.quantile(drawn_after / drawn_before, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value_after / value_before, float(low), float(high))


def _percentiles(arrays: Sequence[Floats], picks: NDArray[np.int64], q: float) -> Floats:
    """Give the percentile of each resample [n_resamples] of groups, from the groups that it picks."""
    if len({len(array) for array in arrays}) > 1:
        return np.array([np.percentile(np.concatenate([arrays[i] for i in pick]), q) for pick in picks])
    table = np.stack(arrays)
    parts = np.array_split(picks, 20)
    return np.concatenate([np.percentile(table[part].reshape(len(part), -1), q, axis=1) for part in parts])


def repeatability(runs: Sequence[float], *, confidence: float = 0.95) -> float:
    """Give the share by which two runs of the same thing may differ by chance: the repeatability limit of ISO 5725-1
    from the medians of repeated runs, t(confidence, n - 1) * s * sqrt(2) / mean. Needs two runs; few are wide.
    """
    from scipy.stats import t

    if len(runs) < 2:
        raise ValueError("a noise floor needs at least two runs")
    values = np.asarray(runs, dtype=np.float64)
    quantile = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    return float(quantile * values.std(ddof=1) * math.sqrt(2) / values.mean())


def f1_differences(candidate: Sequence[SlotCounts] | Floats, reference: Sequence[SlotCounts] | Floats) -> Floats:
    """Give numbers, one a row, whose mean is micro F1 of the reference minus that of the candidate, exactly.

    With F1 = 2 t / s, bars for means over rows, F the mean of both F1 and s the mean of both slot counts:
    F1_r - F1_c = mean(2 (t_r - t_c) - F (s_r - s_c)) / s. A row in which nothing changed counts zero.
    """
    ours, theirs = (np.asarray(side, dtype=np.float64) for side in (candidate, reference))  # [n, 3]
    slots = ours[:, 1:].sum(1), theirs[:, 1:].sum(1)
    right = ours[:, 0].sum(), theirs[:, 0].sum()
    f1 = [float(2 * t / s.sum()) if s.any() else 1.0 for t, s in zip(right, slots, strict=True)]
    if not slots[0].any() or not slots[1].any():  # no slots at all is an F1 of one
        return np.full(len(ours), f1[1] - f1[0])
    top = 2 * (theirs[:, 0] - ours[:, 0]) - (f1[0] + f1[1]) / 2 * (slots[1] - slots[0])
    return np.asarray(2 * top / (slots[0].mean() + slots[1].mean()))


def mean_bounds(losses: Sequence[float] | Floats, confidence: float) -> Interval:
    """Give the mean loss of paired rows (reference - candidate) with score bounds, each one-sided.

    Tango's bounds for effective counts of flips of one effective size h, chosen so that their sum and their sum of
    squares are those of the losses; so Fay and Feuer (Statistics in Medicine 16:791, 1997) bound weighted sums of
    counts. Of losses that are only 0, 1 and -1 h is 1 and they are Tango's own. The upper bound, which decides what
    ships, takes its h from rows that lost, the lower one from all. The upper one is half a flip higher, since flips
    are whole: without that a loss at the margin ships a little more often than it may. A row can lose 1: half a row of
    it is taken as seen, since few flips rarely show the largest; less than half where more than FEW rows flipped.
    """
    d = np.asarray(losses, dtype=np.float64)
    n, total, squares = len(d), float(d.sum()), float(d @ d)
    found = []
    for sizes in (np.abs(d), np.maximum(d, 0.0)):  # of the lower bound, of the upper one
        unseen = 0.5 * min(1.0, FEW / max(int(np.count_nonzero(sizes)), 1))
        h = (float((sizes**3).sum()) + unseen) / (float(sizes @ sizes) + unseen)
        h = max(h, math.sqrt(squares / n))  # so that no more flip than there are rows
        both = max(squares / h**2, abs(total) / h)  # effective flips in either direction
        harmful, beneficial = (both + total / h) / 2, (both - total / h) / 2
        found.append((h, paired_difference_bounds(harmful, beneficial, n, confidence)))
    (h_low, lower), (h_high, upper) = found
    return Interval(total / n, h_low * lower.low, h_high * min(1.0, upper.high + 0.5 / n))


def wilson(share: float, n: float, confidence: float) -> Interval:
    """Give a share of n samples with Wilson's two-sided score interval (J. Am. Stat. Assoc. 22:209, 1927).

    Of shares of tokens n is what they are worth, and no whole number.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def paired_difference_bounds(harmful: float, beneficial: float, n: int, confidence: float) -> Interval:
    """Give (b - c) / n with Tango's score bounds (Statistics in Medicine 17:891, 1998), each one-sided.

    Unlike the bootstrap it holds where few rows or none differ: with no flip at all in n rows the bound is
    z^2 / (n + z^2), not zero.
    """
    z = NormalDist().inv_cdf(confidence)
    value = (harmful - beneficial) / n

    def score(delta: float) -> float:
        """Tango's statistic for a true difference `delta`; falls as delta grows."""
        A = 2.0 * n
        B = -harmful - beneficial + (2 * n - harmful + beneficial) * delta
        C = -beneficial * delta * (1 - delta)
        q = (math.sqrt(max(B * B - 4 * A * C, 0.0)) - B) / (2 * A)
        variance = n * (2 * q + delta * (1 - delta))
        distance = harmful - beneficial - n * delta
        return math.copysign(math.inf, distance) if variance <= 0 else distance / math.sqrt(variance)

    def root(target: float, low: float, high: float) -> float:
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if score(middle) > target else (low, middle)
        return (low + high) / 2

    low = -1.0 if value <= -1 else root(z, -1.0, value)
    high = 1.0 if value >= 1 else root(-z, value, 1.0)
    return Interval(value, low, high)


def non_inferiority(
    candidate: Sequence[float],
    reference: Sequence[float],
    *,
    margin: float,
    confidence: float,
) -> NonInferiority:
    """Judge the fall of a mean score over the same rows against a margin, each bound at one-sided `confidence`.

    Scores of 0 and 1 are judged by Tango's bounds, others by `mean_bounds`.
    """
    ours, theirs = (np.asarray(side, dtype=np.float64) for side in (candidate, reference))
    return _judged(theirs - ours, margin, confidence)


def non_inferiority_f1(
    candidate: Sequence[SlotCounts] | Floats,
    reference: Sequence[SlotCounts] | Floats,
    *,
    margin: float,
    confidence: float,
) -> NonInferiority:
    """Judge the loss of micro F1 on the same rows against a margin, each bound at one-sided `confidence`."""
    return _judged(f1_differences(candidate, reference), margin, confidence)


def non_inferiority_t(
    candidate: Sequence[float], reference: Sequence[float], *, margin: float, confidence: float, power: float = 0.8
) -> NonInferiority:
    """Judge the mean rise of scores that nothing bounds, candidate - reference, by Student's t over the rows.

    The bounds of one row are infinite: it tells no spread.
    """
    from scipy.stats import t

    ours, theirs = (np.asarray(side, dtype=np.float64) for side in (candidate, reference))
    n, risen = len(ours), float((ours - theirs).mean())
    half, needed, distance = math.inf, None, abs(margin - risen)
    if n > 1:
        spread = float((ours - theirs).std(ddof=1))
        decides, shows = (float(t.ppf(level, n - 1)) for level in (confidence, power))
        half = decides * spread / math.sqrt(n)
        if distance >= 1e-9:
            needed = max(2, math.ceil(min(((decides + shows) * spread / distance) ** 2, 1e12)))
    return NonInferiority(
        risen, risen - half, risen + half, margin, _outcome(risen - half, risen + half, margin), n, needed
    )


def _judged(differences: Floats, margin: float, confidence: float) -> NonInferiority:
    n = len(differences)
    bounds = mean_bounds(differences, confidence)
    spread = float(differences @ differences) / n  # of exact match, the share of rows that flip
    needed = rows_needed(margin, spread, confidence, loss=bounds.value, n_seen=n)
    verdict = _outcome(bounds.low, bounds.high, margin)
    return NonInferiority(bounds.value, bounds.low, bounds.high, margin, verdict, n, needed)


def _outcome(low: float, high: float, margin: float) -> Outcome:
    return "ship" if high < margin else "do not ship" if low > margin else "inconclusive"


def rows_needed(
    margin: float, discordance: float, confidence: float, *, power: float = 0.8, loss: float = 0.0, n_seen: int = 0
) -> int | None:
    """Give the rows that decide at `margin` with `power`, were the true loss `loss` and the share of rows that
    flip `discordance`: (z_confidence + z_power)^2 (discordance - loss^2) / (margin - loss)^2.

    A discordance of zero is taken as one flip in `n_seen` rows. None where the loss is the margin: no number would.
    """
    distance = abs(margin - loss)
    if distance < 1e-9:
        return None
    z = NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(power)
    seen = max(discordance, 1 / n_seen if n_seen else 0.0)
    no_event = (NormalDist().inv_cdf(confidence) ** 2 * (1 - distance) + 0.5) / distance  # even without any flip
    return math.ceil(max(z * z * max(seen - loss * loss, 0.0) / distance**2, min(no_event, 1e12)))


def rows_in_words(
    n_rows: int, margin: float, discordance: float, confidence: float, *, n_candidates: int = 1, power: float = 0.8
) -> str:
    """Say whether `n_rows` can show that a loss is at most `margin`, were there none and `discordance` of rows to flip.

    "500 rows cannot show a loss of at most 1 point; 1,900 can". Numbers of rows are rounded up to two digits.
    `confidence` is that of all candidates together; the rows are those that the first of them to pass needs.
    """
    needed = rows_needed(margin, discordance, level_of_each(n_candidates, confidence), power=power)
    points = f"{100 * margin:.3g} point{'' if math.isclose(margin, 0.01) else 's'}"
    if needed is None:
        return f"no number of rows can show a loss of at most {points}"
    unit = 10 ** max(0, len(str(needed)) - 2)
    enough = f"{math.ceil(needed / unit) * unit:,}"
    said = f"{n_rows:,} rows cannot show a loss of at most {points}; {enough} can"
    if n_rows >= needed:
        said = f"{n_rows:,} rows can show a loss of at most {points}; {enough} would do"
    together = f" of {n_candidates} candidates together" if n_candidates > 1 else ""
    return (
        f"{said} (no loss, {discordance:.2g} of the rows flipping, {confidence:.4g} confidence{together}, "
        f"{power:.0%} power)"
    )


def holm(n: int, confidence: float, passes: Callable[[int, float], bool]) -> list[float]:
    """Give the one-sided confidence at which each of `n` candidates is judged, so that with probability `confidence`
    none of them passes that should not (Holm, Scandinavian Journal of Statistics 6:65, 1979).

    `passes(i, confidence)` judges one. With k found to pass, the others are judged at the level of n - k.
    """
    levels: dict[int, float] = {}
    while len(levels) < n:
        level = level_of_each(n - len(levels), confidence)
        rest = [i for i in range(n) if i not in levels]
        passed = [i for i in rest if passes(i, level)]
        levels |= dict.fromkeys(passed or rest, level)
    return [levels[i] for i in range(n)]


def level_of_each(n: int, confidence: float) -> float:
    """Give the confidence at which each of `n` is judged first: 1 - (1 - confidence) / n, Bonferroni's."""
    return 1 - (1 - confidence) / n


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Give Holm's adjusted p-values: each may be held against the level that was meant for all together."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = dict.fromkeys(order, 0.0), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return [adjusted[i] for i in range(len(p_values))]


def flips(candidate: Sequence[bool], reference: Sequence[bool]) -> Flips:
    """Count harmful and beneficial flips, with the exact McNemar test (two-sided binomial)."""
    from scipy.stats import binomtest

    pairs = list(zip(candidate, reference, strict=True))
    harmful = sum(bool(was and not now) for now, was in pairs)
    beneficial = sum(bool(now and not was) for now, was in pairs)
    p_value = float(binomtest(harmful, harmful + beneficial).pvalue) if harmful + beneficial else 1.0
    return Flips(harmful, beneficial, p_value)
