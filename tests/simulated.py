"""Paired rows of a reference and a candidate whose true loss is known, and how often the intervals hold.

`benchmarks/intervals.py` runs them many times, the tests a few.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.runtime.statistics import NonInferiority, non_inferiority, non_inferiority_f1
from edgetune.runtime.task_metrics import Answer, macro_f1

HARMFUL, BENEFICIAL, RIGHT = 0.06, 0.1, 0.8  # of right rows; of wrong rows; rows the reference has right
METRICS = ("exact_match", "slot_f1", "score", "macro_f1")
LABELS = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}  # of a classification, with their shares


def exact_rows(rng: np.random.Generator, n: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Right and wrong answers: candidate, reference."""
    right, flip = rng.random(n) < RIGHT, rng.random(n)
    return np.where(right, flip >= HARMFUL, flip < BENEFICIAL), right


def slot_rows(rng: np.random.Generator, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Slots of JSON answers, [n, 3]: right, predicted, gold. A flip loses one slot or two, one of five flips all."""
    now, was = exact_rows(rng, n)
    gold = rng.integers(2, 6, n)
    wrong, lost = np.minimum(gold, rng.integers(1, 3, (2, n)))
    lost = np.where(rng.random(n) < 0.2, gold, lost)
    theirs = np.stack([np.where(was, gold, gold - wrong), gold, gold], axis=1)
    flipped = np.stack([np.where(now, gold, gold - lost), np.where(~now & (lost == gold), 0, gold), gold], axis=1)
    return np.where((now == was)[:, None], theirs, flipped), theirs


def score_rows(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scores from 0 to 1, as ROUGE-L gives them: most rows move a little, some fall far."""
    before = rng.beta(6, 2, n)
    far = np.where(rng.random(n) < 0.05, rng.random(n) * 0.5, 0.0)
    return (before + rng.normal(0, 0.04, n) - far).clip(0, 1), before


def macro_f1_rows(rng: np.random.Generator, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Pseudo-values of macro F1: a wrong answer is one of the other labels."""
    names = np.array(list(LABELS))
    gold = rng.choice(len(names), n, p=list(LABELS.values()))
    other = (gold + rng.integers(1, len(names), n)) % len(names)
    sides = [
        macro_f1([Answer(said, (label,)) for said, label in zip(names[chosen], names[gold], strict=True)], list(LABELS))
        for chosen in (np.where(right, gold, other) for right in exact_rows(rng, n))
    ]
    return sides[0].rows, sides[1].rows


def true_macro_f1(right: float) -> float:
    """Macro F1 where this share of the answers is right, whatever the label."""
    wrong = (1 - right) / (len(LABELS) - 1)
    return sum(2 * p * right / (p * right + (1 - p) * wrong + p) for p in LABELS.values()) / len(LABELS)


def rows(metric: str, rng: np.random.Generator, n: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Draw rows of one metric: candidate, reference."""
    draw: dict[str, Callable[[np.random.Generator, int], tuple[NDArray[Any], NDArray[Any]]]] = {
        "exact_match": exact_rows, "slot_f1": slot_rows, "score": score_rows, "macro_f1": macro_f1_rows,
    }  # fmt: skip
    return draw[metric](rng, n)


def judged(metric: str, pair: tuple[NDArray[Any], NDArray[Any]], margin: float, confidence: float) -> NonInferiority:
    """Judge the candidate's loss."""
    judge = non_inferiority_f1 if metric == "slot_f1" else non_inferiority
    return judge(*pair, margin=margin, confidence=confidence)


@cache
def true_loss(metric: str) -> float:
    """The loss of very many rows."""
    lost = RIGHT * HARMFUL - (1 - RIGHT) * BENEFICIAL
    if metric == "exact_match":
        return lost
    if metric == "macro_f1":
        return true_macro_f1(RIGHT) - true_macro_f1(RIGHT - lost)
    return judged(metric, rows(metric, np.random.default_rng(0), 2_000_000), 0.5, 0.95).loss


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
        pair = rows(metric, rng, n)
        two_sided = judged(metric, pair, truth, 0.975)
        shipped = judged(metric, pair, truth, 0.95).verdict == "ship"
        found.append(Trial(two_sided.loss, two_sided.low, two_sided.high, shipped))
    return found


def coverage(metric: str, found: Sequence[Trial]) -> float:
    """Share of trials whose interval holds the true loss."""
    return sum(one.low <= true_loss(metric) <= one.high for one in found) / len(found)


def false_passes(found: Sequence[Trial]) -> float:
    """Share of trials in which a candidate that loses as much as the margin shipped."""
    return sum(one.shipped for one in found) / len(found)
