"""One run of a recipe in a process group of its own, which dies at a moment that is asked for (`kill.py`)."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil

from edgetune.artifact import Store

RUN_TIMEOUT_S, ORPHAN_TIMEOUT_S = 600, 20
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["edgetune.pipeline", "edgetune.export.gguf", "edgetune.export.onnx"])
LIVE: set[ForkServerProcess] = set()  # runs that a stopped benchmark takes with it


@dataclass(frozen=True)
class Moment:
    """When to kill: seconds after the start, or before or after the k-th rename (counted from 0)."""

    seconds: float | None = None
    rename: int | None = None
    side: str = ""

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s" if self.seconds is not None else f"{self.side} rename {self.rename}"


@dataclass
class Kill:
    """One kill and what came of it."""

    moment: Moment
    killed: bool = False  # else the run had ended before its moment came
    where: str = ""  # the stage, or what was renamed
    whole_at_kill: int = 0
    orphans: int = 0  # engine processes that were alive after ORPHAN_TIMEOUT_S
    lost: list[str] = field(default_factory=list)
    different_bytes: list[str] = field(default_factory=list)
    second_run_s: float = 0.0

    @property
    def outcome(self) -> str:
        if not self.killed:
            return "ended before"
        return "lost" if self.lost else "different bytes" if self.different_bytes else "same bytes"


def child(recipe: Path, home: Path, rename: int | None, side: str) -> None:
    """Be the run, in a process group of its own: wrap every rename, note it, and die at the one that is asked for."""
    os.setsid()
    output = os.open(home / "output.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    made = 0

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(source: Any, target: Any, **kwargs: Any) -> Any:
            nonlocal made
            k, made = made, made + 1
            with (home / "renames.log").open("a", encoding="utf-8") as stream:
                stream.write(_told(target, home) + "\n")
            if k == rename and side == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            original(source, target, **kwargs)
            if k == rename:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    # Path.rename, Path.replace and shutil.move look these up in `os` when they are called
    os.rename, os.replace = wrap(os.rename), wrap(os.replace)

    from rich.console import Console

    from edgetune import pipeline
    from edgetune.recipe import load_recipe

    pipeline.run(load_recipe(recipe), home / "run", Store(home / "store"), Console(width=200))


def _told(target: Any, home: Path) -> str:
    """Name a renamed file without the names that change from run to run."""
    path = Path(os.fsdecode(target))
    return str(path.relative_to(home)) if path.is_relative_to(home) else path.name


def start(recipe: Path, home: Path, moment: Moment) -> ForkServerProcess:
    """Start a run."""
    home.mkdir(parents=True, exist_ok=True)
    (home / "renames.log").unlink(missing_ok=True)
    process = FORKS.Process(target=child, args=(recipe, home, moment.rename, moment.side))
    process.start()
    LIVE.add(process)
    return process


def finish(recipe: Path, home: Path) -> tuple[bool, float]:
    """Run to the end; gives whether it came there, and the seconds."""
    began = time.monotonic()
    process = start(recipe, home, Moment())
    process.join(RUN_TIMEOUT_S)
    if process.exitcode is None:
        kill_group(process)
    LIVE.discard(process)
    return process.exitcode == 0, round(time.monotonic() - began, 2)


def kill_group(process: ForkServerProcess) -> int:
    """SIGKILL the process group; gives how many descendants outlive it."""
    below = _below(process)
    try:
        os.killpg(_pid(process), signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet, or is gone
        process.kill()
    process.join()
    return _outlive(below)


def _pid(process: ForkServerProcess) -> int:
    assert process.pid is not None, "it was started"
    return process.pid


def _below(process: ForkServerProcess) -> list[psutil.Process]:
    try:
        return psutil.Process(_pid(process)).children(recursive=True)
    except psutil.Error:
        return []


def _outlive(below: list[psutil.Process]) -> int:
    _, alive = psutil.wait_procs(below, timeout=ORPHAN_TIMEOUT_S)
    for orphan in alive:
        orphan.kill()
    return len(alive)


def run_until(recipe: Path, home: Path, moment: Moment, kill: Kill) -> None:
    """Start a run and let it die at its moment."""
    process = start(recipe, home, moment)
    if moment.seconds is not None:
        process.join(moment.seconds)
        if process.exitcode is None:
            kill.orphans = kill_group(process)
    else:
        below: list[psutil.Process] = []
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while process.exitcode is None:  # it kills itself, so who is below it must be asked before
            if time.monotonic() > deadline:
                kill_group(process)
                kill.lost.append(f"no end within {RUN_TIMEOUT_S} s")
                break
            below = _below(process) or below
            process.join(0.05)
        process.join()
        kill.orphans = _outlive(below)
    LIVE.discard(process)
    kill.killed = process.exitcode == -signal.SIGKILL
    if not kill.killed and process.exitcode != 0:
        kill.lost.append(f"first run ended with {process.exitcode}: {last_line(home)}")
    renamed = (home / "renames.log").read_text().splitlines() if (home / "renames.log").exists() else []
    kill.where = renamed[-1] if moment.rename is not None and renamed else _stage(home / "run" / "log.jsonl")


def _stage(log: Path) -> str:
    """Name the stage that a run was in, by its log."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    if not lines:
        return "before the first stage"
    last = json.loads(lines[-1])
    return str(last["stage"]) if last["event"] == "start" else f"after {last['stage']}"


def last_line(home: Path) -> str:
    return ((home / "output.log").read_text(errors="replace").strip().splitlines() or [""])[-1][:300]
