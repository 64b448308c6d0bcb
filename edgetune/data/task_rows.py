"""Rows of a recipe's tasks: what is asked, what is right, what may be chosen. Every fault names its file and line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.data.formats import read_rows
from edgetune.errors import DataError
from edgetune.recipe_tasks import Task

Turns = tuple[tuple[str, str], ...]  # (role, content)


@dataclass(frozen=True)
class Example:
    """One row. `prompt` is empty where the row is a plain text, which `answers` then holds."""

    prompt: Turns
    answers: tuple[str, ...]  # accepted ones, the first is scored under its own prefix
    choices: tuple[str, ...]  # labels or choices, of which `answers` holds the right one; else empty
    row: dict[str, Any]  # as it was written, for the user's own scorer
    line: int


def read_examples(task: Task) -> list[Example]:
    """Read the rows of a task. Raises DataError naming file, line, what was found and what to do."""
    path = Path(task.rows)
    if task.kind in ("generation", "classification"):
        return _conversations(task, path)
    kinds = {"multiple_choice": _multiple_choice, "question_answering": _question, "perplexity": _text}
    return [kinds[task.kind](task, row, line, f"{path} line {line}") for line, row in _objects(path, task.n_rows)]


def _conversations(task: Task, path: Path) -> list[Example]:
    """Rows in the formats of training data; of a classification the answer is the label."""
    found = []
    objects = _objects(path, task.n_rows)
    for row, (_, raw) in zip(read_rows(path, "auto", task.n_rows), objects, strict=True):
        if row.text is not None:
            raise DataError(f"{path} line {row.line}: {task.kind} needs a question and an answer, found a plain text")
        found.append(Example(_asked(task, row.messages[:-1]), (row.messages[-1][1],), (), raw, row.line))
    if task.kind == "generation":
        return found
    labels = tuple(task.labels or sorted({example.answers[0] for example in found}))
    if len(labels) < 2:
        raise DataError(f"{path}: a classification needs two labels, found {labels[0]!r} alone; name them in labels")
    for example in found:
        if example.answers[0] not in labels:
            raise DataError(
                f"{path} line {example.line}: label {example.answers[0]!r} is not one of labels; add it or mend the row"
            )
    occur = {example.answers[0] for example in found}
    if "auc" in task.measured and len(occur) < 2:
        raise DataError(
            f"{path}: auc needs rows of two labels, found {occur.pop()!r} alone; add rows of another label or leave "
            "auc out of metrics"
        )
    return [Example(one.prompt, one.answers, labels, one.row, one.line) for one in found]


def _multiple_choice(task: Task, row: dict[str, Any], line: int, where: str) -> Example:
    choices = _texts(row, "choices", where)
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise DataError(f"{where}: 'choices' must hold at least two different texts, found {len(choices)}")
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if answer not in choices:
        raise DataError(f"{where}: 'answer' must be one of the choices or its number from 0, found {answer!r}")
    prompt = _asked(task, (("user", _text_of(row, "question", where)),))
    return Example(prompt, (answer,), choices, row, line)


def _question(task: Task, row: dict[str, Any], line: int, where: str) -> Example:
    question = _text_of(row, "question", where)
    asked = f"{_text_of(row, 'context', where)}\n\n{question}" if row.get("context") else question
    return Example(_asked(task, (("user", asked),)), _texts(row, "answers", where), (), row, line)


def _text(task: Task, row: dict[str, Any], line: int, where: str) -> Example:
    return Example((), (_text_of(row, "text", where),), (), row, line)


def _asked(task: Task, turns: Turns) -> Turns:
    return (("system", task.instruction), *turns) if task.instruction and turns[0][0] != "system" else turns


def _objects(path: Path, limit: int | None) -> list[tuple[int, dict[str, Any]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a JSONL file") from error
    for number, raw in enumerate(lines, 1):
        if len(found) == limit:
            break
        if not raw.strip():
            continue
        try:
            row = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{path} line {number}: not JSON in UTF-8 ({error}); give one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path} line {number}: found a JSON {type(row).__name__}, a row is an object")
        found.append((number, row))
    if not found:
        raise DataError(f"{path}: holds no rows; give one JSON object a line")
    return found


def _text_of(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key!r} must be a text that is not empty, found {repr(value)[:40]}")
    return value


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    values = row.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(v, str) and v.strip() for v in values):
        raise DataError(f"{where}: {key!r} must be a list of texts that are not empty, found {repr(values)[:40]}")
    return tuple(values)
