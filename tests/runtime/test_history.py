"""The history: whole after anything, trends by machine and artifact, and no change called real without a floor."""

from __future__ import annotations

import io
import multiprocessing
import sqlite3
import zlib
from pathlib import Path

import pytest
from rich.console import Console

from edgetune import past
from edgetune.errors import ArtifactError
from edgetune.runtime import history
from edgetune.runtime.evidence import (
    Failure,
    Generation,
    Latency,
    LatencyCase,
    Load,
    Machine,
    Subject,
    Timings,
)


def timings(itl_ms: float, *, day: int = 1, cpu: str = "A", digest: str = "abc", busy: bool = False) -> Timings:
    machine = Machine(cpu=cpu, cpu_flags=[], cores=2, memory_mib=4096, gpu=None, platform="p", python="3")
    subject = Subject(
        name="q4",
        kind="gguf",
        artifact_digest=digest,
        size_bytes=9,
        engine="llama.cpp",
        engine_version="1",
        n_threads=2,
    )
    generations = [Generation(ttft_ms=40, itl_ms=[itl_ms] * 3, warmup=n == 0) for n in range(4)]
    timed = Latency(
        subject=subject, workload="w", load_ms=1, first_run_ms=50, peak_rss_bytes=7,
        cases=[LatencyCase(prompt_tokens=8, new_tokens=4, generations=generations)],
        load=Load(others_before=0, others_during=0.5 if busy else 0, busy=busy),
    )  # fmt: skip
    lost = Failure(subject="broken", stage="latency", reason="llama.cpp died of SIGSEGV while loading")
    return Timings(edgetune="0", time=f"2026-11-{day:02d}T00:00:00+00:00", machine=machine, results=[timed, lost])


def test_runs_accumulate_by_machine_and_artifact(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "history.sqlite"
    assert history.trends(place) == []
    for day, itl in enumerate((10.0, 10.2, 9.9, 12.0), start=1):
        assert history.record(place, timings(itl, day=day)) == 1
    history.record(place, timings(5.0, cpu="B"))
    history.record(place, timings(7.0, digest="def"))
    first, other, elsewhere = sorted(history.trends(place), key=lambda t: (t.cpu, t.artifact))
    assert [p.itl_ms for p in first.points] == [10.0, 10.2, 9.9, 12.0]
    assert (other.artifact, elsewhere.cpu) == ("def", "B")
    assert len(history.trends(place, artifact="de")) == 1
    assert len(history.trends(place, machine=elsewhere.machine)) == 1
    change, floor = first.change("itl_ms")
    assert change == pytest.approx(0.2)
    # s of 10, 10.2, 9.9 is 0.1528, t(0.975, 2) is 4.303
    assert floor == pytest.approx(4.303 * 0.1528 * 2**0.5 / 10.033, rel=1e-3)
    with sqlite3.connect(place) as base:
        packed = base.execute("SELECT evidence FROM run").fetchall()
    kept = [Timings.model_validate_json(zlib.decompress(one)) for (one,) in packed]
    assert len(kept) == 6
    assert timings(12.0, day=4) in kept  # raw samples and failures too


def test_a_busy_run_gives_no_floor_and_no_baseline(tmp_path: Path) -> None:
    place = tmp_path / "history.sqlite"
    for day, (itl, busy) in enumerate(((10.0, False), (30.0, True), (11.0, False)), start=1):
        history.record(place, timings(itl, day=day, busy=busy))
    (trend,) = history.trends(place)
    assert trend.change("itl_ms") == (pytest.approx(0.1), None)


def test_without_a_quiet_run_before_it_no_change_is_told(tmp_path: Path) -> None:
    place = tmp_path / "history.sqlite"
    for day, busy in enumerate((True, True, False), start=1):
        history.record(place, timings(10.0 * day, day=day, busy=busy))
    (trend,) = history.trends(place)
    assert trend.change("itl_ms") == (None, None)
    assert past.change(trend) == "no quiet run before it"


def test_the_same_samples_are_added_once(tmp_path: Path) -> None:
    place, console = tmp_path / "history.sqlite", Console(file=io.StringIO(), width=200)
    for name, found in (("a", timings(10.0)), ("b", timings(10.0, day=2)), ("c", timings(11.0, day=2))):
        (tmp_path / name).write_text(found.model_dump_json())
        past.history(place, console, artifact="", machine="", add=tmp_path / name)
    assert [point.itl_ms for point in history.trends(place)[0].points] == [10.0, 11.0]
    assert "nothing added" in console.file.getvalue()
    with sqlite3.connect(place) as base:  # damaged, or of another form
        base.executemany(
            "INSERT INTO run (time, machine, cpu, edgetune, evidence) VALUES ('t', ?, 'c', '0', ?)",
            [(history.machine_id(found.machine), blob) for blob in (b"cut", "text", zlib.compress(b"[]"))],
        )
    assert history.holds(place, timings(10.0))
    assert not history.holds(place, timings(12.0))


def add(place: Path, day: int) -> None:
    for _ in range(5):
        history.record(place, timings(10.0, day=day))


def test_two_runs_at_once_lose_nothing(tmp_path: Path) -> None:
    place = tmp_path / "history.sqlite"
    both = [multiprocessing.get_context("fork").Process(target=add, args=(place, day)) for day in (1, 2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    (trend,) = history.trends(place)
    assert len(trend.points) == 10
    with sqlite3.connect(place) as base:
        assert base.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_another_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("not a database, and long enough to be read as a header of one" * 3)
    before = text.read_bytes()
    with pytest.raises(ArtifactError, match="cannot be used as history"):
        history.record(text, timings(1.0))
    assert text.read_bytes() == before
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="folder cannot be used as history: unable to open database file"):
        history.record(tmp_path / "folder", timings(1.0))
    foreign = tmp_path / "other.sqlite"
    with sqlite3.connect(foreign) as base:
        base.execute("CREATE TABLE mine (x)")
    with pytest.raises(ArtifactError, match="no history of this edgetune"):
        history.record(foreign, timings(1.0))
