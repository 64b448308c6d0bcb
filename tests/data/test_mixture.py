"""Mixtures: who gives how many rows, that draws are exact and repeatable, and that splits leak nothing."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgetune.data.mixture import compose, shares, systematic
from edgetune.data.provenance import content_digest, describe, spell
from edgetune.errors import DataError, RecipeError
from edgetune.recipe import parse_as
from edgetune.recipe_data import Data, Mix, TrainSource

TURNS = (("ask", "user"), ("say", "assistant")) * 2


def rows(name: str, n: int, **fields: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i}", "completion": "yes", **fields} for i in range(n)]


def save(folder: Path, name: str, found: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def make(folder: Path, train: Any, **settings: Any) -> Data:
    if "split" not in settings:
        settings["heldout"] = save(folder, "heldout", rows("held", 2))
    return parse_as(Data, {"train": train, **settings}, "data")


def drawn(data: Data) -> list[int]:
    """Rows of each source in the mixture."""
    counts = Counter(entry.source for entry in compose(data).train)
    return [counts[i] for i in range(len(data.sources))]


def test_a_plain_file_is_as_it_was_read(tmp_path: Path) -> None:
    path = save(tmp_path, "a", rows("a", 5))
    composed = compose(make(tmp_path, path, train_rows=3))
    assert [entry.row.line for entry in composed.train] == [1, 2, 3]
    assert len(composed.heldout) == 2
    assert compose(make(tmp_path, [{"path": path}])).train[:3] == composed.train


@pytest.mark.parametrize(
    ("sources", "mix", "counts"),
    [
        ([{}, {}], None, [30, 10]),
        ([{"cap": 6}, {}], None, [6, 10]),
        ([{"weight": 1}, {"weight": 1}], None, [20, 20]),
        ([{"weight": 1}, {"weight": 3}], {"rows": 100}, [25, 75]),
        ([{}, {}], {"rows": 4}, [3, 1]),
        ([{}, {}], {"temperature": 1e9}, [20, 20]),
        ([{}, {}], {"temperature": 2}, [25, 15]),
        ([{}, {"replay": True}], {"replay_share": 0.25}, [30, 10]),
        ([{}, {"replay": True}], {"replay_share": 0.2, "rows": 50}, [40, 10]),
    ],
)
def test_each_source_gives_its_share(tmp_path: Path, sources: list[Any], mix: Any, counts: list[int]) -> None:
    paths = [save(tmp_path, "a", rows("a", 30)), save(tmp_path, "b", rows("b", 10))]
    train = [{"path": path, **source} for path, source in zip(paths, sources, strict=True)]
    data = make(tmp_path, train, mix=mix)
    assert drawn(data) == counts
    assert compose(data).train == compose(data).train


def test_another_seed_draws_other_rows(tmp_path: Path) -> None:
    path = save(tmp_path, "a", rows("a", 30))
    for train, mix in ((path, {"rows": 10}), ([{"path": path, "cap": 10}], {})):
        first, second = (compose(make(tmp_path, train, mix={**mix, "seed": seed})).train for seed in (1, 2))
        assert len({entry.row.line for entry in first}) == 10
        assert {entry.row.line for entry in first} != {entry.row.line for entry in second}


@given(
    st.lists(st.floats(0.01, 100), min_size=1, max_size=50), st.integers(1, 500), st.integers(0, 9)
)  # fmt: skip
def test_a_draw_gives_each_row_its_due(weights: list[float], count: int, seed: int) -> None:
    found = systematic(np.asarray(weights), [None] * len(weights), count, np.random.default_rng(seed))
    due = np.asarray(weights) * count / sum(weights)
    assert found.sum() == count
    assert (np.abs(found - due) < 1 + 1e-6).all()


@given(
    st.lists(st.floats(0.5, 1e6), min_size=1, max_size=8), st.integers(1, 1000), st.floats(0.3, 50)
)  # fmt: skip
def test_shares_add_up(sizes: list[float], total: int, temperature: float) -> None:
    sources = [TrainSource(path="x") for _ in sizes]
    counts = shares(sources, sizes, Mix(rows=total, temperature=temperature))
    assert sum(counts) == total
    assert min(counts) >= 0


def test_older_rows_are_drawn_less_often(tmp_path: Path) -> None:
    new, old = rows("new", 40, date="2026-03-02"), rows("old", 40, date="2026-03-01T00:00:00+00:00")
    path = save(tmp_path, "a", new + old)
    data = make(tmp_path, path, mix={"decay": {"field": "date", "half_life_days": 1}})
    counts = Counter(entry.row.line > 40 for entry in compose(data).train)
    assert counts == {False: 40, True: 20}
    stamped = save(tmp_path, "b", [{**row, "date": 86_400 * i} for i, row in enumerate(rows("b", 2))])
    data = make(tmp_path, stamped, mix={"decay": {"field": "date", "half_life_days": 1}, "rows": 30})
    assert sorted(Counter(entry.row.line for entry in compose(data).train).items()) == [(1, 10), (2, 20)]


@pytest.mark.parametrize(("field", "label"), [("kind", "kind"), ("completion", "intent"), ("completion", "answer")])
def test_rare_labels_are_drawn_as_often_as_others(tmp_path: Path, field: str, label: str) -> None:
    def labelled(name: str, n: int, value: str) -> list[dict[str, Any]]:
        text = json.dumps({"intent": value}) if label == "intent" else value
        return [{**row, field: text} for row in rows(name, n)]

    path = save(tmp_path, "a", labelled("often", 12, "often") + labelled("rare", 3, "rare"))
    data = make(tmp_path, path, mix={"balance": {"label": label}})
    copies = Counter(entry.row.line for entry in compose(data).train)
    assert [copies[line] for line in range(1, 16)] == [1] * 12 + [4] * 3
    data = make(tmp_path, path, mix={"balance": {"label": label, "max_factor": 2}})
    assert len(compose(data).train) == 12 + 3 * 2
    data = make(tmp_path, path, mix={"balance": {"label": label, "strength": 0.5}})
    assert len(compose(data).train) == 12 + 3 * 2


def test_what_is_not_whole_is_drawn_within_a_label(tmp_path: Path) -> None:
    found = rows("often", 29, kind="often") + rows("rare", 7, kind="rare") + rows("seldom", 3, kind="seldom")
    data = make(tmp_path, save(tmp_path, "a", found), mix={"balance": {"label": "kind"}})
    entries = compose(data).train
    assert Counter(entry.label for entry in entries) == {"often": 29, "rare": 29, "seldom": 29}
    copies = Counter(entry.row.line for entry in entries)
    assert {copies[line] for line in range(30, 37)} == {4, 5}
    assert {copies[line] for line in range(37, 40)} == {9, 10}


def test_a_split_keeps_groups_whole(tmp_path: Path) -> None:
    people = [{**row, "user": f"user {i % 10}"} for i, row in enumerate(rows("a", 100))]
    path = save(tmp_path, "a", people)
    composed = compose(make(tmp_path, path, split={"share": 0.2, "group": "user"}))
    held = {row.line % 10 for row in composed.heldout}
    assert (len(held), len(composed.heldout), len(composed.train)) == (2, 20, 80)
    assert not held & {entry.row.line % 10 for entry in composed.train}
    other = compose(make(tmp_path, path, split={"share": 0.2, "group": "user", "seed": 1}))
    assert [row.line for row in other.heldout] != [row.line for row in composed.heldout]
    more = save(tmp_path, "more", [*people, {**people[0], "prompt": "new", "user": "user 3"}])
    grown = compose(make(tmp_path, more, split={"share": 0.2, "group": "user"}))
    assert {row.line % 10 for row in grown.heldout if row.line <= 100} == held  # a new row moves no other


def test_a_prompt_that_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    asked = [{**row, "prompt": f"Question {i % 50}", "user": str(i)} for i, row in enumerate(rows("a", 100))]
    by_user = compose(make(tmp_path, save(tmp_path, "a", asked), split={"share": 0.1, "group": "user"}))
    assert (len(by_user.heldout), by_user.leaks, len(by_user.train)) == (10, 10, 80)
    by_prompt = compose(make(tmp_path, save(tmp_path, "a", asked), split={"share": 0.1}))
    assert (len(by_prompt.heldout), by_prompt.leaks, len(by_prompt.train)) == (10, 0, 90)


def test_a_talk_of_which_one_turn_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": role, "content": f"{what} {i}"} for what, role in TURNS[:n]], "user": f"{i} {n}"}
        for i in range(20)
        for n in (2, 4)
    ]
    for group in (None, "user"):
        made = compose(make(tmp_path, save(tmp_path, "a", talks), split={"share": 0.2, "group": group}))
        held = {row.prompt for row in made.heldout}
        assert not held & {prompt for entry in made.train for prompt in entry.row.prompts}
        assert made.leaks == 40 - len(made.heldout) - len(made.train) > 0


def test_a_source_whose_rows_decay_to_nothing_is_refused(tmp_path: Path) -> None:
    dates = (("a", "2026-01-11"), ("b", "2021-01-11"))
    paths = [save(tmp_path, name, rows(name, 5, date=date)) for name, date in dates]
    for weights in ({}, {"weight": 1}):
        train = [{"path": path, **weights} for path in paths]
        with pytest.raises(DataError, match=r"b\.jsonl: its newest row is 1826 days older than the newest of all, whi"):
            compose(make(tmp_path, train, mix={"decay": {"field": "date", "half_life_days": 1}}))
        assert drawn(make(tmp_path, train, mix={"decay": {"field": "date", "half_life_days": 1e9}})) == [5, 5]


def test_a_replay_source_is_neither_split_nor_asked_for_fields(tmp_path: Path) -> None:
    task = save(tmp_path, "a", rows("a", 40, date="2026-01-01"))
    general = save(tmp_path, "b", [{"text": f"text {i}"} for i in range(5)])
    settings = {"replay_share": 0.1, "decay": {"field": "date", "half_life_days": 9}}
    train = [{"path": task}, {"path": general, "replay": True}]
    data = make(tmp_path, train, split={"share": 0.1}, mix=settings)
    assert drawn(data) == [36, 4]


def test_the_mixture_is_told_exactly(tmp_path: Path) -> None:
    path = save(tmp_path, "a", rows("a", 6))
    data = make(tmp_path, [{"path": path, "weight": 1}, {"path": save(tmp_path, "b", rows("b", 2)), "weight": 2}])
    composed = compose(data)
    made = describe(data, composed, composed.train[1:])
    assert [(one.found, one.drawn) for one in made.sources] == [(6, 2), (2, 5)]
    assert made.sources[1].rows in ("1x2 2x3", "1x3 2x2")
    assert made.too_long == 1
    assert made.sources[1].digest == content_digest([e.row for e in composed.train if e.source == 1])
    assert made.sources[0].sha256 is not None
    assert made.settings == {}
    assert made.summary[0] == {"path": path, "rows": 2, "different": 2, "digest": made.sources[0].digest}


@given(st.lists(st.integers(1, 40)))
def test_row_numbers_can_be_read_back(lines: list[int]) -> None:
    read: list[int] = []
    for word in spell(lines).split():
        span, _, copies = word.partition("x")
        first, _, last = span.partition("-")
        read += [line for line in range(int(first), int(last or first) + 1) for _ in range(int(copies or 1))]
    assert read == sorted(lines)


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "no such date": ({"mix": {"decay": {"field": "when", "half_life_days": 1}}}, r"line 1: 'when' .* found nothing$"),
    "no date": ({"mix": {"decay": {"field": "prompt", "half_life_days": 1}}}, r"line 1: 'prompt' .* found 'a 0'$"),
    "no such label": ({"mix": {"balance": {"label": "intent"}}}, r"line 1: mix\.balance\.label 'intent' is no key of"),
    "no such group": (
        {"split": {"group": "user"}},
        r"line 1: split\.group names the key 'user', the row has 'prompt', ",
    ),
    "one group": ({"split": {"group": "completion"}}, r"split: the training rows are one group only \(4 rows\)"),
    "half a group": ({"split": {"group": "half"}}, r"line 1: 'half' \(split\.group\) holds half a character \(surrog"),
    "an answer that is too deep": (
        {"mix": {"balance": {"label": "intent"}}, "format": "alpaca"},
        r"line 1: mix\.balance\.label 'intent' is no key of the row, nor of a JSON object as answer$",
    ),
    "a date that is no number": (
        {"mix": {"decay": {"field": "nan", "half_life_days": 1}}},
        r"line 1: 'nan' \(mix\.decay\.field\) must be an ISO 8601 date or seconds since 1970, found nan$",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_each_fault_says_what_to_do(tmp_path: Path, case: str) -> None:
    settings, says = FAULTS[case]
    more = {"nan": float("nan"), "half": "\ud800", "instruction": "a", "output": "[" * 100_000}
    train = save(tmp_path, "a", rows("a", 4, **more))
    with pytest.raises(DataError, match=says):
        compose(make(tmp_path, train, **settings))


def test_a_leak_in_an_earlier_turn_is_refused(tmp_path: Path) -> None:
    talk = [{"role": role, "content": text} for text, role in (("held 1", "user"), *TURNS[1:])]
    with pytest.raises(DataError, match=r"heldout\.jsonl line 2 is also .*a\.jsonl line 1 \(1 such rows\)"):
        compose(make(tmp_path, save(tmp_path, "a", [{"messages": talk}])))


def test_a_leak_in_any_source_is_refused(tmp_path: Path) -> None:
    train = [{"path": save(tmp_path, name, found)} for name, found in (("a", rows("a", 2)), ("b", rows("held", 1)))]
    with pytest.raises(DataError, match=r"heldout\.jsonl line 1 is also .*b\.jsonl line 1 \(1 such rows\)"):
        compose(make(tmp_path, train))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": "t"}, "data: give heldout"),
        ({"train": "t", "heldout": "h", "split": {}}, r"give heldout \(a file\) or split .*, one of the two$"),
        ({"train": [], "heldout": "h"}, r"data\.train: List should have at least 1 item"),
        (
            {"train": [{"path": "a", "weigth": 2}], "heldout": "h"},
            r"'data\.train\.0\.weigth'; did you mean 'weight'\?$",
        ),
        (
            {"train": [{"path": "a", "weight": 1}, {"path": "b"}], "heldout": "h"},
            "give every source a weight, or none$",
        ),
        ({"train": [{"path": "a"}, {"path": "b", "replay": True}], "heldout": "h"}, "replay_share and a source with"),
        ({"train": "a", "heldout": "h", "mix": {"replay_share": 0.2}}, "replay_share and a source with replay"),
        (
            {"train": [{"path": "a", "replay": True}], "heldout": "h", "mix": {"replay_share": 0.2}},
            "every source is replay; one at least must be what is learned$",
        ),
        (
            {"train": [{"path": "a", "weight": 1}], "heldout": "h", "mix": {"temperature": 2}},
            r"mix\.temperature and weights of sources exclude each other; leave one out$",
        ),
        ({"train": [{"path": "a"}], "heldout": "h", "train_rows": 3}, "train_rows is for a single source; use cap, or"),
    ],
)
def test_keys_that_do_not_fit_together(data: dict[str, Any], says: str) -> None:
    from edgetune.recipe import parse_recipe

    with pytest.raises(RecipeError, match=says):
        parse_recipe({"name": "a", "base": "b", "candidates": {"x": {}}, "data": data})
