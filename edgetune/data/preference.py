"""Rows of preference training: pairs (`prompt, chosen, rejected`) and labelled answers (`prompt, completion, label`).

Prompt and answers are texts or lists of turns. A pair may leave the prompt out where both answers are whole
conversations: the turns that they share are the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune.data.formats import (
    ANSWER,
    Format,
    Row,
    Turn,
    as_label,
    check_turns,
    detect,
    parse_all,
    parse_tools,
    parse_turns,
    refusal,
    text_field,
)
from edgetune.data.records import Record
from edgetune.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer, and what else the template is given."""

    messages: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...] = ()
    extras: tuple[dict[str, Any], ...] = ()  # as in Row

    def with_answer(self, answer: str, line: int, form: Format) -> Row:
        """The conversation that ends with this answer, to be rendered as any other."""
        extras = (*self.extras, {}) if self.extras else ()
        shown = frozenset(i for i, (role, _) in enumerate(self.messages) if role == "assistant")
        return Row((*self.messages, ("assistant", answer)), None, line, self.tools, extras, shown, form)


@dataclass(frozen=True)
class PreferenceRow:
    """A prompt and two answers, the first of which is the better."""

    prompt: Prompt
    chosen: str
    rejected: str
    line: int

    @property
    def rows(self) -> tuple[Row, Row]:
        """Both conversations: the chosen, then the rejected."""
        chosen, rejected = (
            self.prompt.with_answer(answer, self.line, "preference") for answer in (self.chosen, self.rejected)
        )
        return chosen, rejected


@dataclass(frozen=True)
class KtoRow:
    """A prompt, an answer, and whether the answer is a good one."""

    prompt: Prompt
    completion: str
    label: bool
    line: int

    @property
    def row(self) -> Row:
        return self.prompt.with_answer(self.completion, self.line, "kto")


def read_preferences(path: Path, form: Format = "auto", limit: int | None = None) -> list[PreferenceRow]:
    """Read preference pairs. Raises DataError naming file and line; other rows are refused."""
    return list(parse_all(path, limit, lambda record: parse_preference(record, form)))


def read_kto(path: Path, form: Format = "auto", limit: int | None = None) -> list[KtoRow]:
    """Read labelled answers. Raises DataError naming file and line, or where all labels are the same."""
    rows = list(parse_all(path, limit, lambda record: parse_kto(record, form)))
    labels = {row.label for row in rows}
    if len(labels) == 1:
        raise DataError(f"{path}: every row is labelled {str(labels.pop()).lower()}; give good and bad answers")
    return rows


def parse_preference(record: Record, form: Format) -> PreferenceRow:
    """Parse one record as a pair. Raises DataError."""
    row, where = record.values, record.where
    kind = detect(row) if form == "auto" else form
    if kind != "preference":
        raise DataError(f"{where}: {refusal(row, kind, 'preference pairs (prompt, chosen, rejected)')}")
    chosen, rejected = (parse_turns(row, key, "assistant", where) for key in ("chosen", "rejected"))
    if row.get("prompt") is not None:
        prompt = parse_turns(row, "prompt", "user", where)
    else:
        prompt = [a for a, b in zip(chosen[:-1], rejected[:-1], strict=False) if a == b]
    n_shared = len(prompt) if prompt and chosen[: len(prompt)] == rejected[: len(prompt)] == prompt else 0
    asked = _prompt(prompt, row, where)
    answers = [_answer(turns[n_shared:], key, where) for key, turns in (("chosen", chosen), ("rejected", rejected))]
    if answers[0] == answers[1]:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same text; the pair says nothing")
    return PreferenceRow(asked, answers[0], answers[1], record.line)


def parse_kto(record: Record, form: Format) -> KtoRow:
    """Parse one record as a labelled answer. Raises DataError."""
    row, where = record.values, record.where
    kind = detect(row) if form == "auto" else form
    if kind != "kto":
        raise DataError(f"{where}: {refusal(row, kind, 'labelled answers (prompt, completion, label)')}")
    label = as_label(row.get("label"))
    if label is None:
        raise DataError(f"{where}: 'label' is true (a good answer) or false (a bad one), found {row.get('label')!r}")
    prompt = _prompt(parse_turns(row, "prompt", "user", where), row, where)
    return KtoRow(prompt, _answer(parse_turns(row, *ANSWER, where), "completion", where), label, record.line)


def _prompt(turns: list[dict[str, Any]], row: dict[str, Any], where: str) -> Prompt:
    if not turns:
        raise DataError(f"{where}: no 'prompt', and no turn that 'chosen' and 'rejected' share; give a prompt")
    messages, extras = check_turns(turns, "prompt", where)
    if messages[-1][0] not in ("user", "tool"):
        raise DataError(f"{where}: the prompt must end with a user's turn, found {messages[-1][0]}")
    return Prompt(messages, parse_tools(row, where), extras)


def _answer(turns: list[Any], key: str, where: str) -> str:
    if len(turns) != 1 or not isinstance(turns[0], dict) or turns[0].get("role") != "assistant":
        raise DataError(f"{where}: {key!r} must be one answer: a text, or one assistant turn after the prompt")
    if turns[0].get("tool_calls"):
        raise DataError(f"{where}: {key!r} has tool_calls, which preference training does not read; leave the row out")
    return text_field(turns[0], "content", f"{where}: {key}")
