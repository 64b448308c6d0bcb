"""Row formats: alpaca, chat and plain text, read from JSONL. Every fault names its file and line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgetune.errors import DataError

Format = Literal["auto", "alpaca", "chat", "text"]
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Row:
    """A conversation that ends with an assistant turn, or a plain text (then `messages` is empty)."""

    messages: tuple[tuple[str, str], ...]  # (role, content)
    text: str | None
    line: int

    @property
    def prompt(self) -> str:
        """What is asked, in a form that tells equal rows: all but the last turn, or the text."""
        if self.text is not None:
            return " ".join(self.text.split())
        return "\n".join(f"{role}: {' '.join(content.split())}" for role, content in self.messages[:-1])

    @property
    def as_dicts(self) -> list[dict[str, str]]:
        return [{"role": role, "content": content} for role, content in self.messages]


def read_rows(path: Path, form: Format = "auto", limit: int | None = None) -> list[Row]:
    """Read a JSONL file. Raises DataError naming file, line, what was found and what to do."""
    rows: list[Row] = []
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, 1):
                if limit is not None and len(rows) == limit:
                    break
                if raw.strip():
                    rows.append(_parse(raw, form, f"{path} line {number}", number))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a JSONL file") from error
    if not rows:
        raise DataError(f"{path}: holds no rows; give one JSON object a line")
    return rows


def detect(row: dict[str, Any]) -> Format | None:
    """Tell the format of a row by its keys, or None."""
    if "messages" in row:
        return "chat"
    if "output" in row and ("instruction" in row or "input" in row):
        return "alpaca"
    return "text" if "text" in row else None


def _parse(raw: bytes, form: Format, where: str, line: int) -> Row:
    try:
        row = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); give one JSON object a line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: found a JSON {type(row).__name__}, a row is an object")
    kind = detect(row) if form == "auto" else form
    if kind == "chat":
        return Row(_messages(row, where), None, line)
    if kind == "alpaca":
        return Row(_alpaca(row, where), None, line)
    if kind == "text":
        return Row((), _field(row, "text", where), line)
    raise DataError(
        f"{where}: found the keys {', '.join(map(repr, row)) or 'none'}; a row has instruction/input/output, "
        "messages or text"
    )


def _field(row: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    value = row.get(key, "" if empty else None)
    if not isinstance(value, str) or (not empty and not value.strip()):
        found = "nothing" if value is None else repr(value)[:40]
        raise DataError(f"{where}: {key!r} must be a text that is not empty, found {found}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key!r} holds half a character ({error.reason}); mend the text") from error
    return value


def _alpaca(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """The instruction becomes the system turn when there is an input, else it is the user's turn."""
    output = _field(row, "output", where)
    given = _field(row, "input", where, empty=True)
    if not given.strip():
        return (("user", _field(row, "instruction", where)), ("assistant", output))
    instruction = _field(row, "instruction", where, empty=True)
    system = (("system", instruction),) if instruction.strip() else ()
    return (*system, ("user", given), ("assistant", output))


def _messages(row: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    messages = row.get("messages")
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: 'messages' must be a list of at least two turns")
    turns = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{where}: messages[{index}] must have a role of {', '.join(ROLES)}")
        turns.append((message["role"], _field(message, "content", f"{where}: messages[{index}]")))
    if turns[-1][0] != "assistant" or turns[-2][0] != "user":
        raise DataError(f"{where}: the last two turns must be user and assistant, found {turns[-2][0]}, {turns[-1][0]}")
    if next((role for role, _ in turns if role != "system"), None) == "assistant":
        raise DataError(f"{where}: the first turn is an assistant's; a conversation begins with the user")
    return tuple(turns)
