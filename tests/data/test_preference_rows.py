"""Preference pairs and labelled answers: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.data.formats import Row
from edgetune.data.preference import read_kto, read_preferences
from edgetune.errors import DataError
from tests.data.test_formats import ANSWERED, ASKED, write

NO = {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "chosen": "yes", "rejected": "no"},
        {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [NO]},
        {"prompt": "hi", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, NO]},
        {"chosen": [ASKED, ANSWERED], "rejected": [ASKED, NO]},
    ],
    ids=["texts", "turns", "prompt repeated", "prompt implicit"],
)
def test_pairs(tmp_path: Path, row: dict[str, Any]) -> None:
    pair = read_preferences(write(tmp_path, row))[0]
    assert (pair.prompt.messages, pair.chosen, pair.rejected, pair.line) == ((("user", "hi"),), "yes", "no", 1)
    assert pair.rows == (
        Row((("user", "hi"), ("assistant", "yes")), None, 1),
        Row((("user", "hi"), ("assistant", "no")), None, 1),
    )


def test_an_earlier_answer_is_shown_and_not_learned(tmp_path: Path) -> None:
    row = {"prompt": [ASKED, NO, ASKED], "chosen": "yes", "rejected": "no"}
    assert [one.muted for one in read_preferences(write(tmp_path, row))[0].rows] == [{1}, {1}]


def test_labelled_answers(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"prompt": [SYSTEM, ASKED], "completion": "yes", "label": True, "tools": [{"name": "f"}]},
        {"prompt": "hi", "completion": [NO], "label": "0"},
    )
    good, bad = read_kto(path)
    assert (good.label, bad.label, bad.completion) == (True, False, "no")
    messages = (("system", "Be kind."), ("user", "hi"), ("assistant", "yes"))
    assert good.row == Row(messages, None, 1, tools=({"name": "f"},))


BAD_PAIRS: dict[str, tuple[Any, str]] = {
    "not a pair": (
        {"prompt": "a", "completion": "b"},
        r"found a row in the format 'completion', this method",
    ),
    "no known key": ({"a": 1}, r"found the keys 'a'; a row has "),
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"'chosen' and 'rejected' are the same text"),
    "nothing shared": (
        {"chosen": [ANSWERED], "rejected": [NO]},
        r"no 'prompt', and no turn that .* share; give a",
    ),
    "two answers": (
        {"prompt": "a", "chosen": [ANSWERED, ANSWERED], "rejected": "c"},
        r"'chosen' must be one answer: a text, or one assistant turn after the prompt$",
    ),
    "another prompt": (
        {"prompt": "a", "chosen": [ASKED, ANSWERED], "rejected": [ASKED, NO]},
        r"'chosen' must be one answer",
    ),
    "a prompt that ends with an answer": (
        {"prompt": [ASKED, ANSWERED], "chosen": "b", "rejected": "c"},
        r"the prompt must end with a user's turn, found assistant$",
    ),
    "an empty answer": ({"prompt": "a", "chosen": " ", "rejected": "c"}, r"'chosen' must be a text that is not empty"),
    "a call beside its text": (
        {"prompt": "a", "chosen": [{**ANSWERED, "tool_calls": [{"name": "f"}]}], "rejected": "c"},
        r"'chosen' has tool_calls, which preference training does not read; leave the row out$",
    ),
    "a list of no turns": ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, r"'chosen' must be one answer"),
}


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_each_fault_of_a_pair_names_file_and_line(tmp_path: Path, case: str) -> None:
    row, says = BAD_PAIRS[case]
    path = write(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"}, row)
    with pytest.raises(DataError, match=says) as caught:
        read_preferences(path)
    assert str(caught.value).startswith(f"{path} line 2: ")


def test_labels_that_say_nothing(tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b", "label": 1}
    with pytest.raises(DataError, match=r"rows\.jsonl: every row is labelled true; give good and bad answers$"):
        read_kto(write(tmp_path, good, good))
    with pytest.raises(DataError, match=r"line 1: found a row in the format 'completion', this method reads labelled"):
        read_kto(write(tmp_path, {**good, "label": "billing"}))
    with pytest.raises(DataError, match=r"line 1: 'label' is true \(a good answer\) or false .* found 'billing'$"):
        read_kto(write(tmp_path, {**good, "label": "billing"}), "kto")
    called = {**good, "completion": [{**ANSWERED, "tool_calls": [{"name": "f"}]}]}
    with pytest.raises(DataError, match=r"line 1: 'completion' has tool_calls, which preference training does not"):
        read_kto(write(tmp_path, called))
