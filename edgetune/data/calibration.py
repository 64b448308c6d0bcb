"""Calibration rows: training rows under their template, and a share of general text, packed to one length."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import json_digest
from edgetune.errors import DataError
from edgetune.recipe_export import Calibration


@dataclass(frozen=True)
class CalibrationSet:
    """Token ids [N, T], every row full."""

    ids: NDArray[np.int64]

    @property
    def digest(self) -> str:
        return json_digest(self.ids.tolist())


def make_calibration(
    task: Sequence[Sequence[int]],
    general: Sequence[int],
    *,
    n_samples: int,
    n_tokens: int,
    general_share: float,
    seed: int,
    called: str = "general text",
) -> CalibrationSet:
    """Pack task rows (shuffled by `seed`) and general text into N rows of T tokens.

    Task rows are repeated where there are too few of them. Raises DataError where the general text, `called` so or by
    its file, is too short.
    """
    n_general = round(n_samples * general_share)
    if n_general * n_tokens > len(general):
        raise DataError(
            f"calibration wants {n_general} x {n_tokens} tokens of {called}, {len(general)} are there; "
            "lower general_share or n_samples"
        )
    stream: list[int] = []
    for index in _drawn(task, (n_samples - n_general) * n_tokens, seed):
        stream += task[index]
    rows = [stream[i * n_tokens : (i + 1) * n_tokens] for i in range(n_samples - n_general)]
    starts = _starts(len(general), n_general, n_tokens)
    rows += [list(general[start : start + n_tokens]) for start in starts]
    return CalibrationSet(np.asarray(rows, dtype=np.int64))


def make_apart(
    task: Sequence[Sequence[int]],
    general: Sequence[int],
    config: Calibration,
    *,
    taken: Calibration | None,
    heldout: Collection[tuple[int, ...]],
    seed: int,
    called: str = "general text",
) -> CalibrationSet:
    """Pack task rows and general text that `make_calibration` does not take for `taken` and this seed, each once.

    Raises DataError where too little is left, and where a row is one of `heldout`.
    """
    n_general, T = round(config.n_samples * config.general_share), config.n_tokens
    n_task, windows = (config.n_samples - n_general) * T, range(0, len(general) - T + 1, T)
    shown, free = set[tuple[int, ...]](), list(windows)
    if taken is not None:
        n_shown = round(taken.n_samples * taken.general_share)
        shown = {tuple(task[i]) for i in _drawn(task, (taken.n_samples - n_shown) * taken.n_tokens, seed)}
        starts = _starts(len(general), n_shown, taken.n_tokens)
        free = [at for at in windows if all(at + T <= start or start + taken.n_tokens <= at for start in starts)]
    stream: list[int] = []
    for index in np.random.default_rng(seed).permutation(len(task))[::-1]:
        row = tuple(task[index])
        if len(stream) >= n_task:
            break
        if row in heldout:
            raise DataError("a training row is a held-out row, which nothing but the verdict may look at; remove it")
        if row not in shown:
            stream += row
            shown.add(row)
    for what, left, wanted in (("training rows", len(stream), n_task), (called, len(free) * T, n_general * T)):
        if left < wanted:
            raise DataError(
                f"calibration leaves {left} tokens of {what} to measure on, {wanted} are wanted; lower its n_samples, "
                "or those of allocate.rows"
            )
    rows = [stream[i * T : (i + 1) * T] for i in range(config.n_samples - n_general)]
    picked = np.linspace(0, len(free) - 1, n_general).astype(int).tolist()
    rows += [list(general[free[i] : free[i] + T]) for i in picked]
    return CalibrationSet(np.asarray(rows, dtype=np.int64))


def _drawn(task: Sequence[Sequence[int]], n_tokens: int, seed: int) -> Iterator[int]:
    """Draw rows until they hold so many tokens, again from the whole where all were drawn."""
    rng, n = np.random.default_rng(seed), 0
    while n < n_tokens:
        for index in rng.permutation(len(task)).tolist():
            n += len(task[index])
            yield index
            if n >= n_tokens:
                break


def _starts(n: int, n_windows: int, n_tokens: int) -> list[int]:
    """Spread windows evenly over a text of n tokens."""
    starts: list[int] = np.linspace(0, n - n_tokens, n_windows).astype(int).tolist()
    return starts
