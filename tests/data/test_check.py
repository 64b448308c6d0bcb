"""The data check: what it finds in rows that hold every kind of fault, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifact import Artifact
from edgetune.data.check import personal
from edgetune.data.check.duplicates import NearIndex, jaccard, shingles
from edgetune.data.check.examine import Input, Template, examine
from edgetune.data.check.findings import DataReport, Finding
from edgetune.data.check.page import render_page
from edgetune.data.check.texts import Languages, evenness, find_labels, is_trivial, repetition
from edgetune.data.golden import Golden
from edgetune.errors import DataError
from edgetune.recipe_data import DataCheck
from tests.data.test_formats import ANSWERED, ASKED, write

MAIL = "anna.meier@example.org"
FAULTY: list[Any] = [
    {"prompt": "Please switch the light in the kitchen on", "completion": "on"},
    {"prompt": "please switch the  light in the kitchen on", "completion": "ON"},  # 2: again
    {"prompt": "Please switch the light in the kitchen on", "completion": "off"},  # 3: another answer
    {"prompt": "Please switch the light in the kitchen on.", "completion": "on"},  # 4: almost
    {"prompt": f"Write to {MAIL} that I am late today", "completion": "sent"},  # 5
    {"prompt": "What do you think of the weather?", "completion": "N/A"},  # 6
    {"prompt": "Wie wird morgen das Wetter in der Stadt?", "completion": "schön"},
    {"prompt": "nothing", "completion": ""},  # 8
    {"messages": [ASKED, {**ANSWERED, "weight": 0}]},  # 9
    {"prompt": "say " + "turn it on and off and " * 12, "completion": "done"},  # 10
]
HELD = [
    {"prompt": "PLEASE switch the light in the kitchen on", "completion": "on"},
    {"prompt": "Please switch the light in the kitchen on!!", "completion": "on"},
    {"prompt": "How many people live in the house?", "completion": "three"},
]


@pytest.fixture(scope="module")
def template(tiny_model: Artifact) -> Template:
    from transformers import AutoTokenizer

    return Template("tiny", AutoTokenizer.from_pretrained(tiny_model.path), Golden.read(tiny_model.path).stop_ids)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Input]:
    heldout = write(tmp_path, *HELD).rename(tmp_path / "heldout.jsonl")
    return [Input(write(tmp_path, *FAULTY)), Input(heldout, heldout=True)]


def found(report: DataReport, key: str) -> Finding:
    return next(finding for finding in report.findings if finding.key == key)


def lines(report: DataReport, key: str) -> list[int]:
    return [int(place.row.rsplit(":", 1)[1]) for place in found(report, key).places]


def test_each_fault_is_found_where_it_is(inputs: list[Input], template: Template) -> None:
    report = examine(inputs, DataCheck(), 100, template)
    assert {finding.key: lines(report, finding.key) for finding in report.findings} == {
        "refused": [8],
        "too_long": [10],
        "without_loss": [9],
        "duplicates": [2],
        "conflicts": [3],
        "near_duplicates": [4],
        "overlap": [1],
        "near_overlap": [2],
        "trivial": [6],
        "personal": [5],
    }
    assert [finding.key for finding in report.over] == ["refused", "without_loss", "overlap"]
    assert found(report, "near_duplicates").places[0].other == f"{inputs[0].path}:1"
    assert report.personal == {"e-mail": 1}
    assert report.languages["de"] == 1
    assert MAIL not in report.model_dump_json()
    assert [file.formats for file in report.files] == [{"completion": 8, "chat": 1}, {"completion": 3}]
    assert (report.lengths[0].unit, report.lengths[0].maximum > 100) == ("tokens", True)
    assert sum(report.lengths[0].counts) == 12
    longest = next(extreme for extreme in report.extremes if extreme.title == "Longest")
    assert longest.rows[0].row.endswith(":10")
    assert report.extremes[2].rows[0].row.endswith(":10")


def test_a_long_text_is_not_too_long(tmp_path: Path, template: Template) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "turn the light in the kitchen " * 40}) + "\n" + json.dumps({"text": "a b c"}))
    assert lines(examine([Input(path)], DataCheck(), 100, template), "too_long") == []


def test_limits_are_the_recipes(inputs: list[Input]) -> None:
    loose = DataCheck(refused=0.5, overlap=None, duplicates=0.1, near_duplicates=0.2, similarity=0.5)
    report = examine(inputs, loose, 100, None)
    assert [finding.key for finding in report.over] == ["duplicates"]
    assert report.lengths[0].unit == "characters"
    assert {finding.key for finding in report.findings} & {"too_long", "without_loss"} == set()


def test_labels_and_languages_are_held_to_the_recipe(tmp_path: Path) -> None:
    asked = [f"Please switch the light number {i} in the kitchen on" for i in range(9)]
    rows = [{"prompt": text, "completion": "yes"} for text in asked]
    rows += [{"prompt": "Wie wird morgen das Wetter in der Stadt?", "completion": "no"}]
    inputs = [Input(write(tmp_path, *rows))]
    report = examine(inputs, DataCheck(languages=["en"], min_evenness=0.9), 100, None)
    (finding,) = report.over
    assert (finding.title, finding.rows) == ("Questions in a language other than en", 1)
    assert lines(report, "other_languages") == [10]
    assert [labels.label for labels in report.uneven] == ["answer"]
    page = render_page(report)
    assert "Over its limit: Questions in a language other than en." in page
    assert "Less even than its limit: label answer." in page
    assert "evenness 0.469, at least 0.9 is wanted" in page
    for fine in (
        DataCheck(languages=["en", "de"], min_evenness=0.4),
        DataCheck(languages=["en"], other_languages=0.1),
        DataCheck(),
    ):
        report = examine(inputs, fine, 100, None)
        assert (report.over, report.uneven) == ([], [])
        assert "Nothing is over a limit." in render_page(report)


def test_the_page_loads_nothing_and_hides_what_is_personal(inputs: list[Input], template: Template) -> None:
    rows = [{"prompt": "<script>alert(1)</script> is it on?", "completion": "on"}, *FAULTY]
    path = write(inputs[0].path.parent, *rows)
    page = render_page(examine([Input(path), *inputs[1:]], DataCheck(), 100, template))
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert MAIL not in page
    assert "[e-mail]" in page
    assert "Over its limit: Rows that training cannot read" in page


def test_pairs_and_labelled_answers(tmp_path: Path, template: Template) -> None:
    pair = {"prompt": "Is the light in the hall on?", "chosen": "yes", "rejected": "no " * 40}
    report = examine([Input(write(tmp_path, pair))], DataCheck(), 60, template)
    assert report.files[0].formats == {"preference": 1}
    assert lines(report, "too_long") == [1]  # the rejected answer counts
    labelled = [{"prompt": f"question {i}", "completion": f"answer {i}", "label": i < 3} for i in range(4)]
    report = examine([Input(write(tmp_path, *labelled))], DataCheck(), 60, template)
    assert report.labels[0].counts == {"good": 3, "bad": 1}
    assert report.labels[0].ratio == 3


def test_an_earlier_turn_of_a_talk_is_asked_too(tmp_path: Path) -> None:
    talk = [ASKED, ANSWERED, {"role": "user", "content": "and now?"}]
    heldout = write(tmp_path, {"messages": talk[:2]}).rename(tmp_path / "heldout.jsonl")
    for row, leaks in (
        ({"messages": [*talk, ANSWERED]}, 1),
        ({"prompt": talk, "completion": "yes"}, 0),
        ({"prompt": talk, "chosen": "yes", "rejected": "no"}, 0),
    ):
        inputs = [Input(write(tmp_path, row)), Input(heldout, heldout=True)]
        assert found(examine(inputs, DataCheck(), 60, None), "overlap").rows == leaks


def test_rows_that_adapt_would_not_read(tmp_path: Path) -> None:
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    kto = {"prompt": "hi", "completion": "yes", "label": True}
    path = write(tmp_path, pair, kto, {"prompt": "hi", "completion": "yes"})
    report = examine([Input(path, supervised=True)], DataCheck(), 60, None)
    assert lines(report, "refused") == [1, 2]
    assert lines(examine([Input(path)], DataCheck(), 60, None), "refused") == []


def test_no_row_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: no row can be used; the first: found the keys 'a'; a row has"):
        examine([Input(write(tmp_path, {"a": 1}))], DataCheck(), 60, None)


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("mail a.b+c@mail.example.co.uk now", ["e-mail"]),
        ("4111 1111 1111 1111 or 5500-0000-0000-0004", ["card"]),
        ("4111 1111 1111 1112", []),  # the check digit is wrong
        ("0000 0000 0000 0000", []),
        ("+49 30 1234567 and (212) 555-0143", ["phone"]),
        ("call 030 1234567", ["phone"]),
        ("in 2026-11-24 at 12:30, 1234567 rows, 10.000.000, 192.168.100.200", []),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14", []),
        ("AKIAIOSFODNN7EXAMPLE", ["key"]),
        ("-----BEGIN RSA PRIVATE KEY-----", ["key"]),
        ("sk-proj-" + "a1" * 20 + " and x@y.org", ["key", "e-mail"]),
        ("@someone, a@b, user@localhost", []),
    ],
)
def test_personal_data(text: str, kinds: list[str]) -> None:
    assert personal.find(text) == kinds


def test_what_is_personal_is_masked_everywhere(tmp_path: Path) -> None:
    calls = [{"name": "send", "arguments": {"to": MAIL}}]
    rows: list[Any] = [{"prompt": f"Who is number {i % 9} of them?", "completion": MAIL} for i in range(20)]
    rows.append({"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": calls}]})
    rows.append({"prompt": "a", "completion": "b", "label": MAIL, "messages": MAIL})
    report = examine([Input(write(tmp_path, *rows))], DataCheck(), 60, None)
    assert report.personal == {"e-mail": 21}
    assert MAIL not in report.model_dump_json()
    assert MAIL not in render_page(report)


def test_a_mask_leaves_the_rest(tmp_path: Path) -> None:
    assert personal.mask("to x@y.org or +49 30 1234567!") == ("to [e-mail] or [phone]!", ["e-mail", "phone"])


def test_near_texts_are_found_by_their_shingles() -> None:
    index = NearIndex(0.8)
    text = "What is the weather forecast for the coming weekend in the mountains"
    assert index.see(text) is None
    assert index.see("Something else altogether, about trains and their delays") is None
    assert index.near(text.upper() + "  ") == 0
    assert index.near(text + "?") == 0
    assert index.near(text.replace("weather forecast", "snow report")) is None
    assert jaccard(shingles("abcdef"), shingles("abcdeg")) == pytest.approx(1 / 3)
    assert shingles("ab") == {"ab"}


def test_texts() -> None:
    assert [is_trivial("a?", answer) for answer in ("...", "N/A", "A?", "no", "7")] == [True, True, True, False, False]
    assert repetition("a b c " * 10) > 0.8
    assert repetition("one two three") == 0
    tell = Languages().tell
    assert [tell("on"), tell("Wie wird das Wetter morgen in der Stadt?")] == ["short", "de"]
    assert tell("12345 67890 12345 67890") == "unsure"


def test_labels_are_found_in_answers() -> None:
    calls = [json.dumps({"intent": "a" if i % 4 else "b", "slots": {"n": i}}) for i in range(40)]
    assert find_labels(calls) == {"intent": {"a": 30, "b": 10}}
    assert find_labels(["yes", "no"] * 5) == {"answer": {"yes": 5, "no": 5}}
    assert find_labels([f"text {i}" for i in range(50)]) == {}
    assert evenness(find_labels(["yes", "no"] * 5)["answer"]) == pytest.approx(1)
