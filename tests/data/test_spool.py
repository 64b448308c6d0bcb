"""Rows on disk: they come back as they went, and memory does not grow with their text."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune import workload
from edgetune.adapt.trainer import Rows
from edgetune.artifact import Artifact, json_digest, list_digest
from edgetune.data.formats import Row
from edgetune.data.render import Rendered
from edgetune.data.spool import RenderedRows, RowSpool
from edgetune.errors import DataError
from tests.data.test_mixture import make, rows, save

JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5,
)  # fmt: skip
TURNS = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=3).map(tuple)
EXTRAS = st.lists(st.dictionaries(st.text(), JSON, max_size=2), max_size=3).map(tuple)


@given(st.lists(st.builds(
    Row, messages=TURNS, text=st.none() | st.text(), line=st.integers(0, 2**40), tools=EXTRAS, extras=EXTRAS,
    muted=st.frozensets(st.integers(0, 9)), form=st.sampled_from(["chat", "text"]),
), min_size=1, max_size=5))  # fmt: skip
def test_rows_come_back(found: list[Row]) -> None:
    spool = RowSpool()
    places = [spool.append(row) for row in found]
    assert [spool[place] for place in places] == found
    assert [spool[place].form for place in reversed(places)] == [row.form for row in reversed(found)]


@st.composite
def rendered(draw: st.DrawFn) -> Rendered:
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=9))
    labels = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    text = draw(st.text(st.characters()))
    return Rendered(tuple(ids), tuple(labels), draw(st.integers(0, 9)), text, draw(st.integers(0, 2**40)))


@given(st.lists(rendered(), max_size=5), st.data())
def test_rendered_rows_come_in_their_order(found: list[Rendered], data: st.DataObject) -> None:
    kept = RenderedRows()
    places = [kept.write(row) for row in found]
    assert len(kept) == 0
    order = data.draw(st.lists(st.sampled_from(range(len(found))), max_size=9) if found else st.just([]))
    kept.come([places[i] for i in order])
    assert list(kept) == [found[i] for i in order]
    assert [kept[i] for i in range(len(kept))] == list(kept)
    assert list(kept[1:3]) == list(kept)[1:3]
    kept.write(Rendered((1,), (True,), 0, "later", 1))  # a read between two writes
    assert list(kept) == [found[i] for i in order]


@given(st.lists(JSON, max_size=4))
def test_a_digest_piece_by_piece_is_that_of_the_whole(values: list[Any]) -> None:
    assert list_digest(iter(values)) == json_digest(values)


def test_rows_that_are_too_long_are_counted(tiny_model: Artifact, tmp_path: Path) -> None:
    found = rows("turn", 3)
    found[1]["prompt"] *= 30
    data = make(tmp_path, save(tmp_path, "a", found), max_length=64)
    work = workload.load(data, tiny_model)
    assert (len(work.train), work.n_too_long, work.mixture.sources[0].rows) == (2, 1, "1 3")
    with pytest.raises(DataError, match=r"a\.jsonl: every row is longer than max_length=8 tokens \(shortest \d+\)"):
        workload.load(data.model_copy(update={"max_length": 8}), tiny_model)


def test_memory_does_not_hold_the_text(tiny_model: Artifact, tmp_path: Path) -> None:
    """0.8 MB of text, some 163,000 tokens, on disk: as lists of numbers they took 13 MB."""
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for i in range(1000):
            file.write(json.dumps({"prompt": f"turn {i}", "completion": "the light in the kitchen " * 32}) + "\n")
    few = save(tmp_path, "few", rows("a", 3))
    workload.load(make(tmp_path, few, general=few), tiny_model)  # what is imported and cached
    data = make(tmp_path, str(path), max_length=100_000, general=few)
    tracemalloc.start()
    work = workload.load(data, tiny_model)
    held = Rows(work.train)
    left, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n_tokens = sum(len(row.ids) for row in work.train)
    assert n_tokens > 130_000
    assert len(held) == 1000
    assert left < 3e6, f"{left / 1e6:.1f} MB"
    assert peak < 6e6, f"{peak / 1e6:.1f} MB"
