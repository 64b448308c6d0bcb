"""Row formats: what is read, and that every fault names its file, its line and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.checks import learned_digests, prompt_digest, refuse_leaks
from edgetune.data.formats import Format, Row, detect, read_rows
from edgetune.data.general import general_text
from edgetune.errors import DataError

ASKED = {"role": "user", "content": "hi"}
ANSWERED = {"role": "assistant", "content": "yes"}


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"instruction": "Give JSON.", "input": "dim it", "output": "{}"},
            (("system", "Give JSON."), ("user", "dim it"), ("assistant", "{}")),
        ),
        ({"instruction": "Say hi.", "input": " ", "output": "hi"}, (("user", "Say hi."), ("assistant", "hi"))),
        ({"instruction": "Say hi.", "output": "hi"}, (("user", "Say hi."), ("assistant", "hi"))),
        ({"input": "dim it", "output": "{}"}, (("user", "dim it"), ("assistant", "{}"))),
        ({"prompt": "dim it", "completion": "{}"}, (("user", "dim it"), ("assistant", "{}"))),
        ({"prompt": [ASKED], "completion": [ANSWERED], "label": "x"}, (("user", "hi"), ("assistant", "yes"))),
        ({"messages": [ASKED, ANSWERED]}, (("user", "hi"), ("assistant", "yes"))),
        (
            {"messages": [ASKED, ANSWERED, ASKED, ANSWERED], "id": 7},
            (("user", "hi"), ("assistant", "yes"), ("user", "hi"), ("assistant", "yes")),
        ),
    ],
)
def test_conversations(tmp_path: Path, row: dict[str, Any], messages: tuple[tuple[str, str], ...]) -> None:
    assert read_rows(write(tmp_path, row)) == [Row(messages, None, 1)]


def test_answers_within_a_prompt_are_shown_and_not_learned(tmp_path: Path) -> None:
    asked = [ASKED, ANSWERED, ASKED]
    (row,) = read_rows(write(tmp_path, {"prompt": asked, "completion": [ANSWERED]}))
    (chat,) = read_rows(write(tmp_path, {"messages": [*asked, ANSWERED]}))
    assert (row.messages, row.muted) == (chat.messages, frozenset({1}))
    assert chat.muted == frozenset()


def test_plain_text_and_blank_lines_and_crlf(tmp_path: Path) -> None:
    path = write(tmp_path, b"", {"text": " one\n two "}, b"   \r", b'{"text": "\xc3\xbc"}\r')
    assert read_rows(path) == [Row((), " one\n two ", 2), Row((), "ü", 4)]
    assert read_rows(path)[0].prompt == "one two"


def test_a_row_may_be_told_what_it_is(tmp_path: Path) -> None:
    path = write(tmp_path, {"instruction": "a", "output": "b", "text": "c"})
    assert read_rows(path)[0].messages == (("user", "a"), ("assistant", "b"))
    assert read_rows(path, "text")[0].text == "c"
    with pytest.raises(DataError, match="'messages' must be a list"):
        read_rows(path, "chat")


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"messages": [], "text": ""}, "chat"),
        ({"instruction": "", "output": "", "text": ""}, "alpaca"),
        ({"output": "", "text": ""}, "text"),
        ({"prompt": "", "completion": "", "text": ""}, "completion"),
        ({"prompt": "", "completion": "", "label": "false"}, "kto"),
        ({"prompt": "", "completion": "", "label": 2}, "completion"),
        ({"chosen": "", "rejected": "", "messages": ""}, "preference"),
        ({"output": ""}, None),
        ({}, None),
    ],
)
def test_detect(row: dict[str, Any], form: Format | None) -> None:
    assert detect(row) == form


def test_a_limit_reads_no_further(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, {"text": "b"}, b"broken")
    assert [row.text for row in read_rows(path, limit=2)] == ["a", "b"]
    with pytest.raises(DataError, match="line 3"):
        read_rows(path, limit=3)


def nested(levels: int) -> str:
    return '{"a": ' * levels + "1" + "}" * levels


ASKED_TOOL = [ASKED, {"role": "assistant", "tool_calls": [{"name": "f"}]}]
BAD: dict[str, tuple[Any, str]] = {
    "invalid UTF-8": (b'{"text": "caf\xe9"}', r"byte 13 is not UTF-8; save the file as UTF-8$"),
    "not JSON": (b"{'text': 1}", r"not valid JSON \(.*\); give one JSON object a line$"),
    "two objects in a line": (b'{"text":"a"}{"text":"b"}', r"not valid JSON \(Extra data.*\); give one JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"text":"a"}', r"not valid JSON \(Unexpected UTF-8 BOM"),
    "deep nesting": (b"[" * 100_000, r"not valid JSON \(.*recursion.*\)"),
    "a list": ([1, 2], r"found a JSON list, a row is an object$"),
    "a text": ("hello", r"found a JSON str, a row is an object$"),
    "null": (b"null", r"found a JSON NoneType, a row is an object$"),
    "no known key": (
        {"question": "a", "answer": "b"},
        r"found the keys 'question', 'answer'; a row has instruction/input/output, messages, prompt/completion, text, ",
    ),
    "no key": ({}, r"found the keys none; a row has"),
    "output alone": ({"output": "b"}, r"found the keys 'output'; a row has"),
    "empty output": (
        {"instruction": "a", "output": " "},
        r"'output' must be a text that is not empty, found ' '$",
    ),
    "output null": ({"instruction": "a", "output": None}, r"'output' must be a text .* found nothing$"),
    "output a number": ({"instruction": "a", "output": 3}, r"'output' must be a text .* found 3$"),
    "neither instruction nor input": (
        {"instruction": "", "input": "", "output": "x"},
        r"'instruction' must be a text that is not empty, found ''$",
    ),
    "input a list": ({"instruction": "a", "input": ["x"], "output": "b"}, r"'input' must be a text .* found \['x'\]$"),
    "empty text": ({"text": "\n"}, r"'text' must be a text that is not empty, found '\\n'$"),
    "messages a text": ({"messages": "hi"}, r"'messages' must be a list of at least two turns$"),
    "one turn": ({"messages": [ANSWERED]}, r"'messages' must be a list of at least two turns$"),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "x"}, ANSWERED]},
        r"messages\[0\] must have a role of system, user, assistant, tool$",
    ),
    "a turn that is a text": ({"messages": [ASKED, "yes"]}, r"messages\[1\] must have a role of"),
    "a role that is a list": ({"messages": [{"role": [], "content": "x"}, ANSWERED]}, r"messages\[0\] must have a"),
    "empty turn": (
        {"messages": [ASKED, {"role": "assistant", "content": ""}]},
        r"messages\[1\]: 'content' must be a text that is not empty, found ''$",
    ),
    "a tool's answer to nobody": (
        {"messages": [ASKED, {"role": "tool", "content": "21"}, ANSWERED]},
        r"messages\[1\]: a tool's answer follows an assistant turn with tool_calls, or another tool's$",
    ),
    "a call without a name": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {}}]}]},
        r"messages\[1\]: each of 'tool_calls' must have a function with a name, found ",
    ),
    "arguments that are no JSON": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
        r"messages\[1\]: the arguments of 'f': not valid JSON \(.*\); give an object$",
    ),
    "arguments deeper than Python follows": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[" * 100_000}]}]},
        r"messages\[1\]: the arguments of 'f': not valid JSON \(.*recursion.*\); give an object$",
    ),
    "arguments deeper than a template follows": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": nested(101)}]}]},
        r"messages\[1\]: the arguments of 'f': JSON of more than 100 levels; make it flatter$",
    ),
    "tools deeper than a template follows": (
        f'{{"messages": {json.dumps([ASKED, ANSWERED])}, "tools": [{nested(400)}]}}'.encode(),
        r"JSON of more than 100 levels; make it flatter$",
    ),
    "half a character in tools": (
        {"messages": [ASKED, ANSWERED], "tools": [{"name": "f", "about": "\ud800"}]},
        r"'tools' holds half a character \(surrogates not allowed\); mend the text$",
    ),
    "half a character in a call": (
        {"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": "\ud800", "name": "f"}]}]},
        r"messages\[1\]: the turn holds half a character \(surrogates not allowed\); mend the text$",
    ),
    "half a character in a name": (
        {"messages": [*ASKED_TOOL, {"role": "tool", "name": "\ud800", "content": "21"}, ANSWERED]},
        r"messages\[2\]: the turn holds half a character \(surrogates not allowed\); mend the text$",
    ),
    "half a weight": (
        {"messages": [ASKED, {**ANSWERED, "weight": 0.5}]},
        r"messages\[1\]: 'weight' is 1 \(learned\) or 0 \(shown only\), found 0\.5$",
    ),
    "tools that are no schemas": ({"messages": [ASKED, ANSWERED], "tools": ["f"]}, r"'tools' must be a list of JSON"),
    "an empty prompt": (
        {"prompt": [], "completion": "b"},
        r"'prompt' is an empty list; give a text or at least",
    ),
    "a preference pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        r"found a preference pair \(chosen, rejected\), this method reads rows of supervised training; ",
    ),
    "a labelled answer": (
        {"prompt": "a", "completion": "b", "label": True},
        r"found a labelled answer .*; data\.format: completion trains on the answers whatever their label$",
    ),
    "ends with the user": (
        {"messages": [ASKED, ANSWERED, ASKED]},
        r"the last two turns must be user and assistant, found assistant, user$",
    ),
    "two answers at the end": (
        {"messages": [ASKED, ANSWERED, ANSWERED]},
        r"the last two turns must be user and assistant, found assistant, assistant$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_each_fault_names_file_and_line(tmp_path: Path, case: str) -> None:
    row, says = BAD[case]
    path = write(tmp_path, {"text": "fine"}, b"", row)
    with pytest.raises(DataError, match=says) as caught:
        read_rows(path)
    assert str(caught.value).startswith(f"{path} line 3: ")
    assert "\n" not in str(caught.value)


def test_a_number_of_5000_digits_is_a_fault_of_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, b'{"text": ' + b"1" * 5000 + b"}")
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: "):
        read_rows(path)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n"])
def test_an_empty_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no rows; give one JSON object a line$"):
        read_rows(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no\.jsonl: cannot be read \(No such file or directory\); give a JSONL file$"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match=r"no state\.json or dataset_dict\.json; give a file, or what save_to_disk"):
        read_rows(tmp_path)


def conversation(asked: str, line: int) -> Row:
    return Row((("system", "JSON."), ("user", asked), ("assistant", f"answer {line}")), None, line)


def test_a_leak_is_seen_through_case_and_space_and_another_answer(tmp_path: Path) -> None:
    found = [conversation("Dim the  light", 1), conversation("boil", 2), Row((), "a  Text", 3)]
    train = [(prompt_digest(row), row.line) for row in found]
    refuse_leaks(train, [conversation("dim the lights", 1), Row((), "a text more", 2)], tmp_path / "t", tmp_path / "h")
    leaks = [conversation("new", 1), conversation("DIM THE\nLIGHT ", 5), Row((), "A text", 6)]
    with pytest.raises(DataError, match=r"h line 5 is also .*t line 1 \(2 such rows\); remove them from the training"):
        refuse_leaks(train, leaks, tmp_path / "t", tmp_path / "h")


def test_a_leak_is_seen_in_every_answer_that_is_learned(tmp_path: Path) -> None:
    turns = [ASKED, ANSWERED, {"role": "user", "content": "and now?"}, ANSWERED]
    muted = [ASKED, {**ANSWERED, "weight": 0}, *turns[2:]]
    learned, shown = read_rows(write(tmp_path, {"messages": turns}, {"messages": muted}))
    assert learned.prompts == ["user: hi", learned.prompt]
    assert shown.prompts == [shown.prompt]
    asked = read_rows(write(tmp_path, {"messages": turns[:2]}))
    refuse_leaks([(digest, 2) for digest in learned_digests(shown)], asked, tmp_path / "t", tmp_path / "h")
    with pytest.raises(DataError, match=r"h line 1 is also .*t line 1 \(1 such rows\)"):
        refuse_leaks([(digest, 1) for digest in learned_digests(learned)], asked, tmp_path / "t", tmp_path / "h")


def test_general_text_of_ones_own(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "one"}, {"messages": [ASKED, ANSWERED]}, {"text": "three"})
    assert general_text(path, "calibrate") == "one\n\nhi\nyes"
    assert general_text(path, "measure") == "three"


def test_pythons_own_prose_is_long_enough() -> None:
    assert len(general_text(None, "calibrate")) > 150_000
    assert len(general_text(None, "measure")) > 150_000


def test_the_halves_of_pythons_own_prose_share_no_text() -> None:
    calibrates, measures = (general_text(None, half).split("\n\n") for half in ("calibrate", "measure"))  # type: ignore[arg-type]
    assert not set(calibrates) & set(measures)


@pytest.mark.parametrize("row", ['{"text": "\\ud800"}', '{"instruction": "a\\udc00", "output": "b"}'])
def test_half_of_a_surrogate_pair_is_a_fault_of_its_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(row + "\n")
    with pytest.raises(DataError, match=r"line 1: .*half a character"):
        read_rows(file)


TOOL = {"type": "function", "function": {"name": "read_sensor", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "read_sensor", "arguments": '{"room": "hall"}'}}
WITH_TOOLS = [
    ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "21"},
    {"role": "assistant", "content": "21 degrees", "weight": 1},
]


def test_a_talk_with_tools(tmp_path: Path) -> None:
    row = read_rows(write(tmp_path, {"messages": WITH_TOOLS, "tools": [TOOL]}))[0]
    assert row.tools == (TOOL,)
    called = {**CALL, "function": {"name": "read_sensor", "arguments": {"room": "hall"}}}
    assert row.as_dicts == [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "21", "tool_call_id": "c1"},
        {"role": "assistant", "content": "21 degrees"},
    ]
    assert (row.form, row.muted) == ("chat", frozenset())
    ends_with_a_call = read_rows(write(tmp_path, {"messages": WITH_TOOLS[:2]}))[0]
    assert ends_with_a_call.answer == json.dumps([called], sort_keys=True)


def test_a_turn_of_weight_0_is_not_learned(tmp_path: Path) -> None:
    row = read_rows(write(tmp_path, {"messages": [{**ASKED, "weight": 0}, {**ANSWERED, "weight": 0}, ASKED, ANSWERED]}))
    assert row[0].muted == {1}
