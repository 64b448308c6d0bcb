"""Progress with time left: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# progress(done, total, label): called as often as the work likes
Report = Callable[[int, int, str], None]
PLAIN_EVERY_S = 10.0


def silent(done: int, total: int, label: str) -> None:
    """Report nothing."""


@contextmanager
def reporting(console: Console, name: str) -> Iterator[Report]:
    """Give a `progress(done, total, label)` that shows one stage."""
    if console.is_terminal:
        columns = (TextColumn("  {task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total, label: bar.update(
                task, completed=done, total=total, description=escape(f"{name} {label}".strip())
            )
        return
    began = said = time.monotonic()

    def line(done: int, total: int, label: str) -> None:
        nonlocal said
        now = time.monotonic()
        if done and (now - said >= PLAIN_EVERY_S):
            said = now
            left = (now - began) / done * (total - done)
            said_now = " ".join(f"{name} {label} {done}/{total}, {left:.0f} s left".split())
            console.print(f"  {said_now}", highlight=False, markup=False)

    yield line
