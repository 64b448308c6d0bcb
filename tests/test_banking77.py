"""The rows, the recipe and the files of benchmarks/banking77.py, without a run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from edgetune.recipe import load_recipe
from edgetune.runtime.report.write import write_report
from tests.report_sample import sample_report

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
INTENTS = ("card_arrival", "Refund_not_showing_up", "age_limit")


@pytest.fixture
def banking(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    import importlib

    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("banking77")


def rows(first: int, n: int) -> list[dict[str, str]]:
    return [
        {"instruction": "Name the intent.", "input": f"Question {i} ?", "output": INTENTS[i % 3].replace("_", " ")}
        for i in range(first, first + n)
    ]


def test_labels_become_words(banking: ModuleType, tmp_path: Path) -> None:
    given = {"instruction": "Classify.", "input": "Where is it?", "output": "card_arrival"}
    (tmp_path / "train.jsonl").write_text(json.dumps(given) + "\n")
    assert banking.read(tmp_path / "train.jsonl") == [
        given | {"instruction": "Name the intent.", "output": "card arrival"}
    ]
    with pytest.raises(SystemExit, match="give the folder of banking77 with --data"):
        banking.read(tmp_path / "test.jsonl")


def test_heldout_rows_are_balanced_and_never_trained_on(banking: ModuleType) -> None:
    given = [*rows(0, 60), *rows(0, 6), {"instruction": "x", "input": " QUESTION  101 ?", "output": "age limit"}]
    train, heldout = banking.choose(given, rows(100, 30), 50, 12, seed=0)
    assert Counter(row["output"] for row in heldout) == dict.fromkeys(Counter(r["output"] for r in rows(0, 3)), 4)
    assert len({row["output"] for row in heldout[:3]}) == 3  # so is the task of their first rows
    asked = [banking.asked(row) for row in train]
    assert len(asked) == len(set(asked)) == 50
    assert not {banking.asked(row) for row in heldout} & set(asked)
    everything, _ = banking.choose(given, rows(100, 30), 1000, 30, seed=0)
    assert len(everything) == 60
    assert banking.choose(given, rows(100, 30), 50, 12, seed=1) != (train, heldout)


@pytest.mark.parametrize("quick", [True, False])
def test_the_recipe_is_whole(banking: ModuleType, tmp_path: Path, quick: bool) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        yaml.safe_dump(banking.make_recipe(Path("rows"), ["card arrival", "age limit"], n_task=2, quick=quick))
    )
    recipe = load_recipe(file)
    assert len(recipe.candidates) == 5
    assert recipe.tasks[0].measured == ("accuracy", "macro_f1")
    assert (recipe.adapt is not None and recipe.adapt.max_steps) == (4 if quick else None)


def test_the_last_line_is_of_pairs(banking: ModuleType) -> None:
    report = sample_report(n_rows=40)
    scored = [task.model_copy(update={"figures": task.figures | {"macro_f1": 0.5}}) for task in report.tasks]
    stages = [stage | {"name": stage["name"].removesuffix(".sft")} for stage in report.stages]
    found = [
        dict(pair.split("=") for pair in banking.said(report.model_copy(update={"tasks": scored, "stages": s})).split())
        for s in (stages, [stage | {"done_before": False} for stage in stages])
    ]
    assert found[0] == {key: value for key, value in found[1].items() if not key.endswith("_s")}
    assert (found[1]["ships"], found[1]["macro_f1"], found[1]["adapt_s"]) == ("none", "0.500", "1284")
    exact = {a.subject.name: sum(row.exact for row in a.rows) for a in report.accuracy}
    assert float(found[1]["loss_student-q4"]) == pytest.approx(2.5 * (exact["reference"] - exact["student-q4"]))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine: apt-get install chromium")
def test_an_example_holds_page_picture_and_what_may_be_committed(
    banking: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("playwright")
    report = sample_report(n_rows=40)
    write_report(report, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text("name: a\n")
    example = tmp_path / "example"
    banking.copy(tmp_path / "run", tmp_path / "recipe.yaml", example)
    found = {file.name for file in example.iterdir()}
    assert found == {"README.md", "recipe.yaml", "report.html", "report.json", "report.png"}
    assert (example / "report.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "run" / "report.md").read_text() in (example / "README.md").read_text()
    monkeypatch.setattr(banking, "LARGEST", 1000)
    banking.copy(tmp_path / "run", tmp_path / "recipe.yaml", example)
    assert not (example / "report.json").exists()
    assert "MB and is not kept here" in capsys.readouterr().out
    assert "MB and is not kept here" in (example / "README.md").read_text()
