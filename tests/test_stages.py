"""What a run tells of its stages: the time that making took, once, and which of them failed."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgetune.artifact import Artifact, Store, draft
from edgetune.errors import StageError
from edgetune.stages import LOG, Stages


def stages(folder: Path) -> Stages:
    return Stages(Store(folder / "store"), folder / "run", Console(file=io.StringIO(), width=200))


def make(out: Path, _: Any) -> Artifact:
    with draft(out, kind="evidence", stage="test/1", config={}) as pending:
        (pending.path / "file").write_text("made")
    return pending.artifact


@pytest.fixture
def identity(tmp_path: Path) -> str:
    return make(tmp_path / "planned", None).identity


def test_the_time_of_a_stage_is_told_once_and_again_by_the_next_run(tmp_path: Path, identity: str) -> None:
    first = stages(tmp_path)
    first.run("few: weights", identity, make)
    first.run("more: weights", identity, make)
    took = first.done[0]["seconds"]
    assert [(one["seconds"], one["done_before"]) for one in first.done] == [(took, False), (None, True)]
    log = tmp_path / "run" / LOG
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    entries[1]["seconds"] = 12.5
    cut = json.dumps(entries[1] | {"seconds": 99.0})[:-9]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "[]\n" + cut)
    again = stages(tmp_path)
    again.run("few: weights", identity, make)
    again.run("more: weights", identity, make)
    assert [(one["seconds"], one["done_before"]) for one in again.done] == [(12.5, True), (None, True)]
    elsewhere = Stages(Store(tmp_path / "store"), tmp_path / "other", Console(file=io.StringIO()))
    elsewhere.run("few: weights", identity, make)
    assert elsewhere.done[0]["seconds"] is None


def test_a_failure_has_the_name_of_the_stage_that_failed(tmp_path: Path, identity: str) -> None:
    line = stages(tmp_path)

    def fail(_: Path, __: Any) -> Artifact:
        raise StageError("not finite")

    def work() -> Artifact:
        line.run("q4: importance matrix", identity, make)
        return line.run("q4: sensitivity of layers", "0" * 64, fail)

    assert line.attempt("q4", "q4: gguf", work) is None
    assert line.attempt("q8", "q8: gguf", lambda: fail(tmp_path, None)) is None
    assert [failure.stage for failure in line.failures] == ["q4: sensitivity of layers", "q8: gguf"]
