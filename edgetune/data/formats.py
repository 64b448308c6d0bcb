"""Row formats of supervised training: alpaca, chat, prompt and completion, plain text. A fault names file and line.

Preference pairs and labelled answers have row types of their own in `preference`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgetune.data.records import Record, decoded, read_records
from edgetune.errors import DataError

Format = Literal["auto", "alpaca", "chat", "completion", "text", "preference", "kto"]
Turn = tuple[str, str]  # role, content
R = TypeVar("R")
ROLES = ("system", "user", "assistant", "tool")
ANSWER = ("completion", "assistant")  # field and role
KNOWN = "instruction/input/output, messages, prompt/completion, text, prompt/chosen/rejected or prompt/completion/label"


@dataclass(frozen=True)
class Row:
    """A conversation that ends with an assistant turn, or a plain text (then `messages` is empty)."""

    messages: tuple[Turn, ...]
    text: str | None
    line: int
    tools: tuple[dict[str, Any], ...] = ()  # what the assistant may call, as the template's `tools`
    extras: tuple[dict[str, Any], ...] = ()  # a turn's tool_calls, name and tool_call_id; () where no turn has any
    muted: frozenset[int] = frozenset()  # assistant turns that are shown and not learned
    form: Format = field(default="auto", compare=False)  # the format that was found

    @property
    def prompt(self) -> str:
        """What is asked, in a form that tells equal rows: all but the last turn, or the text."""
        return self._before(len(self.messages) - 1)

    @property
    def prompts(self) -> list[str]:
        """What each answer that is learned answers, in the form of `prompt`; a text is one of its own."""
        if self.text is not None:
            return [self.prompt]
        answers = (i for i, (role, _) in enumerate(self.messages) if role == "assistant" and i not in self.muted)
        return [self._before(i) for i in answers]

    def _before(self, turn: int) -> str:
        if self.text is not None:
            return " ".join(self.text.split())
        return "\n".join(f"{role}: {' '.join(content.split())}" for role, content in self.messages[:turn])

    @property
    def answer(self) -> str:
        """What is to be said: the last turn with its calls, or the text."""
        if self.text is not None:
            return self.text
        calls = self.extras[-1].get("tool_calls") if self.extras else None
        return self.messages[-1][1] + (json.dumps(calls, ensure_ascii=False, sort_keys=True) if calls else "")

    @property
    def as_dicts(self) -> list[dict[str, Any]]:
        extras = self.extras or ({},) * len(self.messages)
        return [{"role": r, "content": c, **extra} for (r, c), extra in zip(self.messages, extras, strict=True)]


def read_rows(path: Path, form: Format = "auto", limit: int | None = None) -> list[Row]:
    """Read the rows of a file, a `datasets` folder or a hub set.

    Preference pairs and labelled answers are refused. Raises DataError naming file, line and what to do.
    """
    return list(parse_all(path, limit, lambda record: parse_row(record, form)))


def parse_all(path: Path, limit: int | None, parse: Callable[[Record], R]) -> Iterator[R]:
    """Parse each record of a source. Raises DataError where it holds none."""
    count = 0
    for record in read_records(path, limit):
        count += 1
        yield parse(record)
    if count == 0:
        raise DataError(f"{path}: holds no rows; give one JSON object a line")


def detect(row: dict[str, Any]) -> Format | None:
    """Tell the format of a row by its keys, or None."""
    if "chosen" in row and "rejected" in row:
        return "preference"
    if "messages" in row:
        return "chat"
    if "prompt" in row and "completion" in row:
        return "kto" if as_label(row.get("label")) is not None else "completion"
    if "output" in row and ("instruction" in row or "input" in row):
        return "alpaca"
    return "text" if "text" in row else None


def as_label(value: Any) -> bool | None:
    """A label of good or bad: true or false, 1 or 0, or these as text (CSV has nothing else); else None."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int)) and value in (0, 1) else None


def parse_row(record: Record, form: Format) -> Row:
    """Parse one record as a row of supervised training. Raises DataError."""
    row, where = record.values, record.where
    kind = detect(row) if form == "auto" else form
    if kind == "chat":
        return _conversation(row.get("messages"), "messages", record, kind)
    if kind == "completion":
        prompt, completion = (parse_turns(row, key, role, where) for key, role in (("prompt", "user"), ANSWER))
        return _conversation([*prompt, *completion], "prompt and completion", record, kind, n_shown=len(prompt))
    if kind == "alpaca":
        return Row(_alpaca(row, where), None, record.line, form=kind)
    if kind == "text":
        return Row((), text_field(row, "text", where), record.line, form=kind)
    raise DataError(f"{where}: {refusal(row, kind, 'rows of supervised training')}")


def refusal(row: dict[str, Any], kind: Format | None, wanted: str) -> str:
    """Say why a row of one kind is no use to a method that reads another."""
    if kind is None:
        return f"found the keys {', '.join(map(repr, row)) or 'none'}; a row has {KNOWN}"
    found = {
        "preference": "a preference pair (chosen, rejected)",
        "kto": "a labelled answer (prompt, completion, label)",
    }.get(kind, f"a row in the format {kind!r}")
    hint = "; data.format: completion trains on the answers whatever their label" if kind == "kto" else ""
    return f"found {found}, this method reads {wanted}; choose the method or the rows that fit{hint}"


def text_field(row: dict[str, Any], key: str, where: str, *, empty: bool = False) -> str:
    """Give a text of a row. Raises DataError where it is none, or empty and may not be."""
    value = row.get(key)
    if value is None and empty:
        value = ""
    if not isinstance(value, str) or (not empty and not value.strip()):
        found = "nothing" if value is None else repr(value)[:40]
        raise DataError(f"{where}: {key!r} must be a text that is not empty, found {found}")
    refuse_halves(value, repr(key), where)
    return value


def refuse_halves(value: Any, what: str, where: str) -> None:
    """Raise DataError where a text, or a value that templates write as JSON, cannot be written in UTF-8."""
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {what} holds half a character ({error.reason}); mend the text") from error
    except TypeError as error:
        raise DataError(f"{where}: {what} holds what is no JSON ({error}); write it as text or number") from error


def parse_turns(row: dict[str, Any], key: str, role: str, where: str) -> list[dict[str, Any]]:
    """Give a field that is one text (then a turn of `role`) or a list of turns. Raises DataError."""
    value = row.get(key)
    if not isinstance(value, list):
        return [{"role": role, "content": text_field(row, key, where)}]
    if not value:
        raise DataError(f"{where}: {key!r} is an empty list; give a text or at least one turn")
    return value


def parse_tools(row: dict[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """Give the tools that a conversation may call. Raises DataError."""
    tools = row.get("tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise DataError(f"{where}: 'tools' must be a list of JSON schemas, found {str(tools)[:40]!r}")
    refuse_halves(tools, "'tools'", where)
    return tuple(tools)


def _alpaca(row: dict[str, Any], where: str) -> tuple[Turn, ...]:
    """The instruction becomes the system turn when there is an input, else it is the user's turn."""
    output = text_field(row, "output", where)
    given = text_field(row, "input", where, empty=True)
    if not given.strip():
        return (("user", text_field(row, "instruction", where)), ("assistant", output))
    instruction = text_field(row, "instruction", where, empty=True)
    system = (("system", instruction),) if instruction.strip() else ()
    return (*system, ("user", given), ("assistant", output))


def _conversation(value: Any, key: str, record: Record, form: Format, n_shown: int = 0) -> Row:
    """Make a row of turns; assistant turns among the first `n_shown` and those of weight 0 are not learned."""
    where = record.where
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"{where}: {key!r} must be a list of at least two turns")
    turns, extras = check_turns(value, key, where)
    if turns[-1][0] != "assistant" or turns[-2][0] not in ("user", "tool"):
        raise DataError(f"{where}: the last two turns must be user and assistant, found {turns[-2][0]}, {turns[-1][0]}")
    answers = (i for i, turn in enumerate(turns) if turn[0] == "assistant")
    muted = frozenset(i for i in answers if i < n_shown or value[i].get("weight") == 0)
    return Row(turns, None, record.line, parse_tools(record.values, where), extras, muted, form)


def check_turns(value: list[Any], key: str, where: str) -> tuple[tuple[Turn, ...], tuple[dict[str, Any], ...]]:
    """Check the turns of a conversation; gives them and what they carry beside role and content. Raises DataError."""
    turns: list[Turn] = []
    extras: list[dict[str, Any]] = []
    for index, message in enumerate(value):
        at = f"{where}: {key}[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{at} must have a role of {', '.join(ROLES)}")
        if message.get("weight") not in (None, 0, 1):
            raise DataError(f"{at}: 'weight' is 1 (learned) or 0 (shown only), found {message['weight']!r}")
        calls = _calls(message, at)
        turns.append((message["role"], text_field(message, "content", at, empty=bool(calls))))
        named = {k: message[k] for k in ("name", "tool_call_id") if message["role"] == "tool" and message.get(k)}
        extras.append({**({"tool_calls": calls} if calls else {}), **named})
        refuse_halves(extras[-1], "the turn", at)
        if message["role"] == "tool" and not (index and (turns[-2][0] == "tool" or "tool_calls" in extras[-2])):
            raise DataError(f"{at}: a tool's answer follows an assistant turn with tool_calls, or another tool's")
    if next((role for role, _ in turns if role != "system"), None) == "assistant":
        raise DataError(f"{where}: the first turn is an assistant's; a conversation begins with the user")
    return tuple(turns), tuple(extras) if any(extras) else ()


def _calls(message: dict[str, Any], at: str) -> list[dict[str, Any]]:
    """The tool calls of an assistant turn, arguments as an object: templates write them as JSON themselves."""
    calls = []
    for call in (message.get("tool_calls") or []) if message["role"] == "assistant" else []:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{at}: each of 'tool_calls' must have a function with a name, found {str(call)[:40]!r}")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            arguments = decoded(arguments, f"{at}: the arguments of {function['name']!r}", "give an object")
        if not isinstance(arguments, dict):
            raise DataError(f"{at}: the arguments of {function['name']!r} must be an object")
        named = {"id": call["id"]} if call.get("id") else {}
        calls.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls
