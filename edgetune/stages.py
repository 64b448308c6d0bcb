"""Runs stages against the store: what is there is not made again, and what was done is told and logged."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from edgetune.adapt import processes
from edgetune.adapt.allocator import give_back
from edgetune.artifact import Artifact, Store
from edgetune.errors import DiskSpaceError, EdgetuneError, is_full_disk
from edgetune.progress import Report, reporting
from edgetune.runtime.evidence import Failure

LOG = "log.jsonl"
Make = Callable[[Path, Report], Artifact]


@dataclass
class Stages:
    """One run's way through the stages."""

    store: Store
    folder: Path  # for people: report, log, links
    console: Console
    done: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    fallbacks: dict[tuple[str, str], str] = field(default_factory=dict)  # (identity, what fell back) -> its stage
    _running: str | None = field(default=None, init=False)  # the stage that is being made, or failed

    def __post_init__(self) -> None:
        self._took_before = _seconds_by_identity(self.folder / LOG)

    def run(self, name: str, made: str, make: Make, *, together: bool = False) -> Artifact:
        """Give the artifact of an identity, making it where the store has none; `together` in all processes."""
        began, self._running = time.monotonic(), name
        self._log(event="start", stage=name, identity=made)
        with reporting(self.console, name) as progress:
            artifact, made_now = processes.once(self.store, made, lambda out: make(out, progress), together=together)
        if made_now:
            gc.collect()  # models lie in cycles, and the next stage needs their room
            give_back()
        seconds = round(time.monotonic() - began, 1)
        before = self._took_before.pop(made, None)  # told once of those that share it
        took = seconds if made_now else before
        self.done.append({"name": name, "seconds": took, "done_before": not made_now, "identity": made})
        self._log(event="end", stage=name, identity=made, seconds=seconds, made_now=made_now)
        for line in artifact.manifest.fallbacks:
            self.fallbacks.setdefault((made, line), name)
        said = f"{seconds:.0f} s" if made_now else "done before"
        self.console.print(f"[green]✓[/] {escape(name)} [dim]({said})[/]", highlight=False)
        for line in artifact.manifest.fallbacks if made_now else ():
            self.console.print(f"  [yellow]note[/] {escape(line)}", highlight=False)
        gc.collect()
        self._running = None
        return artifact

    def attempt(self, subject: str, name: str, work: Callable[[], Artifact]) -> Artifact | None:
        """Run a candidate's stage; a failure becomes a row of the report, and the other candidates go on.

        A full disk is no candidate's fault and ends the run.
        """
        try:
            return work()
        except Exception as error:
            if isinstance(error, DiskSpaceError):
                raise
            if is_full_disk(error):
                raise DiskSpaceError(f"no space left on a disk while making {name} ({error})") from error
            name, self._running = self._running or name, None
            reason = str(error) if isinstance(error, EdgetuneError) else f"{type(error).__name__}: {error}"
            self.failures.append(Failure(subject=subject, stage=name, reason=" ".join(reason.split())))
            self._log(event="failure", subject=subject, stage=name, reason=reason, traceback=traceback.format_exc())
            self.console.print(f"[red]✗[/] {escape(name)}: {escape(reason)}", highlight=False)
            return None

    def _log(self, **entry: Any) -> None:
        if not processes.is_first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOG).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry}) + "\n")


def _seconds_by_identity(log: Path) -> dict[str, float]:
    """Give what earlier runs into a folder took to make each identity, s; a line that a kill cut short is none."""
    found: dict[str, float] = {}
    try:
        lines = log.read_bytes().splitlines()
    except FileNotFoundError:
        return found
    for line in lines:
        try:
            entry = json.loads(line)
            if entry["event"] == "end" and entry["made_now"]:
                found[str(entry["identity"])] = float(entry["seconds"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
