"""Calibration rows: training rows under their template, and a share of general text, packed to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import json_digest
from edgetune.errors import DataError


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
) -> CalibrationSet:
    """Pack task rows (shuffled by `seed`) and general text into N rows of T tokens.

    Task rows are repeated where there are too few of them. Raises DataError where the general text is too short.
    """
    n_general = round(n_samples * general_share)
    if n_general * n_tokens > len(general):
        raise DataError(
            f"calibration wants {n_general} x {n_tokens} tokens of general text, {len(general)} are there; "
            "lower general_share or n_samples"
        )
    rng = np.random.default_rng(seed)
    stream: list[int] = []
    while len(stream) < (n_samples - n_general) * n_tokens:
        for index in rng.permutation(len(task)):
            stream += task[index]
            if len(stream) >= (n_samples - n_general) * n_tokens:
                break
    rows = [stream[i * n_tokens : (i + 1) * n_tokens] for i in range(n_samples - n_general)]
    starts: list[int] = np.linspace(0, len(general) - n_tokens, n_general).astype(int).tolist()
    rows += [list(general[start : start + n_tokens]) for start in starts]
    return CalibrationSet(np.asarray(rows, dtype=np.int64))
