"""Paired rows of a reference and a candidate whose true loss is known, and how often the intervals hold.

`benchmarks/intervals.py` runs them many times, the tests a few.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.metrics import SlotCounts
from edgetune.runtime.statistics import NonInferiority, non_inferiority, non_inferiority_f1

HARMFUL, BENEFICIAL, RIGHT = 0.06, 0.1, 0.8  # of right rows; of wrong rows; rows the reference has right
METRICS = ("exact_match", "slot_f1", "score")


def exact_rows(rng: np.random.Generator, n: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Right and wrong answers: candidate, reference."""
    right, flip = rng.random(n) < RIGHT, rng.random(n)
    return np.where(right, flip >= HARMFUL, flip < BENEFICIAL), right


def slot_rows(rng: np.random.Generator, n: int) -> tuple[list[SlotCounts], list[SlotCounts]]:
    """Slots of JSON answers: a flip loses one slot or two, and one of five flips loses them all."""
    now, was = exact_rows(rng, n)
    ours, theirs = [], []
    for right, had in zip(now, was, strict=True):
        gold = int(rng.integers(2, 6))
        wrong = min(gold, int(rng.integers(1, 3)))
        theirs.append(SlotCounts(gold if had else gold - wrong, gold, gold))
        lost = gold if rng.random() < 0.2 else min(gold, int(rng.integers(1, 3)))
        if right == had:
            ours.append(theirs[-1])
        elif right:
            ours.append(SlotCounts(gold, gold, gold))
        else:
            ours.append(SlotCounts(gold - lost, 0 if lost == gold else gold, gold))
    return ours, theirs


def score_rows(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores from 0 to 1, as ROUGE-L gives them: most rows move a little, some fall far."""
    before = rng.beta(6, 2, n)
    far = np.where(rng.random(n) < 0.05, rng.random(n) * 0.5, 0.0)
    return (before + rng.normal(0, 0.04, n) - far).clip(0, 1), before


def judged(metric: str, rng: np.random.Generator, n: int, margin: float, confidence: float) -> NonInferiority:
    """Draw rows and judge the candidate's loss."""
    if metric == "slot_f1":
        ours, theirs = slot_rows(rng, n)
        return non_inferiority_f1(ours, theirs, margin=margin, confidence=confidence)
    now, was = exact_rows(rng, n) if metric == "exact_match" else score_rows(rng, n)
    return non_inferiority(now, was, margin=margin, confidence=confidence)


@cache
def true_loss(metric: str) -> float:
    """The loss of very many rows."""
    if metric == "exact_match":
        return RIGHT * HARMFUL - (1 - RIGHT) * BENEFICIAL
    return judged(metric, np.random.default_rng(0), 100_000, 0.5, 0.95).loss


class Trial(NamedTuple):
    """Loss and two-sided 95 % interval of one trial; whether it shipped at a margin of the true loss, at 95 %."""

    loss: float
    low: float
    high: float
    shipped: bool


def trials(metric: str, n: int, *, times: int, seed: int) -> list[Trial]:
    """Draw `n` rows, `times` times, and judge them."""
    truth, rng = true_loss(metric), np.random.default_rng(seed)
    found = []
    for _ in range(times):
        state = rng.bit_generator.state
        two_sided = judged(metric, rng, n, truth, 0.975)
        rng.bit_generator.state = state  # the same rows again
        shipped = judged(metric, rng, n, truth, 0.95).verdict == "ship"
        found.append(Trial(two_sided.loss, two_sided.low, two_sided.high, shipped))
    return found


def coverage(metric: str, found: Sequence[Trial]) -> float:
    """Share of trials whose interval holds the true loss."""
    return sum(one.low <= true_loss(metric) <= one.high for one in found) / len(found)


def false_passes(found: Sequence[Trial]) -> float:
    """Share of trials in which a candidate that loses as much as the margin shipped."""
    return sum(one.shipped for one in found) / len(found)
