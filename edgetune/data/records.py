"""Records of a data source: JSONL, JSON, CSV, Parquet, a folder that `datasets` saved, or a set on the hub.

A record is a dict and the place where it stands, which every later fault names.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from edgetune.backends import require
from edgetune.errors import DataError

STRUCTURED = ("messages", "tools")  # columns that flat tables hold as JSON text
FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")  # what ends so is never a set on the hub
DEEPEST = 100  # levels of a row's JSON: every reader, template and writer can follow so many
DATASET_MARKS = ("state.json", "dataset_dict.json")


@dataclass(frozen=True)
class Record:
    """One row as it was written. `line` counts from 1: the line of a text file, else the row."""

    values: dict[str, Any]
    line: int
    where: str


def read_records(path: Path, limit: int | None = None) -> Iterator[Record]:
    """Give the first `limit` records of a source. Raises DataError naming place, what was found and what to do."""
    if path.is_dir():
        records = _tables(path, _folder(path))
    elif not path.exists() and is_hub_set(path):
        records = _tables(path, _hub(path, streaming=limit is not None))
    else:
        reader = {".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(path.suffix.lower(), _jsonl)
        records = _opened(path, reader)
    return islice(records, limit)


def is_hub_set(path: Path) -> bool:
    """Tell whether a source that is no file is spelled as a set on the hub: org/name or org/name:split."""
    return len(path.parts) == 2 and path.suffix.lower() not in FILES and not str(path).startswith((".", "~"))


def _opened(path: Path, reader: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    try:
        yield from reader(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); give a JSONL file") from error


def _jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if raw.strip():
                where = f"{path} line {number}"
                yield _record(decoded(raw, where, "give one JSON object a line"), number, where)


def _json(path: Path) -> Iterator[Record]:
    """A list of objects; a file that does not begin with a bracket is taken for one object a line."""
    with path.open("rb") as stream:
        is_list = stream.read(4096).lstrip()[:1] == b"["
    if not is_list:
        yield from _jsonl(path)
        return
    for number, value in enumerate(_loaded(path.read_bytes(), str(path), "give a list of objects"), 1):
        where = f"{path} row {number}"
        yield _record(_shallow(value, where), number, where)


def _csv(path: Path) -> Iterator[Record]:
    with path.open("r", encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            for values in reader:
                where = f"{path} line {reader.line_num}"
                if None in values:
                    n_named = len(reader.fieldnames or ())
                    raise DataError(
                        f"{where}: more fields than the {n_named} of the first line; quote those with commas"
                    )
                yield _flat({k: v for k, v in values.items() if v is not None}, reader.line_num, where)
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num}: not valid CSV ({error}); give JSONL") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} after line {reader.line_num}: not UTF-8; save the file as UTF-8") from error


def _parquet(path: Path) -> Iterator[Record]:
    require("pyarrow")
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=1024) for row in batch.to_pylist())
            for number, values in enumerate(rows, 1):
                yield _flat(_without_none(values), number, f"{path} row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]}); write it again"
        ) from error


def _folder(path: Path) -> Any:
    datasets = require("datasets")
    marks = [name for name in DATASET_MARKS if (path / name).is_file()]
    if not marks:
        raise DataError(f"{path}: no {' or '.join(DATASET_MARKS)}; give a file, or what save_to_disk wrote")
    if marks[0] == "dataset_dict.json":
        splits = json.loads((path / marks[0]).read_text(encoding="utf-8")).get("splits", [])
        raise DataError(f"{path}: holds several splits; name one of {', '.join(str(path / name) for name in splits)}")
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: `datasets` cannot read this folder ({str(error).splitlines()[0]})") from error


def _hub(path: Path, *, streaming: bool) -> Any:
    """A set on the hub, its train split where none is named; streamed where only its first rows are wanted."""
    datasets = require("datasets")
    name, _, split = str(path).partition(":")
    try:
        return datasets.load_dataset(name, split=split or "train", streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors are OSErrors or RuntimeErrors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: no such file, and the hub did not give a set of that name ({reason})") from error


def _tables(path: Path, rows: Any) -> Iterator[Record]:
    for number, values in enumerate(rows, 1):
        yield _flat(_without_none(values), number, f"{path} row {number}")


def _flat(values: dict[str, Any], line: int, where: str) -> Record:
    structured = {
        key: decoded(value, f"{where}: {key!r}", "give JSON in this column")
        for key, value in values.items()
        if key in STRUCTURED and isinstance(value, str) and value.strip()
    }
    return Record({**values, **structured}, line, where)


def _without_none(value: Any) -> Any:
    """Tables give every struct all keys that any has, with None where one has it not."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


def decoded(raw: bytes | str, where: str, wanted: str) -> Any:
    """Read a JSON value. Raises DataError where it is none, or of more than DEEPEST levels."""
    return _shallow(_loaded(raw, where, wanted), where)


def _loaded(raw: bytes | str, where: str, wanted: str) -> Any:
    try:
        return json.loads(raw if isinstance(raw, str) else raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}); {wanted}") from error


def _shallow(value: Any, where: str) -> Any:
    level = _containers([value])
    for _ in range(DEEPEST):
        level = [inner for one in level for inner in _containers(one.values() if isinstance(one, dict) else one)]
        if not level:
            return value
    raise DataError(f"{where}: JSON of more than {DEEPEST} levels; make it flatter")


def _containers(values: Iterable[Any]) -> list[Any]:
    return [one for one in values if isinstance(one, (dict, list))]


def _record(values: Any, line: int, where: str) -> Record:
    if not isinstance(values, dict):
        raise DataError(f"{where}: found a JSON {type(values).__name__}, a row is an object")
    return Record(values, line, where)
