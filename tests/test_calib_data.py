"""The quickstart's data set: what the files promise, and that the held-out split is held out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
DATA = REPO / "calib_data"


@pytest.fixture(scope="module")
def maker():
    """The generator script as a module."""
    sys.path.insert(0, str(REPO / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location("make_commands", REPO / "scripts" / "make_commands.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["make_commands"] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(REPO / "scripts"))
        sys.modules.pop("make_commands", None)


@pytest.fixture(scope="module")
def made(maker):
    """Both splits made in memory, with where each row came from."""
    return maker.build()


@pytest.fixture(scope="module")
def stored():
    def rows(split):
        return [json.loads(line) for line in (DATA / "commands" / f"{split}.jsonl").read_text("utf-8").splitlines()]

    return {split: rows(split) for split in ("train", "heldout")}


def pool_values(rows):
    values = defaultdict(set)
    for row in rows:
        for pool, value in row.values:
            values[pool].add(value)
    return values


def test_manifest_names_every_file_with_its_digest():
    files = json.loads((DATA / "MANIFEST.json").read_text("utf-8"))["files"]
    assert {f"commands/{name}" for name in ("train.jsonl", "heldout.jsonl", "README.md")} < set(files)
    assert "general/general.jsonl" in files
    for path, entry in files.items():
        data = (DATA / path).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest(), path
        assert entry["licence"] == "Apache-2.0"
        if path.endswith(".jsonl"):
            assert entry["rows"] == len(data.splitlines()), path


def test_generator_check_passes_and_can_fail(maker, made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(maker, "build", lambda: made)
    assert maker.main(["--check"]) == 0
    assert maker.main(["--root", str(tmp_path)]) == 0
    assert maker.main(["--check", "--root", str(tmp_path)]) == 0
    heldout = tmp_path / "commands" / "heldout.jsonl"
    heldout.write_bytes(heldout.read_bytes().replace(b"on", b"off", 1))
    assert maker.main(["--check", "--root", str(tmp_path)]) == 1
    assert "commands/heldout.jsonl" in capsys.readouterr().out


def test_counts_and_row_shape(maker, stored):
    assert len(stored["train"]) >= 4000
    assert len(stored["heldout"]) >= 500
    assert len(maker.INSTRUCTION.split()) <= 8
    for rows in stored.values():
        assert all(list(row) == ["instruction", "input", "output"] for row in rows)
        assert {row["instruction"] for row in rows} == {maker.INSTRUCTION}


def test_no_input_twice_nor_in_both_splits(maker, stored):
    seen = Counter(maker.normal(row["input"]) for rows in stored.values() for row in rows)
    assert [text for text, n in seen.items() if n > 1] == []


def test_every_output_is_a_compact_call_of_the_schema(maker, stored):
    for row in (row for rows in stored.values() for row in rows):
        call = json.loads(row["output"])
        assert row["output"] == json.dumps(call, separators=(",", ":"), ensure_ascii=False)
        assert len(row["output"]) <= 110
        keys = list(call)
        assert keys[0] == "intent"
        assert keys == [key for key in maker.KEY_ORDER if key in call], "keys in the documented order"
        _, always, maybe = maker.SCHEMA[call["intent"]]
        assert set(always) <= set(keys) - {"intent"} <= {*always, *maybe}, row


def test_values_follow_the_conventions(stored):
    closed = {
        "quantity": {"temperature", "pressure", "humidity", "level", "flow", "speed", "vibration", "voltage"},
        "state": {"on", "off", "open", "closed"},
        "speed": {"low", "medium", "high"},
        "unit": {"celsius", "fahrenheit", "bar", "psi", "rpm", "percent", "litres per minute"},
        "ref": {"other", "first", "second", "third", "left", "right", "last"},
        "reason": {"out_of_scope", "missing_value", "unsafe"},
        "replaces": {"last"},
    }
    copied = ("device", "room", "except", "name", "title", "artist", "text")
    for row in (row for rows in stored.values() for row in rows):
        call, said = json.loads(row["output"]), row["input"].lower()
        for key, value in call.items():
            if key in closed:
                assert value in closed[key], row
            elif key in ("time", "until"):
                assert re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", value), row
            elif key in ("duration", "delay"):
                assert re.fullmatch(r"PT(?=\d)(\d+H)?(\d+M)?(\d+S)?", value), row
            elif key in ("level", "value", "delta"):
                assert isinstance(value, int | float), row
            elif key in copied and value != "all":
                assert value in said, row


def test_schema_page_lists_the_schema_and_the_key_order(maker):
    page = (DATA / "commands" / "README.md").read_text("utf-8")
    for intent, (_, always, maybe) in maker.SCHEMA.items():
        line = f"| `{intent}` | {', '.join(always)} | {', '.join(maybe)} |"
        assert re.sub(r"\s+", " ", line) in re.sub(r"[ ]+", " ", page), intent
    assert " ".join(maker.KEY_ORDER[1:]) in re.sub(r"\s+", " ", page)


def test_both_splits_cover_the_intents(maker, stored):
    for split, rows in stored.items():
        intents = Counter(json.loads(row["output"])["intent"] for row in rows)
        assert len(intents) >= 12, split
        assert set(intents) == set(maker.SCHEMA), split


def test_any_prefix_is_representative(maker, stored):
    for rows in stored.values():
        first = Counter(json.loads(row["output"])["intent"] for row in rows[: len(rows) // 4])
        assert len(first) >= len(maker.SCHEMA) - 2
        assert max(first.values()) < len(rows) // 4 * 0.2


def test_made_rows_are_the_stored_rows(made, stored):
    for split, rows in made.items():
        assert [(row.text, row.output) for row in rows] == [(row["input"], row["output"]) for row in stored[split]]


def test_heldout_templates_are_disjoint_and_training_has_many(maker, made):
    train, heldout = ({row.core for row in made[split]} for split in ("train", "heldout"))
    assert train & heldout == set()
    # also as written in the grammar, whichever of them the seed happened to draw
    grammar = {
        split: {text for lines in maker.templates(split).values() for *_, texts in lines for text in texts}
        for split in ("train", "heldout")
    }
    assert grammar["train"] & grammar["heldout"] == set()
    assert train <= grammar["train"]
    assert heldout <= grammar["heldout"]
    per_intent = {intent: {row.core for row in made["train"] if row.intent == intent} for intent in maker.SCHEMA}
    assert sum(len(cores) >= 25 for cores in per_intent.values()) >= 20


def test_heldout_slot_values_are_disjoint(maker, made):
    train, heldout = (pool_values(made[split]) for split in ("train", "heldout"))
    assert {"room", "machine", "door", "valve", "tank", "line", "title", "time", "percent", "minutes"} <= set(heldout)
    for pool, values in heldout.items():
        assert values & train[pool] == set(), pool
    from commands_values import POOLS  # importable once `maker` has put scripts/ on the path

    for name, pool in POOLS.items():
        assert set(pool["train"]) & set(pool["heldout"]) == set(), name


def test_heldout_slots_never_show_a_trained_name(made):
    """Read off the calls themselves, not off how they were made."""
    for slot in ("room", "except", "device", "title", "time", "until"):
        values = {split: {row.call[slot] for row in rows if slot in row.call} for split, rows in made.items()}
        assert values["train"] & values["heldout"] <= {"all", "lights"}, slot


def test_heldout_is_fair(maker, made):
    """Key sets, closed words and number words of held-out rows all occur in training."""
    from commands_values import say_number

    taught = {(row.intent, tuple(row.call)) for row in made["train"]}
    assert {(row.intent, tuple(row.call)) for row in made["heldout"]} <= taught
    for slot in ("action", "quantity", "state", "speed", "unit", "ref", "repeat", "day", "reason"):
        values = {split: {row.call[slot] for row in rows if slot in row.call} for split, rows in made.items()}
        assert values["heldout"] <= values["train"], slot
    numerals = {word for n in range(100) for word in say_number(n, "spaced").split()}
    said = {s: {w for r in rows for w in re.split(r"[\s,.?-]+", r.text.lower())} for s, rows in made.items()}
    assert said["heldout"] & numerals <= said["train"]


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("tag", ["negation", "correction", "refusal"])
def test_hard_categories_have_their_share(made, split, tag):
    assert sum(tag in row.tags for row in made[split]) >= 0.05 * len(made[split])


def test_the_last_word_counts(made):
    """A row that repairs a number calls with the repaired one, and the earlier one was said too."""
    checked = 0
    for row in made["train"] + made["heldout"]:
        numbers = [int(n) for n in re.findall(r"(?<![\d:])(\d+)(?= percent|%|,)", row.text)]
        if "level" in row.call and row.intent != "correct" and len(numbers) == 2 and "correction" in row.tags:
            assert row.call["level"] == numbers[1] != numbers[0], row.text
            checked += 1
    assert checked >= 5


def test_the_general_probe_gives_nothing_away():
    rows = [json.loads(line) for line in (DATA / "general_probe.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == len({row["question"] for row in rows}) == 120
    assert {len(row["choices"]) for row in rows} == {len(set(row["choices"])) for row in rows} == {4}
    places = Counter(row["answer"] for row in rows)
    assert set(places) == set(range(4))
    assert all(24 <= n <= 36 for n in places.values())
    longest = sum(max(row["choices"], key=len) == row["choices"][row["answer"]] for row in rows)
    assert longest <= 45  # the longest choice is not the right one more often than by chance, or hardly
    assert min(Counter(row["topic"] for row in rows).values()) >= 10


def test_general_rows_are_short_chats():
    rows = [json.loads(line) for line in (DATA / "general" / "general.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) >= 110
    assert len({row["messages"][0]["content"] for row in rows}) == len(rows)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert 12 <= len(row["messages"][1]["content"].split()) <= 120
