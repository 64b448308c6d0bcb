"""Progress: time left counts what was done now, not what an earlier run had done."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console

from edgetune import progress
from edgetune.progress import reporting


class Clock:
    """A time that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "monotonic", made)
    return made


def plain_lines(clock: Clock, reports: list[tuple[float, int, int, str]]) -> list[str]:
    """Give the lines of reports that come so many seconds after one another."""
    said = io.StringIO()
    with reporting(Console(file=said, width=100), "adapt") as report:
        for seconds, done, total, label in reports:
            clock.now += seconds
            report(done, total, label)
    return [line.strip() for line in said.getvalue().splitlines()]


def test_what_an_earlier_run_did_is_no_work_of_this_one(clock: Clock) -> None:
    steps = [(2.0, n, 200, "loss 1.0") for n in range(101, 112)]
    assert plain_lines(clock, steps) == [
        "adapt loss 1.0 105/200, 190 s left",
        "adapt loss 1.0 110/200, 180 s left",
    ]


def test_what_is_only_read_again_is_soon_out_of_sight(clock: Clock) -> None:
    again = [(0.01, n, 100, "rows") for n in range(51)]
    found = plain_lines(clock, [*again, *((30.0, n, 100, "rows") for n in range(51, 60))])
    assert found[-1] == "adapt rows 59/100, 1230 s left"


def test_a_stage_that_begins_something_else_is_timed_anew(clock: Clock) -> None:
    first = [(1.0, n, 100, "read") for n in range(100)]
    assert plain_lines(clock, [*first, (11.0, 0, 10, "write"), (20.0, 1, 10, "write")])[-2:] == [
        "adapt write 0/10",
        "adapt write 1/10, 180 s left",
    ]


def test_a_first_report_says_what_is_done_and_no_time(clock: Clock) -> None:
    assert plain_lines(clock, [(60.0, 1, 3, "")]) == ["adapt 1/3"]


def test_the_bar_takes_its_pace_from_what_was_done_now(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Bar(progress.Progress):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(progress, "Progress", Bar)
    terminal = Console(file=io.StringIO(), force_terminal=True, get_time=clock)
    with reporting(terminal, "adapt") as report:
        for step in range(101, 106):
            clock.now += 2.0
            report(step, 200, "loss [1.0]")
        (task,) = bars[0].tasks
        assert (task.completed, task.total) == (105, 200)
        assert task.time_remaining == pytest.approx(190)
