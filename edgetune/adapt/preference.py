"""Preference and reward training of a LoRA adapter: DPO (arXiv:2305.18290), IPO (2310.12036), KTO (2402.01306),
ORPO (2403.07691) and GRPO (2402.03300).

trl does the mathematics, on ids that were rendered as for every other stage. The reference of DPO, IPO, KTO and GRPO
is the model with its adapter switched off, so memory is that of one model; ORPO has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EarlyStoppingCallback, Trainer
from transformers.trainer_callback import TrainerState

from edgetune.adapt import methods, out_of_memory, rewards
from edgetune.adapt.base import load_base
from edgetune.adapt.callbacks import CheckpointSeal, ProgressReport, SpeedLog, tensorboard
from edgetune.adapt.curves import diverged
from edgetune.artifact import Artifact, draft, identity, json_digest
from edgetune.data.formats import Row, read_rows
from edgetune.data.golden import GOLDEN_ROWS, Golden, trained_golden
from edgetune.data.preference import read_kto, read_preferences
from edgetune.data.render import Rendered, render
from edgetune.devices import has_fast_bfloat16
from edgetune.errors import DataError
from edgetune.progress import Report, silent
from edgetune.recipe_training import Prefer
from edgetune.training_memory import Lengths

STAGE = "adapt.prefer/3"
WATCHED = {"loss": "loss", "pair_accuracy": "rewards/accuracies", "reward": "reward"}  # as trl calls them
PATIENCE = 3
NONE_GOOD = "no answer is labelled good, and kto learns nothing from bad ones alone"
SPEED = "prefer-speed.json"  # in the folder of the logs


@dataclass(frozen=True)
class Example:
    """One row of preference training: the chosen and the rejected conversation, or one with its label, if any."""

    rows: tuple[Row, ...]
    label: bool | None = None


def read(config: Prefer) -> list[Example]:
    """Read the rows that a method trains on. Raises DataError naming file and line."""
    path, form, limit = Path(config.train), config.format, config.train_rows
    if config.method == "kto":
        found = [Example((row.row,), row.label) for row in read_kto(path, form, limit)]
        if not any(example.label for example in found):
            raise DataError(f"{path}: {NONE_GOOD}")
        return found
    if config.method != "grpo":
        return [Example(row.rows) for row in read_preferences(path, form, limit)]
    rows = read_rows(path, form, limit)
    plain = next((row for row in rows if row.text is not None), None)
    if plain is not None:
        raise DataError(f"{path} line {plain.line}: a plain text has no prompt to answer; grpo needs conversations")
    return [Example((row,)) for row in rows]


def planned_identity(config: Prefer, source_identity: str, examples: Sequence[Example], seed: int) -> str:
    """Identity of the adapter that `run` would make."""
    return identity(STAGE, _config(config, seed), [source_identity], _sources(config, examples))


def run(
    config: Prefer,
    source: Artifact,
    out: Path,
    *,
    examples: Sequence[Example],
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
    log_folder: Path | None = None,
) -> Artifact:
    """Train an adapter on a `model` artifact and write it as an `adapter` artifact; goes on after a kill.

    Raises DataError where every row is longer than `max_length`, or too few remain beside those set aside.
    """
    from transformers import AutoTokenizer

    golden = Golden.read(source.path)
    tokenizer = AutoTokenizer.from_pretrained(source.path, local_files_only=True)
    rendered = [[render(row, tokenizer, golden.stop_ids) for row in example.rows] for example in examples]
    kept = [i for i, pair in enumerate(rendered) if _fits(config, pair)]
    if not kept:
        shortest = min(max(len(r.ids) for r in pair) for pair in rendered)
        raise DataError(f"{config.train}: every row is longer than prefer.max_length={config.max_length} tokens "
                        f"(shortest {shortest}); raise it")  # fmt: skip
    if all(talk.trained_ids is None for talk in golden.conversations):  # a base's own, or none
        shown = [examples[i].rows[0] for i in kept[:GOLDEN_ROWS]]
        golden = trained_golden(tokenizer, shown, golden.stop_ids)
    aside, order, fallbacks = _split(config, rendered, kept, seed)
    if config.method == "kto" and not any(examples[i].label for i in order):
        raise DataError(f"{config.train}: {NONE_GOOD} among the {len(order)} rows to train on")
    made = planned_identity(config, source.identity, examples, seed)
    with draft(
        out,
        kind="adapter",
        stage=STAGE,
        config=_config(config, seed),
        parents=[source],
        sources=_sources(config, examples),
    ) as pending:
        from edgetune.adapt import trl_trainers

        sampled = config.batch_size if config.method == "grpo" else 0
        n_tokens = sum(r.start if sampled else len(r.ids) for i in order for r in rendered[i]) / len(order)

        def build(config: Prefer, progress: Report) -> Trainer:
            base = load_base(source.path, device, four_bit=config.adapter == "qlora")
            lora = methods.lora_config(config.adapter, config.r, config.alpha)
            settings = _settings(config, len(order), pending.work, device, seed)
            callbacks: list[Any] = [
                CheckpointSeal(),
                ProgressReport(progress, n_tokens * config.batch_size),
                *tensorboard(config.report_to, log_folder),
            ]
            if config.eval_rows is not None:
                callbacks.append(EarlyStoppingCallback(early_stopping_patience=config.patience or PATIENCE))
            if log_folder is not None:
                callbacks.append(SpeedLog(log_folder / SPEED, made, n_tokens * config.batch_size, sampled))
            train, watched = ([(rendered[i], examples[i].label) for i in places] for places in (order, aside))
            return trl_trainers.make(config, base, lora, tokenizer, train, watched, settings, callbacks)

        least = 2 if config.method == "kto" else 1  # it compares rows of a batch with one another
        trainer, ran_out = out_of_memory.train(build, config, pending.work, progress, least=least, evaluates=False)
        lost = diverged(trainer)
        methods.save_adapter(trainer.model, pending.path, source.identity)
        golden.write(pending.path)
        pending.seed = seed
        pending.notes.update(_history(trainer.state))
        pending.notes["rows"] = {"train": len(order), **({"early_stopping": len(aside)} if aside else {})}
        pending.notes["trained_parameters"] = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        pending.fallbacks.extend([*fallbacks, *ran_out, *lost])
        if len(kept) < len(examples):
            pending.fallbacks.append(
                f"{len(examples) - len(kept)} rows are longer than prefer.max_length={config.max_length} and left out"
            )
    return pending.artifact


def _split(
    config: Prefer, rendered: Sequence[Sequence[Rendered]], kept: Sequence[int], seed: int
) -> tuple[list[int], list[int], list[str]]:
    """Give the places of the rows that training is watched by, if any, those to train on, and what was left out."""
    order = [kept[i] for i in np.random.default_rng(seed).permutation(len(kept))]
    if config.eval_rows is None:
        return [], order, []
    n = min(config.eval_rows, len(order) // 5)
    aside, others = order[:n], order[n:]
    seen = {tuple(row.ids for row in rendered[i]) for i in aside}
    train = [i for i in others if tuple(row.ids for row in rendered[i]) not in seen]
    if not n or not train:
        raise DataError(f"{config.train}: {len(order)} rows are too few, or too much alike, to set some aside; give "
                        "at least 5 different ones, or leave prefer.eval_rows out")  # fmt: skip
    fallbacks = []
    if n < config.eval_rows:
        fallbacks.append(f"prefer.eval_rows={config.eval_rows} is more than a fifth of the rows: {n} are used")
    if len(train) < len(others):
        fallbacks.append(f"{len(others) - len(train)} copies of rows set aside were left out of preference training")
    return aside, train, fallbacks


def lengths_of(config: Prefer, base: Path | None) -> Lengths:
    """Give tokens and answer's tokens of every sequence that is trained on, sampled answers at their longest.

    Guessed from characters, four a token, where the `base` is not here.
    """
    rows = [row for example in read(config) for row in example.rows]
    if base is None:
        found = [
            (sum(len(text) // 4 + 6 for _, text in row.messages), len(row.messages[-1][1]) // 4 + 1) for row in rows
        ]
    else:
        from transformers import AutoTokenizer

        tokenizer, stop = AutoTokenizer.from_pretrained(base, local_files_only=True), Golden.read(base).stop_ids
        rendered = [render(row, tokenizer, stop) for row in rows]
        found = [(len(row.ids), len(row.ids) - row.start) for row in rendered]
    if config.method == "grpo":
        found = [(tokens - labels + config.max_new_tokens, config.max_new_tokens) for tokens, labels in found]
    else:
        found = [(min(tokens, config.max_length), labels) for tokens, labels in found]
    return Lengths.of(found)


def _fits(config: Prefer, pair: Sequence[Rendered]) -> bool:
    return config.method == "grpo" or all(len(row.ids) <= config.max_length for row in pair)


def _settings(config: Prefer, n_rows: int, work: Path, device: str, seed: int) -> dict[str, Any]:
    """What every trainer of trl takes: a cosine schedule, sealed checkpoints, no bars."""
    micro = config.micro_batch_size or config.batch_size
    answers = n_rows * (config.generations if config.method == "grpo" else 1)
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(answers / config.batch_size))
    cpu = not device.startswith("cuda")
    every = min(config.eval_steps or config.save_steps, steps)
    watched = {
        "eval_strategy": "steps",
        "eval_steps": every,
        "per_device_eval_batch_size": config.generations if config.method == "grpo" else micro,
        "load_best_model_at_end": True,
        "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
        "metric_for_best_model": f"eval_{WATCHED[config.watched_by]}",
        "greater_is_better": config.watched_by != "loss",
        "prediction_loss_only": True,
    }
    return {
        "output_dir": str(work),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": config.batch_size // micro,
        "max_steps": steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": math.ceil(config.warmup_ratio * steps),
        "max_grad_norm": config.max_grad_norm,
        "bf16": not cpu and has_fast_bfloat16(device),
        "use_cpu": cpu,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "save_steps": every,
        "save_total_limit": 2,
        "logging_steps": 1,
        "report_to": [name for name in config.report_to if name != "tensorboard"],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "logging_nan_inf_filter": False,
        "seed": seed,
        "log_level": "error",
        "beta": config.beta,
        **(watched if config.eval_rows is not None else {}),
    }


def _config(config: Prefer, seed: int) -> dict[str, Any]:
    return {
        **config.model_dump(exclude={"report_to", "train", "train_rows", "format", "merge"}, exclude_none=True),
        "seed": seed,
    }


def _sources(config: Prefer, examples: Sequence[Example]) -> dict[str, str]:
    said = [
        [[[row.as_dicts, list(row.tools), sorted(row.muted)] for row in example.rows], example.label]
        for example in examples
    ]
    return {"rows": json_digest(said), **rewards.sources_of(config.rewards)}


def _history(state: TrainerState) -> dict[str, Any]:
    """Curves by step, without times: the manifest must not change from run to run."""
    names = {
        "loss": "loss",
        "reward_margin": "rewards/margins",
        "reward_accuracy": "rewards/accuracies",
        "reward": "reward",
        "learning_rate": "learning_rate",
        "gradient_norm": "grad_norm",
        "heldout_loss": "eval_loss",
        "heldout_pair_accuracy": "eval_rewards/accuracies",
        "heldout_reward": "eval_reward",
    }
    curves = {
        name: [[e["step"], float(f"{float(e[key]):.6g}")] for e in state.log_history if key in e]
        for name, key in names.items()
    }
    return {"steps": state.global_step, **{name: curve for name, curve in curves.items() if curve}}
