"""A recipe's data as training gets it: rendered, mixed, with the origin of every row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from edgetune import workload
from edgetune.adapt import sft
from edgetune.artifact import Artifact
from edgetune.data.formats import read_rows
from edgetune.data.golden import Golden
from edgetune.data.provenance import FILE, Mixture
from edgetune.data.render import render
from edgetune.errors import DataError
from edgetune.recipe import Adapt
from edgetune.recipe_export import Calibration
from edgetune.sources import GOLDEN
from tests.data.test_formats import ANSWERED, ASKED
from tests.data.test_mixture import make, rows, save


def test_a_plain_file_is_rendered_row_by_row(tiny_model: Artifact, tmp_path: Path) -> None:
    data = make(tmp_path, save(tmp_path, "a", rows("a", 4)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    work = workload.load(data, tiny_model)
    assert list(work.train) == [render(row, tokenizer, [2]) for row in read_rows(Path(str(data.train)))]
    assert work.mixture.sources[0].rows == "1-4"
    assert workload.rows_line(data) == "rows: 4 to train on (completion), 2 held out (completion)"
    assert list(workload.train_rows(data)) == read_rows(Path(str(data.train)))


def test_a_mixture_goes_with_the_adapter(tiny_model: Artifact, tmp_path: Path) -> None:
    general = [{"text": "turn the light"}, {"instruction": "long " * 200, "output": "x"}]
    train = [
        {"path": save(tmp_path, "a", rows("set the light", 12))},
        {"path": save(tmp_path, "b", general), "replay": True},
    ]
    data = make(tmp_path, train, mix={"replay_share": 0.4}, max_length=64)
    work = workload.load(data, tiny_model)
    assert (len(work.train), work.n_too_long) == (16, 4)
    assert [one.rows for one in work.mixture.sources] == ["1-12", "1x4"]
    config = Adapt(method="lora", r=2, max_steps=1, eval_rows=3, batch_size=2, report_to=[])
    made = sft.run(config, tiny_model, tmp_path / "adapter", rows=work.train, golden=work.golden, mixture=work.mixture)
    assert Mixture.model_validate_json((made.path / FILE).read_bytes()) == work.mixture
    assert FILE in made.manifest.files
    assert made.manifest.notes["mixture"] == json.loads(json.dumps(work.mixture.summary))
    golden, general_ids = work.golden, work.calibration_text
    told = {"golden": golden, "mixture": work.mixture}
    assert made.identity == sft.planned_identity(config, tiny_model.identity, work.train, 0, general_ids, **told)
    others = [{**told, "golden": Golden.read(tiny_model.path)}, {**told, "mixture": None}]
    assert made.identity not in [
        sft.planned_identity(config, tiny_model.identity, work.train, 0, general_ids, **other) for other in others
    ]
    first = Golden.read(made.path).conversations[0]
    assert (first.trained_ids, first.labels) == (list(work.train[0].ids), work.train[0].mask)
    counted = made.manifest.notes["rows"]
    assert counted["early_stopping"] == 3
    assert counted["train"] <= 13


def test_plain_texts_leave_something_of_the_template_to_hold_to(tiny_model: Artifact, tmp_path: Path) -> None:
    texts = [{"text": f"turn the light to {n}"} for n in range(10)]
    base = Golden.read(tiny_model.path)
    golden = workload.load(make(tmp_path, save(tmp_path, "texts", texts)), tiny_model).golden
    assert [talk.messages for talk in golden.conversations] == list(GOLDEN)
    assert all(talk.trained_ids is None for talk in golden.conversations)
    assert (golden.chat_template, golden.stop_ids) == (base.chat_template, base.stop_ids)
    mixed = workload.load(make(tmp_path, save(tmp_path, "mixed", [*texts, *rows("a", 2)])), tiny_model).golden
    assert [talk.trained_ids is not None for talk in mixed.conversations] == [True, True]


def test_golden_conversations_are_rows_that_are_kept(tiny_model: Artifact, tmp_path: Path) -> None:
    train = [{"prompt": "long " * 200, "completion": "x"}, *rows("a", 9)]
    work = workload.load(make(tmp_path, save(tmp_path, "a", train), max_length=64), tiny_model)
    assert [talk.trained_ids for talk in work.golden.conversations] == [list(row.ids) for row in work.train[:8]]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": [ASKED, {**ANSWERED, "weight": 0}]}, r"b\.jsonl: line 2 has no labelled token"),
        (
            {"messages": [ASKED, ANSWERED], "tools": [{"name": "f"}]},
            r"b\.jsonl: line 2: the chat template does not show the row",
        ),
    ],
)
def test_what_is_refused_before_the_first_step(tiny_model: Artifact, tmp_path: Path, row: Any, says: str) -> None:
    train = [{"path": save(tmp_path, "a", rows("a", 1))}, {"path": save(tmp_path, "b", [*rows("b", 1), row])}]
    data = make(tmp_path, train)
    with pytest.raises(DataError, match=says):
        workload.load(data, tiny_model)


def test_a_split_is_rendered(tiny_model: Artifact, tmp_path: Path) -> None:
    train = [{"path": save(tmp_path, name, rows(name, 10))} for name in ("a", "b")]
    data = make(tmp_path, train, split={"share": 0.2})
    work = workload.load(data, tiny_model)
    assert (len(work.train), len(work.heldout)) == (16, 4)
    asked = [row.prompt for row in workload.heldout_rows(data)]
    assert [one.drawn for one in work.mixture.split] == [sum(f"user: {name} " in a for a in asked) for name in "ab"]


def test_rows_of_its_own_calibrate_in_the_place_of_general_text(tiny_model: Artifact, tmp_path: Path) -> None:
    train, own = save(tmp_path, "a", rows("a", 9)), save(tmp_path, "own", rows("own", 40))
    plain = workload.load(make(tmp_path, train), tiny_model)
    named = workload.load(make(tmp_path, train, calibration=own), tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    stream = [token for row in read_rows(Path(own)) for token in render(row, tokenizer, [2]).ids]
    config = Calibration(n_samples=4, n_tokens=16, general_share=0.5)
    assert named.calibration(config, 0).ids[2:].tolist() == [stream[:16], stream[-16:]]
    assert (named.calibration(config, 0).ids[:2] == plain.calibration(config, 0).ids[:2]).all()
    with pytest.raises(DataError, match=r"wants 400 x 16 tokens of .*own\.jsonl, \d+ are there"):
        named.calibration(Calibration(n_samples=400, n_tokens=16, general_share=1.0), 0)
    assert plain.calibration(config, 0).ids[2].tolist() == plain.calibration_text[:16]
    assert (named.calibration_text, named.text_rows()) == (plain.calibration_text, plain.text_rows())


def test_a_held_out_row_calibrates_nothing(tmp_path: Path) -> None:
    own = save(tmp_path, "own", [*rows("own", 3), *rows("held", 1)])
    data = make(tmp_path, save(tmp_path, "a", rows("a", 9)), calibration=own)
    with pytest.raises(DataError, match=r"own\.jsonl line 4 is held out"):
        workload.check_files(data, trained=True)
