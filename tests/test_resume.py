"""SIGKILL in the middle of a real run, then two runs in its folder: the same bytes. And which moments kill.py draws."""

from __future__ import annotations

import importlib
import io
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from edgetune import sources
from edgetune.adapt.callbacks import SEAL
from edgetune.artifact import Store
from edgetune.pipeline import Pipeline
from edgetune.plan import preflight
from edgetune.recipe import load_recipe
from edgetune.runtime.report.write import read_report
from edgetune.stages import Stages
from edgetune.steps import Steps

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DEADLINE_S = 120


@pytest.fixture(scope="module")
def kill() -> Iterator[ModuleType]:
    """benchmarks/kill.py: its runs are forked from a process that has imported torch."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("kill")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def recipe(kill: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The benchmark's recipe with the smallest candidate alone and no general questions."""
    file: Path = kill.make_recipe(tmp_path_factory.mktemp("recipe"))
    raw = json.loads(file.read_text())
    raw["candidates"] = {"gguf": {"export": {"gguf": {"type": "Q8_0"}}}}
    raw["data"]["general_probe"] = None
    file.write_text(json.dumps(raw))
    return file


def build(recipe: Path, home: Path) -> None:
    """Make all that ships without measuring it; a process of its own, as the number of torch's threads is of one."""
    loaded = load_recipe(recipe)
    line = Pipeline(loaded, preflight(loaded), Stages(Store(home / "store"), home / "run", Console(file=io.StringIO())))
    base, model = line.prepare(), line.adapt()
    line.steps = Steps(loaded, line.stages, line.graph, base, model)
    for name, candidate in loaded.candidates.items():
        assert line.build(name, candidate) is not None


def sealed(store: Path) -> bool:
    """Whether some training has a whole checkpoint."""
    try:
        return any(store.glob(f".*.work/checkpoint-*/{SEAL}"))
    except FileNotFoundError:  # a folder that went while it was being looked into
        return False


def test_a_killed_run_goes_on_in_two_runs_at_once_to_the_same_bytes(
    kill: ModuleType, recipe: Path, tmp_path: Path
) -> None:
    whole, home = tmp_path / "whole", tmp_path / "killed"
    killed_run = importlib.import_module("killed_run")  # kill.py has imported it
    uninterrupted = killed_run.FORKS.Process(target=build, args=(recipe, whole))
    uninterrupted.start()
    process = killed_run.start(recipe, home, kill.Moment())
    deadline = time.monotonic() + DEADLINE_S
    while not sealed(home / "store"):
        assert process.exitcode is None, kill.last_line(home)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert kill.kill_group(process) == 0
    before, torn = kill.in_store(home / "store")
    assert torn == []
    assert [found.manifest.stage for found in before.values()] == [sources.STAGE]  # the adapter is half done
    uninterrupted.join(DEADLINE_S)
    assert uninterrupted.exitcode == 0

    runs = [killed_run.start(recipe, home, kill.Moment()) for _ in range(2)]
    for one in runs:
        one.join(DEADLINE_S)
    kill.LIVE.clear()
    assert [one.exitcode for one in runs] == [0, 0], kill.last_line(home)
    shipped = kill.shipped(home / "store")
    assert {name.split()[0] for name in shipped} == {"model", "adapter", "gguf"}
    assert shipped == kill.shipped(whole / "store")
    log = [json.loads(line) for line in (home / "run" / "log.jsonl").read_text().splitlines()]
    made = [entry["stage"] for entry in log if entry.get("made_now") and entry["stage"] != "latency"]
    assert {"base", "adapt", "merge", "gguf: gguf Q8_0", "gguf: accuracy"} <= set(made)
    assert len(made) == len(set(made))  # by one of the two
    assert read_report(home / "run" / "report.json").verdicts


def test_both_sides_of_each_rename_or_one(kill: ModuleType) -> None:
    def around(n_renames: int | None, *, one_side: bool) -> list[Any]:
        moments = kill._moments(random.Random(0), 5, n_renames, 4, 10.0, one_side=one_side)
        assert all(0 <= moment.seconds <= 10 for moment in moments[:5])
        return [(moment.rename, moment.side) for moment in moments[5:]]

    assert around(None, one_side=False) == [(k, side) for k in range(4) for side in ("before", "after")]
    assert [k for k, _ in around(None, one_side=True)] == [0, 1, 2, 3]
    assert len(around(3, one_side=False)) == 3


def test_a_moment_after_the_end_is_drawn_again(
    kill: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(_: Path, home: Path) -> tuple[bool, float]:
        home.mkdir(parents=True)
        (home / "renames.log").write_text("a\nb\n")
        return True, 10.0

    def attempt(_: Path, home: Path, moment: Any, expected: object) -> Any:
        home.mkdir()
        ended_before = moment.seconds is not None and moment.seconds > 6
        return kill.Kill(moment, killed=not ended_before)

    monkeypatch.setattr(kill, "make_recipe", lambda folder: folder / "recipe.yaml")
    monkeypatch.setattr(kill, "finish", finish)
    monkeypatch.setattr(kill, "attempt", attempt)
    monkeypatch.setattr(kill, "shipped", lambda _: {f"{kind} x": "" for kind in kill.SHIPS})
    out = tmp_path / "kill.json"
    assert kill.benchmark(20, None, 0, 2, out, one_side=True, add=False) == 0
    found = json.loads(out.read_text())
    assert found["totals"]["at_random_moments"] == 20
    assert found["totals"]["ended_before"] > 0
    assert found["totals"]["kills"] == 22
    assert found["one_side"] is True
    assert "kills=22 lost=0" in capsys.readouterr().out

    assert kill.benchmark(23, None, 0, 2, out, one_side=False, add=True) == 0  # three moments and two sides are lacking
    more = json.loads(out.read_text())
    assert more["kills"][: len(found["kills"])] == found["kills"]
    assert more["totals"]["at_random_moments"] == 23
    around = [(k["moment"]["rename"], k["moment"]["side"]) for k in more["kills"] if k["moment"]["seconds"] is None]
    assert sorted(around) == [(k, side) for k in (0, 1) for side in ("after", "before")]
    assert more["earlier_calls"][0]["kills"] == len(found["kills"])


def test_a_run_that_fails_by_itself_is_not_drawn_again(kill: ModuleType) -> None:
    failed = kill.Kill(kill.Moment(seconds=1.0), lost=["first run ended with 1: no"])
    late = kill.Kill(kill.Moment(seconds=9.0))
    assert kill._missed([failed, late, kill.Kill(kill.Moment(rename=3, side="before"))]) == 1
