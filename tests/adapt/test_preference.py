"""DPO, IPO, KTO, ORPO and GRPO on the tiny Llama: each moves what it is meant to move, and goes on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from edgetune.adapt import merge, preference, rewards, trl_trainers
from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.data.render import render
from edgetune.errors import DataError, RecipeError
from edgetune.recipe_training import Prefer, Reward

SMALL: dict[str, Any] = {
    "r": 4, "alpha": 8, "batch_size": 4, "max_steps": 6, "save_steps": 2, "learning_rate": 1e-2, "report_to": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One file for each kind of row: lights that are switched as asked are better."""
    folder = tmp_path_factory.mktemp("rows")
    pairs, labelled, plain = [], [], []
    for n in range(16):
        prompt, good, bad = f"set the light to {n} percent", f'{{"level":{n}}}', "what is the temperature"
        pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
        labelled.append({"prompt": prompt, "completion": good if n % 2 else bad, "label": bool(n % 2)})
        plain.append({"instruction": prompt, "output": good})
    made = {}
    for name, rows in (("pairs", pairs), ("labelled", labelled), ("plain", plain)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made[name] = str(path)
    return made


def configured(method: str, files: dict[str, str], **changes: Any) -> Prefer:
    rows = files[{"kto": "labelled", "grpo": "plain"}.get(method, "pairs")]
    return Prefer.model_validate({"method": method, "train": rows} | SMALL | changes)


def margin(folder: Path, config: Prefer, files: dict[str, str]) -> float:
    """Mean log-probability of chosen answers less that of rejected ones, in a model's folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total = 0.0
    for example in preference.read(configured("dpo", files)):
        for row, sign in zip(example.rows, (1, -1), strict=True):
            one = render(row, tokenizer, [2])
            ids = torch.tensor([one.ids])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, one.start - 1 : -1]
            total -= sign * float(functional.cross_entropy(logits, ids[0, one.start :], reduction="sum"))
    return total / 16


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "orpo"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_chosen_answers_gain_on_rejected_ones(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path, method: str, adapter: str
) -> None:
    config = configured(method, files, adapter=adapter)
    examples = preference.read(config)
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=examples)
    assert made.identity == preference.planned_identity(config, tiny_model.identity, examples, 0)
    losses = [loss for _, loss in made.manifest.notes["loss"]]
    assert losses[-1] < losses[0]
    merged = merge.run(tiny_model, made, tmp_path / "merged")
    assert margin(merged.path, config, files) > margin(tiny_model.path, config, files) + 1
    assert str(tmp_path) not in (made.path / "adapter_config.json").read_text()


def test_the_first_loss_of_dpo_is_that_of_a_model_which_is_its_own_reference(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path
) -> None:
    config = configured("dpo", files, adapter="lora")
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=preference.read(config))
    assert made.manifest.notes["loss"][0][1] == pytest.approx(0.693147, abs=1e-4)  # log 2: no margin yet


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "grpo"])
def test_gradient_checkpointing_changes_no_loss(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path, method: str
) -> None:
    changes: dict[str, Any] = {"max_steps": 2}
    if method == "grpo":
        changes |= {"rewards": [{"length": {"characters": 8}}], "generations": 2, "max_new_tokens": 4}
    losses = []
    for twice in (False, True):
        config = configured(method, files, gradient_checkpointing=twice, **changes)
        made = preference.run(config, tiny_model, tmp_path / str(twice), examples=preference.read(config))
        losses.append([loss for _, loss in made.manifest.notes["loss"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-6)


def test_grpo_earns_more(tiny_model: Artifact, files: dict[str, str], tmp_path: Path) -> None:
    config = configured(
        "grpo", files, adapter="lora", rewards=[{"length": {"characters": 8}}], batch_size=16, generations=8,
        max_new_tokens=12, max_steps=8, beta=0.0, learning_rate=3e-2,
    )  # fmt: skip
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=preference.read(config))
    earned = [reward for _, reward in made.manifest.notes["reward"]]
    assert sum(earned[-2:]) > sum(earned[:2])


class Dies(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_a_killed_dpo_goes_on_to_the_same_bytes(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured("dpo", files)
    examples = preference.read(config)
    whole = preference.run(config, tiny_model, tmp_path / "whole", examples=examples)
    make = trl_trainers.make

    def dying(*args: Any) -> Any:
        trainer = make(*args)
        trainer.add_callback(Dies())
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(trl_trainers, "make", dying)
        with pytest.raises(KeyboardInterrupt):
            preference.run(config, tiny_model, tmp_path / "cut", examples=examples)
    steps: list[int] = []
    resumed = preference.run(
        config, tiny_model, tmp_path / "cut", examples=examples, progress=lambda done, *_: steps.append(done)
    )
    assert steps == [5, 6]
    assert resumed.manifest.files == whole.manifest.files


def test_rows_that_are_too_long_are_left_out_and_counted(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path
) -> None:
    config = configured("dpo", files, max_steps=1)
    examples = preference.read(config)
    stop = Golden.read(tiny_model.path).stop_ids
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    lengths = sorted(max(len(render(row, tokenizer, stop).ids) for row in one.rows) for one in examples)
    few = config.model_copy(update={"max_length": lengths[9]})
    made = preference.run(few, tiny_model, tmp_path / "some", examples=examples)
    n_left = sum(length > lengths[9] for length in lengths)
    assert made.manifest.notes["rows"] == {"train": 16 - n_left}
    assert n_left == 0 or made.manifest.fallbacks[0].startswith(f"{n_left} rows are longer")
    none = config.model_copy(update={"max_length": 5})
    with pytest.raises(DataError, match=rf"max_length=5 tokens \(shortest {lengths[0]}\); raise it$"):
        preference.run(none, tiny_model, tmp_path / "none", examples=examples)


def test_grpo_wants_prompts(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "just words"}\n')
    config = Prefer(method="grpo", train=str(path), rewards=[Reward.model_validate({"json_valid": {}})])
    with pytest.raises(DataError, match="line 1: a plain text has no prompt to answer"):
        preference.read(config)


@pytest.mark.parametrize(
    ("reward", "earned"),
    [
        ({"json_valid": {}}, [1, 0, 1]),
        ({"exact_match": {}}, [1, 0, 0]),
        ({"regex": {"pattern": r"\{.*\}"}}, [1, 0, 0]),
        ({"length": {"characters": 4}}, [0.25, 0.25, 1]),
        ({"length": {"characters": 3}}, [0, 0, 1]),
    ],
)
def test_rule_rewards(reward: dict[str, Any], earned: list[float]) -> None:
    _, weight, score = rewards.score_of(Reward.model_validate(reward))
    assert weight == 1
    assert score(["p"] * 3, ['{"a":1}', "no json", "12"], ['{"a":1}', "x", "y"]) == earned


def test_a_reward_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(
        "def shouts(prompts, completions, answers):\n    return [text.isupper() for text in completions]\n"
        "def short(prompts, completions, answers):\n    return [1.0]\n"
    )
    own = Reward.model_validate({"function": {"name": "my_rewards:shouts", "weight": 2}})
    name, weight, score = rewards.score_of(own)
    assert (name, weight, score(["p"] * 2, ["A", "b"], ["", ""])) == ("my_rewards:shouts", 2, [1.0, 0.0])
    assert list(rewards.sources_of([own])) == ["reward my_rewards:shouts"]
    _, _, short = rewards.score_of(Reward.model_validate({"function": {"name": "my_rewards:short"}}))
    with pytest.raises(RecipeError, match=r"my_rewards:short gave 1 numbers for 2 answers"):
        short(["p"] * 2, ["a", "b"], ["", ""])
    for name, says in (("my_rewards:none", "has no 'none'"), ("no_module:x", "cannot be imported"),
                       ("json:JSONDecoder", "is a type; give a Python function")):  # fmt: skip
        with pytest.raises(RecipeError, match=says):
            rewards.load_function(name)
