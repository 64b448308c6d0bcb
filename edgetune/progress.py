"""Progress with time left: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# progress(done, total, label): called as often as the work likes
Report = Callable[[int, int, str], None]
PLAIN_EVERY_S = 10.0
PACE_S = 120.0  # what a resumed stage only reads again goes by at once, and is out of sight after so long


def silent(done: int, total: int, label: str) -> None:
    """Report nothing."""


class Pace:
    """How fast a stage goes, by what it reported lately; what was done before its first report is no work of now."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()  # when, and what was done by then

    def seconds_left(self, done: int, total: int, now: float) -> float | None:
        """Take a report in and give the seconds left; None before a second one shows a pace."""
        if self._seen and done < self._seen[-1][1]:  # the stage begins something else
            self._seen.clear()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > PACE_S:
            self._seen.popleft()
        began, first = self._seen[0]
        return (now - began) / (done - first) * (total - done) if done > first else None


@contextmanager
def reporting(console: Console, name: str) -> Iterator[Report]:
    """Give a `progress(done, total, label)` that shows one stage."""
    if console.is_terminal:
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(name, total=None)
            # the bar takes its pace from the second update on, as `Pace` does
            yield lambda done, total, label: bar.update(
                task, completed=done, total=total, description=escape(f"{name} {label}".strip())
            )
        return
    said, pace = time.monotonic(), Pace()

    def line(done: int, total: int, label: str) -> None:
        nonlocal said
        now = time.monotonic()
        left = pace.seconds_left(done, total, now)
        if now - said >= PLAIN_EVERY_S:
            said = now
            time_left = f", {left:.0f} s left" if left is not None else ""
            console.print("  " + " ".join(f"{name} {label} {done}/{total}{time_left}".split()), highlight=False,
                          markup=False)  # fmt: skip

    yield line
