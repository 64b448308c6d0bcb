"""Records: the same rows out of every kind of file, and faults that name where they stand."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.formats import Row, read_rows
from edgetune.data.records import is_hub_set, read_records
from edgetune.errors import DataError

PLAIN = [{"instruction": "Say it.", "input": "", "output": 'ü, "b"\nc'}, {"instruction": "x", "output": "y", "n": "7"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
TALK: dict[str, Any] = {
    "messages": [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ],
    "tools": [TOOL],
}


def save(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text("\n" + json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            keys = list(dict.fromkeys(key for row in rows for key in row))
            writer = csv.DictWriter(stream, keys, delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "folder"])
def test_the_same_rows_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    rows = read_rows(save(tmp_path, kind, PLAIN))
    assert [row.messages for row in rows] == [
        (("user", "Say it."), ("assistant", "ü, \"b\"\nc")),
        (("user", "x"), ("assistant", "y")),
    ]  # fmt: skip
    assert [row.line for row in rows] == ([3, 4] if kind in ("csv", "tsv") else [1, 2])  # the first takes two lines
    assert rows[0].form == "alpaca"
    talk = read_rows(save(tmp_path, kind, [TALK]) if kind != "folder" else save(tmp_path / "talk", kind, [TALK]))[0]
    assert (talk.tools[0]["function"]["name"], talk.as_dicts[3]) == ("f", {"role": "assistant", "content": "three"})
    assert talk.as_dicts[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "folder"])
def test_a_limit(tmp_path: Path, kind: str) -> None:
    assert len(list(read_records(save(tmp_path, kind, PLAIN), 1))) == 1


def test_a_row_that_is_too_deep_is_named_in_a_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('[{"text": "a"}, {"text": "b", "c": ' + "[" * 100 + "]" * 100 + "}]")
    with pytest.raises(DataError, match=r"rows\.json row 2: JSON of more than 100 levels; make it flatter$"):
        read_rows(path)
    path.write_text('[{"text": "b", "c": ' + "[" * 99 + "]" * 99 + "}]")
    assert read_rows(path)[0].text == "b"


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = save(tmp_path, "jsonl", PLAIN).rename(tmp_path / "rows.json")
    assert [record.where for record in read_records(path)] == [f"{path} line 1", f"{path} line 2"]


BAD: dict[str, tuple[str, bytes, str]] = {
    "json cut": ("json", b'[{"text": "a"}', r"rows\.json: not valid JSON \(.*\); give a list of objects$"),
    "json of numbers": ("json", b'[{"text": "a"}, 3]', r"rows\.json row 2: found a JSON int, a row is an object$"),
    "csv with too many fields": (
        "csv",
        b"text\na,b\n",
        r"rows\.csv line 2: more fields than the 1 of the first line; quote",
    ),
    "csv with an open quote": ("csv", b'text\n"a\n', r"rows\.csv line \d: not valid CSV \(.*\); give JSONL$"),
    "csv that is not UTF-8": (
        "csv",
        b"text\ncaf\xe9\n",
        r"rows\.csv after line \d: not UTF-8; save the file as UTF-8$",
    ),
    "csv with a huge field": ("csv", b"text\n" + b"a" * 200_000, r"not valid CSV \(field larger .*\); give JSONL$"),
    "csv, messages no JSON": ("csv", b"messages\n[hi]\n", r"line 2: 'messages': not valid JSON .*; give JSON in this"),
    "csv, empty cell": ("csv", b"instruction,output\na,\n", r"rows\.csv line 2: 'output' .*, found ''$"),
    "csv of nothing": ("csv", b"text\n", r"rows\.csv: holds no rows"),
    "not parquet": (
        "parquet",
        b"PAR1 no",
        r"rows\.parquet: not a Parquet file that can be read \(.*\); write it again$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_each_fault_names_its_place(tmp_path: Path, case: str) -> None:
    kind, content, says = BAD[case]
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        read_rows(path)


def test_a_folder_of_several_splits_names_them(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"set: holds several splits; name one of .*set/train, .*set/test$"):
        read_rows(tmp_path / "set")
    assert read_rows(tmp_path / "set" / "test") == [Row((), "a", 1)]
    (tmp_path / "set" / "test" / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"set/test: `datasets` cannot read this folder"):
        read_rows(tmp_path / "set" / "test")


def test_a_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, **settings: Any) -> Any:
        asked.append((name, settings))
        if name == "org/gone":
            raise FileNotFoundError("Couldn't reach 'org/gone'\nmore")
        return datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert [row.text for row in read_rows(Path("org/name"))] == ["a", "b"]
    assert [row.text for row in read_rows(Path("org/name:test"), limit=1)] == ["a"]
    assert asked == [
        ("org/name", {"split": "train", "streaming": False}),
        ("org/name", {"split": "test", "streaming": True}),
    ]
    with pytest.raises(
        DataError, match=r"^org/gone: no such file, and the hub did not give .* \(Couldn't reach 'org/g"
    ):
        read_rows(Path("org/gone"))


@pytest.mark.parametrize("path", ["a/b.jsonl", "a/b/c", "rows", "/a/b", "../b"])
def test_what_is_no_hub_set(path: str) -> None:
    assert not is_hub_set(Path(path))
    assert is_hub_set(Path("org/name-v1.5:test"))
