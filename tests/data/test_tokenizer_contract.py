"""The rendering contract: a folder whose tokenizer renders otherwise than training did is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from edgetune.adapt import sft
from edgetune.artifact import Artifact, draft
from edgetune.compress import distill, quantize, scale, sparsify, teacher
from edgetune.compress.prune import stage as pruning
from edgetune.data.calibration import CalibrationSet
from edgetune.data.checks import apart, refuse_untaught
from edgetune.data.contract import hold
from edgetune.data.formats import Row, parse_row
from edgetune.data.golden import Golden, trained_golden
from edgetune.data.records import Record
from edgetune.data.render import Rendered, render
from edgetune.errors import ContractError, DataError
from edgetune.recipe import Adapt, Awq, Prune, Rtn
from edgetune.recipe_distill import Distill
from edgetune.recipe_sparsify import Sparsify
from tests.data.test_formats import ANSWERED, ASKED, TOOL, WITH_TOOLS

# As the tiny model's, and with tools, calls and their results.
TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def row(**values: Any) -> Row:
    return parse_row(Record(values, 7, "line 7"), "auto")


@pytest.fixture
def folder(tiny_model: Artifact, tmp_path: Path) -> Path:
    """A model folder whose golden conversations come from training rows, one of them with a muted answer."""
    made = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(made)
    rows = [
        row(prompt="set the light", completion="on"),
        row(messages=[ASKED, {**ANSWERED, "weight": 0}, ASKED, ANSWERED]),
    ]
    trained_golden(tokenizer, rows, [2]).write(made)
    return made


def test_ids_and_label_masks_are_stored_and_hold(folder: Path) -> None:
    golden = Golden.read(folder)
    first, second = golden.conversations
    assert first.trained_ids is not None
    assert first.labels is not None
    assert first.labels == "0" * first.prompt_length + "1" * (len(first.trained_ids) - first.prompt_length)
    assert second.muted == [1]
    assert second.labels is not None
    assert "1" not in second.labels[: len(second.labels) // 2]
    hold(folder)


def test_golden_conversations_of_a_base_have_no_mask(tiny_model: Artifact) -> None:
    assert "trained_ids" not in (tiny_model.path / "golden.json").read_text()
    hold(tiny_model.path)


def test_a_checkpoint_that_would_render_otherwise_is_not_written(folder: Path, tmp_path: Path) -> None:
    golden = Golden.read(folder)
    golden.model_copy(update={"bos_id": 0}).write(folder)
    with draft(tmp_path / "wrong", kind="model", stage="source/1", config={}) as pending:
        shutil.copytree(folder, pending.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    with pytest.raises(ContractError, match=r"BOS differs from training's: '0', here '1'$"):
        quantize.run(Rtn(group_size=32), pending.artifact, tmp_path / "made")
    assert not (tmp_path / "made").exists()


@pytest.fixture
def wrong(folder: Path, tmp_path: Path) -> Artifact:
    """A model whose golden conversations name another BOS than its tokenizer."""
    Golden.read(folder).model_copy(update={"bos_id": 0}).write(folder)
    with draft(tmp_path / "wrong", kind="model", stage="source/1", config={}) as pending:
        shutil.copytree(folder, pending.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    return pending.artifact


@pytest.mark.parametrize("stage", ["full", "prune", "awq", "sparsify", "distill"])
def test_no_stage_passes_on_what_would_render_otherwise(wrong: Artifact, tmp_path: Path, stage: str) -> None:
    tokenizer, out = AutoTokenizer.from_pretrained(wrong.path), tmp_path / "made"
    rows = [render(row(prompt=f"set the light to {n}", completion="on"), tokenizer, [2]) for n in range(10)]
    short: dict[str, Any] = {"max_steps": 1, "batch_size": 2, "eval_rows": 2, "report_to": []}
    calibration = CalibrationSet(np.random.default_rng(0).integers(3, 500, (4, 16)))

    def run() -> None:
        if stage == "full":
            sft.run(Adapt(method="full", **short), wrong, out, rows=rows, golden=Golden.read(wrong.path))
        elif stage == "prune":
            pruning.run(Prune(layers=1), wrong, out, calibration=calibration)
        elif stage == "awq":
            scale.run(Awq(group_size=32), wrong, out, calibration=calibration)
        elif stage == "sparsify":
            sparsify.run(Sparsify(), wrong, out, calibration=calibration)
        else:
            config = Distill(student="base", **short)
            said = teacher.run(config, wrong, tmp_path / "said", rows=rows)
            distill.run(config, wrong, wrong, said, out, rows=rows)

    with pytest.raises(ContractError, match=r"BOS differs from training's: '0', here '1'$"):
        run()
    assert not out.exists()


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_each_difference_is_named(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").write_text(template.replace("assistant\n", "assistant\n "))
    with pytest.raises(ContractError, match=r"model: chat template differs from training's"):
        hold(folder)
    (folder / "chat_template.jinja").write_text(template)
    edit(folder / "generation_config.json", eos_token_id=[0, 2])
    with pytest.raises(ContractError, match=r"model: stop set differs from training's: '\[2\]', here '\[0, 2\]'$"):
        hold(folder)
    edit(folder / "generation_config.json", eos_token_id=2)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    with pytest.raises(ContractError, match=r"model: end token differs from training's: '\[2\]', here '0'$"):
        hold(folder)
    edit(folder / "tokenizer_config.json", eos_token="<|im_end|>", bos_token="<|endoftext|>")
    with pytest.raises(ContractError, match=r"model: BOS differs from training's: '1', here '0'$"):
        hold(folder)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("labels", "1" * 9, r"golden conversation 0 has other ids or labels than in training$"),
        ("ids", [1, 2], r"golden conversation 0 is rendered otherwise than in training$"),
    ],
)
def test_a_conversation_that_comes_out_otherwise(folder: Path, key: str, value: Any, says: str) -> None:
    golden = Golden.read(folder)
    first = golden.conversations[0].model_copy(update={key: value})
    golden.model_copy(update={"conversations": [first]}).write(folder)
    with pytest.raises(ContractError, match=says):
        hold(folder)


def test_a_talk_with_tools_is_rendered_and_held(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    talk = row(messages=WITH_TOOLS, tools=[TOOL])
    with pytest.raises(DataError, match=r"^line 7: the chat template does not show the row's tools; use a model that"):
        render(talk, tokenizer, [2])
    tokenizer.chat_template = TOOL_TEMPLATE.replace("{{ call.function.name }}", "")
    with pytest.raises(DataError, match=r"^line 7: the chat template leaves out 'read_sensor' of a tool call; use a"):
        render(row(messages=WITH_TOOLS), tokenizer, [2])
    tokenizer.chat_template = TOOL_TEMPLATE
    seen = render(talk, tokenizer, [2])
    learned = tokenizer.decode([i for i, on in zip(seen.ids, seen.labels, strict=True) if on])
    assert learned == 'read_sensor{"room": "hall"}<|im_end|>21 degrees<|im_end|>'
    call = render(row(messages=WITH_TOOLS[:2], tools=[TOOL]), tokenizer, [2])
    assert call.target_text == 'read_sensor{"room": "hall"}'
    tokenizer.save_pretrained(folder)
    trained_golden(tokenizer, [talk], [2]).write(folder)
    hold(folder)


def test_rows_that_teach_nothing_or_no_end(tmp_path: Path) -> None:
    taught = Rendered((1, 5, 2), (False, True, True), 1, "", 1)
    refuse_untaught([taught], [2])
    with pytest.raises(DataError, match=r"^t: line 3 has no labelled token, it would teach nothing; give one of its"):
        refuse_untaught([taught, Rendered((1, 5, 2), (False,) * 3, 1, "", 3)], [2], Path("t"))
    with pytest.raises(DataError, match=r"^no training row shows an end token \(\[2, 9\]\) as learned, so the model"):
        refuse_untaught([Rendered((1, 5, 2), (False, True, False), 1, "", 1)], [2, 9])


def test_copies_of_watched_rows_are_not_trained_on() -> None:
    first, second = (Rendered((n,), (True,), 0, "", n) for n in (1, 2))
    assert apart([first, first, second, second], [1, 2, 3], [0]) == [2, 3]
