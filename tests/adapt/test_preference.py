"""DPO, IPO, KTO, ORPO and GRPO on the tiny Llama: each moves what it is meant to move, and goes on after a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOTrainer

from edgetune.adapt import merge, preference, rewards, trl_trainers
from edgetune.adapt.callbacks import SEAL, read_speed
from edgetune.artifact import Artifact
from edgetune.data.formats import Row
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


def margin(folder: Path, files: dict[str, str]) -> float:
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


@pytest.fixture(scope="module")
def margin_before(tiny_model: Artifact, files: dict[str, str]) -> float:
    return margin(tiny_model.path, files)


def test_what_a_row_mutes_is_part_of_the_identity(tiny_model: Artifact, files: dict[str, str]) -> None:
    config = configured("grpo", files, rewards=[{"json_valid": {}}])
    turns = (("user", "a"), ("assistant", "b")) * 2
    made = [
        preference.planned_identity(
            config, tiny_model.identity, [preference.Example((Row(turns, None, 1, muted=muted),))], 0
        )
        for muted in (frozenset[int](), frozenset({1}))
    ]
    assert made[0] != made[1]


@pytest.mark.parametrize(
    ("method", "adapter"),
    [
        *((method, "lora") for method in ("dpo", "ipo", "kto", "orpo")),
        *((method, "qlora") for method in ("dpo", "orpo")),
        ("dpo", "rslora"),
        ("dpo", "dora"),
        *(pytest.param(method, "qlora", marks=pytest.mark.slow) for method in ("ipo", "kto")),
    ],
)
def test_chosen_answers_gain_on_rejected_ones(
    tiny_model: Artifact, files: dict[str, str], margin_before: float, tmp_path: Path, method: str, adapter: str
) -> None:
    config = configured(method, files, adapter=adapter)
    examples = preference.read(config)
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=examples)
    assert made.identity == preference.planned_identity(config, tiny_model.identity, examples, 0)
    losses = [loss for _, loss in made.manifest.notes["loss"]]
    assert losses[-1] < losses[0]
    merged = merge.run(tiny_model, made, tmp_path / "merged")
    assert margin(merged.path, files) > margin_before + 1
    assert str(tmp_path) not in (made.path / "adapter_config.json").read_text()


def test_the_first_loss_of_dpo_is_that_of_a_model_which_is_its_own_reference(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path
) -> None:
    config = configured("dpo", files, adapter="lora")
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=preference.read(config))
    assert made.manifest.notes["loss"][0][1] == pytest.approx(0.693147, abs=1e-4)  # log 2: no margin yet


@pytest.mark.parametrize("method", ["dpo", "grpo", *(pytest.param(m, marks=pytest.mark.slow) for m in ("kto", "orpo"))])
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


REWARDED = {"rewards": [{"length": {"characters": 8}}], "generations": 2, "max_new_tokens": 4, "temperature": 2.0}
WATCHED = {"eval_rows": 3, "eval_steps": 2}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param("dpo", {}, marks=pytest.mark.slow),
        ("dpo", WATCHED),
        pytest.param("ipo", {}, marks=pytest.mark.slow),
        ("kto", {}),
        ("orpo", {}),
        ("grpo", REWARDED | WATCHED),
    ],
    ids=["dpo", "dpo watched", "ipo", "kto", "orpo", "grpo watched"],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    config = configured(method, files, **changes)
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


@pytest.mark.slow
def test_sigkill_in_the_middle_loses_no_step(tiny_model: Artifact, files: dict[str, str], tmp_path: Path) -> None:
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text('{"instruction": "set the light to 99 percent", "output": "{}"}\n')
    prefer = {"method": "dpo", "train": files["pairs"]} | SMALL | {"max_steps": 60}
    raw = {"name": "killed", "base": str(tiny_model.path), "data": {"train": files["plain"], "heldout": str(heldout)},
           "adapt": None, "prefer": prefer, "candidates": {"as-is": {}}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))

    def start(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edgetune", "adapt", str(tmp_path / "recipe.yaml")]
        command += ["--store", str(tmp_path / name), "--out", str(tmp_path / f"run-{name}")]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def adapter(name: str) -> Artifact:
        _, said = (process := start(name)).communicate(timeout=300)
        assert process.returncode == 0, said
        found = (Artifact.open(path.parent) for path in (tmp_path / name).glob("*/manifest.json"))
        return next(artifact for artifact in found if artifact.manifest.stage.startswith("adapt.prefer"))

    cut = start("cut")
    while not list((tmp_path / "cut").glob(f".*.work/checkpoint-*/{SEAL}")):
        assert cut.poll() is None, cut.communicate()[1]
        time.sleep(0.01)
    cut.kill()
    cut.communicate()
    assert not list((tmp_path / "cut").glob("*/adapter_model.safetensors"))
    assert adapter("cut").manifest.files == adapter("whole").manifest.files


@pytest.mark.parametrize(
    ("method", "changes", "curve"),
    [
        ("dpo", {"best_by": "pair_accuracy"}, "heldout_pair_accuracy"),
        ("ipo", {}, "heldout_loss"),
        ("kto", {}, "heldout_loss"),
        ("orpo", {"best_by": "pair_accuracy"}, "heldout_pair_accuracy"),
        ("grpo", REWARDED, "heldout_reward"),
    ],
)
def test_it_is_watched_by_rows_set_aside(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path, method: str, changes: dict[str, Any], curve: str
) -> None:
    config = configured(method, files, eval_rows=8, eval_steps=1, max_steps=3, patience=3, **changes)
    examples = preference.read(config)
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=examples, log_folder=tmp_path / "logs")
    notes = made.manifest.notes
    assert notes["rows"] == {"train": 13, "early_stopping": 3}
    assert made.manifest.fallbacks == ["prefer.eval_rows=8 is more than a fifth of the rows: 3 are used"]
    assert [step for step, _ in notes[curve]] == [1, 2, 3]
    speed = read_speed(tmp_path / "logs" / preference.SPEED, made.identity)
    assert [step for step, _ in speed] == [1, 2, 3]
    assert all(rate > 0 for _, rate in speed)


def test_the_best_checkpoint_is_kept_and_training_stops_early(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [3.0, 1.0, 2.0, 1.5, 1.25, 1.0, 2.0, 3.0]
    look = DPOTrainer.evaluation_loop

    def rigged(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = look(self, *args, **kwargs)
        output.metrics["eval_loss"] = told[self.state.global_step - 1]
        return output

    monkeypatch.setattr(DPOTrainer, "evaluation_loop", rigged)
    made = {}
    for name, patience in (("hasty", 1), ("patient", 8), ("later", 8)):
        if name == "later":
            told[4] = 0.5
        config = configured("dpo", files, adapter="lora", eval_rows=3, eval_steps=1, max_steps=8, patience=patience)
        made[name] = preference.run(config, tiny_model, tmp_path / name, examples=preference.read(config))
    curves = {name: [loss for _, loss in one.manifest.notes["heldout_loss"]] for name, one in made.items()}
    assert (curves["hasty"], curves["patient"]) == ([3.0, 1.0, 2.0], [3.0, 1.0, 2.0, 1.5, 1.25, 1.0, 2.0, 3.0])
    assert made["hasty"].manifest.files == made["patient"].manifest.files
    assert made["later"].manifest.files != made["patient"].manifest.files


def test_too_few_rows_to_watch_by_are_refused(tiny_model: Artifact, files: dict[str, str], tmp_path: Path) -> None:
    config = configured("dpo", files, eval_rows=4, train_rows=4)
    with pytest.raises(DataError, match=r"pairs.jsonl: 4 rows are too few, or too much alike, to set some aside"):
        preference.run(config, tiny_model, tmp_path / "adapter", examples=preference.read(config))


def test_the_format_of_the_rows_can_be_named(files: dict[str, str]) -> None:
    assert len(preference.read(configured("dpo", files, format="preference"))) == 16
    with pytest.raises(DataError, match="line 1: "):
        preference.read(configured("dpo", files, format="kto"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"eval_steps": 2}, "eval_steps: no rows are set aside to look at; set eval_rows"),
        ({"adapter": "lora", "merge": "auto"}, "merge auto needs a model in 4 bits; adapter lora holds 16"),
        ({"method": "kto", "eval_rows": 4, "best_by": "pair_accuracy"}, "best_by is not read by method kto"),
    ],
)
def test_keys_that_do_not_fit_are_refused(files: dict[str, str], changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        configured(**{"method": "dpo", "files": files} | changes)
    new = {"format", "eval_rows", "eval_steps", "patience", "best_by", "merge"}
    assert not new & set(configured("dpo", files).model_dump())


def test_golden_conversations_of_a_base_give_way_to_those_that_it_learns(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path
) -> None:
    config = configured("dpo", files, max_steps=1)
    examples = preference.read(config)
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=examples)
    golden = Golden.read(made.path)
    learned = [example.rows[0].as_dicts for example in examples[:8]]
    assert [talk.messages for talk in golden.conversations] == learned
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    seen = render(examples[0].rows[0], tokenizer, golden.stop_ids)
    assert (golden.conversations[0].trained_ids, golden.conversations[0].labels) == (list(seen.ids), seen.mask)
    merge.run(tiny_model, made, tmp_path / "merged")  # is held to them


def test_memory_that_runs_out_is_said(
    tiny_model: Artifact, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, ran = DPOTrainer.training_step, list[int]()

    def limited(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        rows = len(inputs["input_ids"])
        if rows > 4 and self.state.global_step:  # a pair is two
            raise MemoryError
        ran.append(self.state.global_step)
        return step(self, model, inputs, *args)

    monkeypatch.setattr(DPOTrainer, "training_step", limited)
    config = configured("dpo", files, max_steps=3, save_steps=50)
    made = preference.run(config, tiny_model, tmp_path / "adapter", examples=preference.read(config))
    assert ran == [0, 1, 1, 2, 2]
    assert made.manifest.fallbacks[0].startswith("out of memory with 4 rows at once after step 1: went on with 2")


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
