"""`edgetune data check` as a user meets it: tables, files, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.artifact import Artifact
from edgetune.data.check.findings import DataReport
from tests.conftest import Call
from tests.data.test_check import FAULTY, HELD
from tests.data.test_formats import write
from tests.test_cli import child

RECIPE = """
name: a
base: {base}
data:
  train: [{{path: {train}}}]
  heldout: {heldout}
  max_length: 100
  check: {{refused: 0.5, overlap: 0.5, without_loss: 0.5, trivial: {trivial}}}
candidates: {{x: {{}}}}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    heldout = write(tmp_path, *HELD).rename(tmp_path / "heldout.jsonl")
    return write(tmp_path, *FAULTY), heldout


def test_a_file_without_a_model(call: Call, files: tuple[Path, Path]) -> None:
    code, out, err = call("data", "check", str(files[0]))
    assert (code, err) == (3, "")
    assert "Rows that training cannot read" in out
    assert "Whole row, characters: " in out
    assert "longer than" not in out


def test_json_and_page_are_written(call: Call, files: tuple[Path, Path], tmp_path: Path) -> None:
    places = [tmp_path / "out" / "a.json", tmp_path / "out" / "a.html"]
    code, _, _ = call(
        "data", "check", str(files[0]), "--heldout", str(files[1]), "--json", str(places[0]), "--html", str(places[1])
    )
    assert code == 3
    report = DataReport.model_validate(json.loads(places[0].read_text()))
    assert [file.heldout for file in report.files] == [False, True]
    assert places[1].read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("trivial", "code"), [("null", 0), (0.05, 3)])
def test_a_recipe_sets_base_files_and_limits(
    call: Call, files: tuple[Path, Path], tmp_path: Path, tiny_model: Artifact, trivial: object, code: int
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=tiny_model.path, train=files[0], heldout=files[1], trivial=trivial))
    found, out, err = call("data", "check", "--recipe", str(recipe), "--store", str(tmp_path / "store"))
    assert (found, err) == (code, "")
    assert "Training rows longer than 100 tokens" in out
    assert "heldout.jsonl: 3 rows, held out, completion" in out


@pytest.mark.parametrize(
    ("limits", "code", "says"),
    [
        ({"min_evenness": 1}, 3, "evenness 0.469, at least 1 is wanted"),
        ({"languages": ["fr"]}, 3, "Questions in a language other than fr"),
        ({"languages": ["en"], "min_evenness": 0.3}, 0, "at least 0.3 is wanted"),
        ({"languages": ["english"]}, 2, "data.check.languages.0: String should match pattern"),
    ],
)
def test_labels_and_languages_over_a_limit(
    call: Call, tmp_path: Path, tiny_model: Artifact, limits: dict[str, object], code: int, says: str
) -> None:
    texts = [f"Please switch the light number {i} in the kitchen on" for i in range(10)]
    train = write(
        tmp_path, *({"prompt": text, "completion": "no" if i == 3 else "yes"} for i, text in enumerate(texts))
    )
    train = train.rename(tmp_path / "train.jsonl")
    heldout = write(tmp_path, {"prompt": "Is it on?", "completion": "no"})
    raw = {"train": str(train), "heldout": str(heldout), "check": limits}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"name": "a", "base": str(tiny_model.path), "data": raw, "candidates": {"x": {}}}))
    found, out, err = call("data", "check", "--recipe", str(recipe), "--store", str(tmp_path / "store"))
    assert (found, says in out + err) == (code, True), out + err


def test_rows_of_prefer_are_checked_beside_those_of_data(
    call: Call, files: tuple[Path, Path], tmp_path: Path, tiny_model: Artifact
) -> None:
    recipe, pairs, train = (tmp_path / name for name in ("recipe.yaml", "pairs.jsonl", "clean.jsonl"))
    rows = [{"prompt": "turn it on", "chosen": "on", "rejected": "off"}, {"prompt": "x", "completion": "y"}]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train.write_text(json.dumps({"prompt": "dim the lamp", "completion": "dimmed"}) + "\n")
    text = RECIPE.format(base=tiny_model.path, train=train, heldout=files[1], trivial="null")
    recipe.write_text(f"{text}prefer: {{method: dpo, train: {pairs}}}\n")
    place, store = tmp_path / "found.json", str(tmp_path / "store")
    code, out, err = call("data", "check", "--recipe", str(recipe), "--store", store, "--json", str(place))
    assert (code, err) == (0, "")
    assert "pairs.jsonl: 1 rows, train, preference" in out
    assert "Training rows longer than 512 tokens" in out
    found = [DataReport.model_validate_json(path.read_text()) for path in (place, tmp_path / "found-prefer.json")]
    names = [[Path(file.path).name for file in report.files] for report in found]
    assert names == [["clean.jsonl", "heldout.jsonl"], ["pairs.jsonl", "heldout.jsonl"]]
    assert [next(one.rows for one in report.findings if one.key == "refused") for report in found] == [0, 1]
    recipe.write_text(recipe.read_text().replace("refused: 0.5", "refused: 0.1"))
    assert call("data", "check", "--recipe", str(recipe), "--store", store)[0] == 3


def test_rows_that_run_refuses_are_over_the_limit(call: Call, tmp_path: Path, tiny_model: Artifact) -> None:
    rows = [{"prompt": "turn it on", "chosen": "on", "rejected": "off"}, {"prompt": "dim it", "completion": "dim"}]
    heldout = write(tmp_path, *HELD).rename(tmp_path / "heldout.jsonl")
    train, recipe = write(tmp_path, *rows), tmp_path / "recipe.yaml"
    text = RECIPE.format(base=tiny_model.path, train=train, heldout=heldout, trivial="null")
    recipe.write_text(text.replace("refused: 0.5", "refused: 0"))
    code, out, _ = call("data", "check", "--recipe", str(recipe), "--store", str(tmp_path / "store"))
    assert code == 3
    assert "rows.jsonl: 1 rows, train, completion" in out


def test_faults_are_one_line(call: Call, files: tuple[Path, Path], tmp_path: Path) -> None:
    assert call("data", "check")[2] == "edgetune: data check: name files with training rows, or a --recipe\n"
    code, _, err = call("data", "check", str(files[0]), "--format", "sharegpt")
    assert (code, err.startswith("edgetune: --format 'sharegpt' is not known; use auto, alpaca, chat")) == (2, True)
    code, _, err = call("data", "check", str(tmp_path / "no.jsonl"))
    assert code == 2
    assert "no.jsonl: cannot be read" in err


def test_help_loads_nothing_heavy() -> None:
    ended = child("data", "check", "--help")
    assert ended.returncode == 0
    assert "LOADED []" in ended.stderr
