"""What was timed on which machine before: one SQLite file, to which any number of runs append at once.

The raw evidence is kept beside the medians that trends are drawn from. A difference between runs is called real only
beyond what repeated runs of the same artifact on the same machine differ by (`statistics.repeatability`).
"""

from __future__ import annotations

import json
import os
import sqlite3
import statistics
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.artifact import json_digest
from edgetune.errors import ArtifactError
from edgetune.runtime.evidence import Latency, Machine, Served, Timings
from edgetune.runtime.latency import case_interval
from edgetune.runtime.serving import figure, has_waits
from edgetune.runtime.statistics import repeatability

FORM = 1  # PRAGMA user_version
BUSY_TIMEOUT_S = 30
TABLES = """
CREATE TABLE run (
    id INTEGER PRIMARY KEY,
    time TEXT NOT NULL,
    machine TEXT NOT NULL,       -- digest of what decides speed
    cpu TEXT NOT NULL,
    edgetune TEXT NOT NULL,
    evidence BLOB NOT NULL       -- the whole Timings, as zlib-compressed JSON
);
CREATE TABLE figure (
    run INTEGER NOT NULL REFERENCES run(id),
    subject TEXT NOT NULL,
    artifact TEXT NOT NULL,      -- digest
    engine TEXT NOT NULL,
    engine_version TEXT NOT NULL,
    setting TEXT NOT NULL,       -- digest of threads and engine settings
    n_threads INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    new_tokens INTEGER NOT NULL,
    ttft_ms REAL NOT NULL,       -- medians
    itl_ms REAL NOT NULL,
    peak_rss_bytes INTEGER NOT NULL,
    busy INTEGER NOT NULL        -- others used more than a tenth of the machine
);
CREATE INDEX figure_of ON figure (artifact, engine, prompt_tokens, new_tokens);
"""


@dataclass(frozen=True)
class Point:
    """One artifact's medians of one run."""

    time: str
    engine_version: str
    ttft_ms: float
    itl_ms: float
    busy: bool


@dataclass(frozen=True)
class Trend:
    """All runs of one case of one artifact on one machine, oldest first."""

    machine: str
    cpu: str
    subject: str  # as the last run named it
    artifact: str
    engine: str
    n_threads: int
    prompt_tokens: int
    new_tokens: int
    points: tuple[Point, ...]

    def change(self, figure: str) -> tuple[float | None, float | None]:
        """Give the last run's median over the median of the quiet ones before it, less one, and the noise floor.

        Both are None without a quiet run before it, the floor before there are two; without a floor no change is
        called real.
        """
        before = [float(getattr(point, figure)) for point in self.points[:-1] if not point.busy]
        if not before:
            return None, None
        last = float(getattr(self.points[-1], figure))
        floor = repeatability(before) if len(before) > 1 else None
        return last / statistics.median(before) - 1, floor


def default_place() -> Path:
    """Where the history is kept unless another place is named: the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "edgetune" / "history.sqlite"


def machine_id(machine: Machine) -> str:
    """Give a digest of what decides speed; an update of kernel or Python is the same machine."""
    return json_digest([machine.cpu, machine.cpu_flags, machine.cores, machine.memory_mib // 1024, machine.gpu])[:12]


def record(path: Path, found: Timings) -> int:
    """Append one run; gives the number of figures that it added. A failure is kept in the evidence only."""
    rows = [row for one in found.results if isinstance(one, Latency) for row in _figures(one)]
    rows += [row for served in found.served for row in _served_figures(served)]
    packed = zlib.compress(found.model_dump_json().encode())
    with _open(path) as base:
        made = base.execute(
            "INSERT INTO run (time, machine, cpu, edgetune, evidence) VALUES (?, ?, ?, ?, ?)",
            (found.time, machine_id(found.machine), found.machine.cpu, found.edgetune, packed),
        )
        base.executemany(f"INSERT INTO figure VALUES ({', '.join('?' * 13)})", [(made.lastrowid, *row) for row in rows])
    return len(rows)


def holds(path: Path, found: Timings) -> bool:
    """Whether the same samples were recorded before, whatever time they are said to be of.

    A run whose evidence is damaged holds none.
    """
    if not path.is_file():
        return False
    with _open(path) as base:
        rows = base.execute("SELECT evidence FROM run WHERE machine = ?", (machine_id(found.machine),)).fetchall()
    samples = json.loads(found.model_dump_json()) | {"time": None}
    return any(_unpacked(packed) == samples for (packed,) in rows)


def _unpacked(packed: Any) -> dict[str, Any] | None:
    try:
        return json.loads(zlib.decompress(packed)) | {"time": None}  # type: ignore[no-any-return]
    except (zlib.error, ValueError, TypeError):
        return None


def trends(path: Path, *, artifact: str = "", machine: str = "") -> list[Trend]:
    """Give the trend of every case, by machine and artifact; a digest may be given by its beginning."""
    if not path.is_file():
        return []
    asked = """
        SELECT machine, cpu, artifact, engine, setting, n_threads, prompt_tokens, new_tokens,
               subject, time, engine_version, ttft_ms, itl_ms, busy
        FROM figure JOIN run ON run.id = figure.run
        WHERE artifact LIKE ? AND machine LIKE ? ORDER BY time, run.id
    """
    series: dict[tuple[object, ...], list[tuple[str, Point]]] = {}
    with _open(path) as base:
        for row in base.execute(asked, (f"{artifact}%", f"{machine}%")):
            subject, time, version, ttft_ms, itl_ms, busy = row[8:]
            series.setdefault(row[:8], []).append((subject, Point(time, version, ttft_ms, itl_ms, bool(busy))))
    made = [
        Trend(
            machine=str(key[0]), cpu=str(key[1]), subject=found[-1][0], artifact=str(key[2]), engine=str(key[3]),
            n_threads=int(str(key[5])), prompt_tokens=int(str(key[6])), new_tokens=int(str(key[7])),
            points=tuple(point for _, point in found),
        )
        for key, found in series.items()
    ]  # fmt: skip
    return sorted(made, key=lambda t: (t.machine, t.subject, t.artifact, t.engine, t.prompt_tokens, t.new_tokens))


def _figures(found: Latency) -> Iterator[Sequence[object]]:
    subject = found.subject
    setting = json_digest([subject.n_threads, subject.settings])
    for case in found.cases:
        yield (
            subject.name, subject.artifact_digest, subject.engine, subject.engine_version, setting, subject.n_threads,
            case.prompt_tokens, case.new_tokens, case_interval(case, "ttft_ms", 50).value,
            case_interval(case, "itl_ms", 50).value, found.peak_rss_bytes, int(found.load.busy),
        )  # fmt: skip


def _served_figures(served: Served) -> Iterator[Sequence[object]]:
    """Figures of a server: no threads, memory or load of it are known, and its clients are its setting."""
    artifact = served.artifact_digest or json_digest([served.url, served.model])
    for case in served.cases:
        if not has_waits(case):
            continue
        who = f"{case.concurrency} clients" if case.concurrency is not None else f"{case.rate:g}/s"
        yield (
            served.model, artifact, f"{served.url}, {who}", "", json_digest([case.concurrency, case.rate]), 0,
            served.prompt_tokens or 0, served.new_tokens, figure(case, "ttft_ms", 50).value,
            figure(case, "itl_ms", 50).value, 0, 0,
        )  # fmt: skip


@contextmanager
def _open(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the history, making it where it is not there; what the block does is kept whole or not at all.

    Raises ArtifactError where the file is none of ours, or damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)) as base:
            base.execute("PRAGMA journal_mode = WAL")  # readers and one writer at once, and whole after a kill
            base.execute("BEGIN IMMEDIATE")
            (form,) = base.execute("PRAGMA user_version").fetchone()
            if form == 0 and not base.execute("SELECT 1 FROM sqlite_master").fetchone():
                for statement in TABLES.split(";"):
                    base.execute(statement)
                base.execute(f"PRAGMA user_version = {FORM}")
            elif form != FORM:
                raise ArtifactError(
                    f"{path} is no history of this edgetune (form {form}, {FORM} is known); name another"
                )
            yield base
            base.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise ArtifactError(f"{path} cannot be used as history: {error}; name another with --history") from error
