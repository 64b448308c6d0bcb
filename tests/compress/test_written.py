"""Rows that a model writes itself: whole, new, of a user's turn and an answer, and the same from the same seed."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from edgetune.artifact import Artifact
from edgetune.cli import app
from edgetune.compress import written
from edgetune.data.formats import read_rows
from edgetune.data.golden import Golden
from edgetune.errors import DataError

SEED, HOT = 3, 30.0  # a random model is sure of itself: only heat lets it come to an end token


def write(model: Artifact, out: Path, *, n_tokens: int = 400, most: int = 64, seed: int = SEED) -> list[str]:
    torch.manual_seed(0)
    n = written.write(model, out, n_tokens=n_tokens, max_new_tokens=most, temperature=HOT, seed=seed)
    lines = out.read_text(encoding="utf-8").splitlines()
    assert len(lines) == n
    return lines


def without_template(model: Artifact, folder: Path) -> Artifact:
    """The same model, whose tokenizer and golden conversations know no template."""
    folder.mkdir()
    for file in model.path.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    golden = Golden.read(folder)
    golden.model_copy(update={"chat_template": "", "conversations": []}).write(folder)
    return Artifact(folder, model.manifest)


def test_a_model_with_a_template_writes_questions_and_answers(tiny_model: Artifact, tmp_path: Path) -> None:
    rows = [json.loads(line)["messages"] for line in write(tiny_model, tmp_path / "rows.jsonl")]
    assert len(rows) > 3
    for system, asked, answer in rows:
        assert system == {"role": "system", "content": "Turn the command into JSON."}  # the training's
        assert (asked["role"], answer["role"]) == ("user", "assistant")
        assert asked["content"]
        assert answer["content"]
        assert "<|im_" not in asked["content"] + answer["content"]
    assert len({asked["content"] for _, asked, _ in rows}) == len(rows)
    read = read_rows(tmp_path / "rows.jsonl")  # as any training rows
    assert [row.messages[-1][1] for row in read] == [row[-1]["content"] for row in rows]


def test_a_seed_writes_its_rows_again_and_another_seed_others(tiny_model: Artifact, tmp_path: Path) -> None:
    first = write(tiny_model, tmp_path / "a.jsonl")
    assert write(tiny_model, tmp_path / "b.jsonl") == first
    assert write(tiny_model, tmp_path / "c.jsonl", seed=SEED + 1) != first
    assert write(tiny_model, tmp_path / "d.jsonl", n_tokens=2000)[: len(first)] == first


def test_a_model_without_a_template_writes_text(tiny_model: Artifact, tmp_path: Path) -> None:
    model = without_template(tiny_model, tmp_path / "plain")
    rows = [json.loads(line) for line in write(model, tmp_path / "rows.jsonl", most=16)]
    assert all(set(row) == {"text"} for row in rows)
    assert sum(len(row["text"]) for row in rows) > 400  # cut at 16 tokens, and kept


def test_a_model_that_comes_to_no_end_is_given_up(tiny_model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none ended within 2 tokens"):
        written.write(tiny_model, tmp_path / "rows.jsonl", n_tokens=100, max_new_tokens=2, temperature=0.01)
    assert not (tmp_path / "rows.jsonl").exists()


def test_the_verb_writes_and_does_not_overwrite(tiny_model: Artifact, tmp_path: Path) -> None:
    asked = ["data", "write", str(tiny_model.path), "--out", str(tmp_path / "new" / "rows.jsonl"), "--tokens", "200",
             "--max-new-tokens", "64", "--temperature", "30", "--store", str(tmp_path / "store")]  # fmt: skip
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].endswith("rows")
    assert read_rows(tmp_path / "new" / "rows.jsonl")
    assert "is there already" in str(CliRunner().invoke(app, asked).exception)
