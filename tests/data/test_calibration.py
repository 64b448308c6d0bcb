"""Calibration rows: their shape, their share of general text, and that a seed decides all of it."""

from __future__ import annotations

import numpy as np
import pytest

from edgetune.data.calibration import CalibrationSet, make_calibration
from edgetune.errors import DataError

TASK = [[n] * (3 + n % 5) for n in range(1, 21)]
GENERAL = list(range(1000, 1400))


def make(**changes: float) -> CalibrationSet:
    settings = {"n_samples": 8, "n_tokens": 16, "general_share": 0.25, "seed": 0} | changes
    return make_calibration(TASK, GENERAL, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "n_general"), [(0.0, 0), (0.1, 1), (0.25, 2), (0.5, 4), (0.94, 8), (1.0, 8)]
)  # fmt: skip
def test_rows_are_full_and_the_general_ones_come_last(share: float, n_general: int) -> None:
    found = make(general_share=share)
    assert found.ids.shape == (8, 16)
    assert found.ids.dtype == np.int64
    is_general = (found.ids >= 1000).all(axis=1)
    assert is_general.tolist() == [False] * (8 - n_general) + [True] * n_general
    assert (found.ids[: 8 - n_general] < 1000).all()


def test_general_rows_are_runs_spread_over_the_whole_text() -> None:
    rows = make(general_share=1.0).ids
    assert (np.diff(rows, axis=1) == 1).all()
    assert rows[0, 0] == 1000
    assert rows[-1, -1] == 1399


def test_each_task_row_comes_once_before_any_comes_twice() -> None:
    n_task = sum(map(len, TASK))
    found = make_calibration(TASK, [], n_samples=1, n_tokens=n_task, general_share=0, seed=3).ids[0]
    expected = np.concatenate(TASK)
    assert sorted(found.tolist()) == sorted(expected.tolist())
    assert found.tolist() != expected.tolist()  # shuffled


def test_too_few_task_rows_are_repeated() -> None:
    found = make_calibration([[1, 2, 3]], [], n_samples=2, n_tokens=5, general_share=0, seed=0)
    assert found.ids.tolist() == [[1, 2, 3, 1, 2], [3, 1, 2, 3, 1]]


def test_the_seed_decides_and_the_digest_tells() -> None:
    assert make().digest == make().digest
    assert (make().ids == make().ids).all()
    digests = {make().digest, make(seed=1).digest, make(n_samples=9).digest, make(n_tokens=15).digest}
    digests.add(make(general_share=0.5).digest)
    assert len(digests) == 5
    assert len(make().digest) == 64


def test_the_global_generator_is_neither_read_nor_moved() -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    first = make().digest
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index, union-attr]
    np.random.seed(2)
    assert make().digest == first


def test_too_little_general_text_is_refused() -> None:
    with pytest.raises(
        DataError,
        match=r"^calibration wants 4 x 128 tokens of general text, 400 are there; lower general_share or n_samples$",
    ):
        make(general_share=0.5, n_tokens=128)
    make(general_share=0.25, n_tokens=200)  # exactly enough
