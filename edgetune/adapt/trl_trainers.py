"""trl's trainers on ids that were rendered as those of every other stage, in place of what trl makes of a template."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from edgetune.adapt import processes
from edgetune.adapt.order import Reseeded
from edgetune.adapt.rewards import Score, score_of
from edgetune.backends import require
from edgetune.data.render import Rendered
from edgetune.recipe_training import Prefer

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

IGNORE = -100
Examples = Sequence[tuple[Sequence[Rendered], bool | None]]


def make(
    config: Prefer,
    base: PreTrainedModel,
    lora: LoraConfig,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    watched: Examples,
    settings: dict[str, Any],
    callbacks: list[Any],
) -> Trainer:
    """Build the trainer of a method; it puts a fresh adapter on `base`. `settings` are those of TrainingArguments.

    `watched` are examples that it is evaluated on, if any.
    """
    require("trl")
    from transformers.trainer_callback import PrinterCallback

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    build = {"kto": _kto, "orpo": _orpo, "grpo": _grpo}.get(config.method, _dpo)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that trl still uses
        ready = build(config, examples, watched, settings, tokenizer)
        processes.hold_to(ready.keywords["args"], str(base.device))
        trainer = ready(model=base, peft_config=lora, processing_class=tokenizer, callbacks=callbacks)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # trl rounds it to bfloat16 on a 4-bit base, and loses small updates
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    return trainer


def _dpo(config: Prefer, examples: Examples, watched: Examples, settings: dict[str, Any], _: Any) -> partial[Any]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Ready(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    def rows(examples: Examples) -> list[dict[str, Any]]:
        return [
            {"prompt_ids": _prompt(chosen), "chosen_ids": _answer(chosen), "rejected_ids": _answer(rejected)}
            for (chosen, rejected), _ in examples
        ]

    arguments = DPOConfig(
        loss_type={"dpo": "sigmoid", "ipo": "ipo"}[config.method], max_length=config.max_length, **settings
    )
    return partial(Ready, args=arguments, **_datasets(rows(examples), rows(watched)))


def _kto(config: Prefer, examples: Examples, watched: Examples, settings: dict[str, Any], _: Any) -> partial[Any]:
    from datasets import Dataset
    from trl import KTOConfig, KTOTrainer

    class Ready(KTOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    def rows(examples: Examples) -> list[dict[str, Any]]:
        made: list[dict[str, Any]] = [
            {"prompt_ids": _prompt(row), "completion_ids": _answer(row), "label": label} for (row,), label in examples
        ]
        at_once = settings["per_device_train_batch_size"]
        for first in range(0, len(made), at_once):  # the KL term wants each prompt with another one's answer
            batch = made[first : first + at_once]
            for place, row in enumerate(batch):
                row["KL_completion_ids"] = batch[place - 1]["completion_ids"]
        return made

    good = sum(bool(label) for _, label in examples)
    arguments = KTOConfig(
        max_length=config.max_length, train_sampling_strategy="sequential",
        undesirable_weight=good / max(len(examples) - good, 1), **settings,
    )  # fmt: skip
    return partial(Ready, args=arguments, **_datasets(rows(examples), rows(watched)))


def _orpo(config: Prefer, examples: Examples, watched: Examples, settings: dict[str, Any], _: Any) -> partial[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # trl says on import that ORPO's place may move
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Ready(ORPOTrainer):  # type: ignore[misc]
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            return feature

    def rows(examples: Examples) -> list[dict[str, Any]]:
        made = []
        for (chosen, rejected), _ in examples:
            row: dict[str, Any] = {"prompt": "", "prompt_input_ids": _prompt(chosen)}
            row["prompt_attention_mask"] = [1] * len(row["prompt_input_ids"])
            for name, one in (("chosen", chosen), ("rejected", rejected)):
                row[name] = ""
                row[f"{name}_input_ids"] = list(one.ids)
                row[f"{name}_attention_mask"] = [1] * len(one.ids)
                row[f"{name}_labels"] = [IGNORE] * one.start + _answer(one)
            made.append(row)
        return made

    arguments = ORPOConfig(max_length=config.max_length, remove_unused_columns=False, **settings)
    return partial(Ready, args=arguments, **_datasets(rows(examples), rows(watched)))


def _grpo(
    config: Prefer, examples: Examples, watched: Examples, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> partial[Any]:
    from trl import GRPOConfig, GRPOTrainer

    class Ready(GRPOTrainer):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
            return [ids_of[prompt] for prompt in prompts], None, {}

        def _get_train_sampler(self, dataset: Any = None) -> Reseeded:
            return Reseeded(super()._get_train_sampler(dataset), self.args.seed, lambda: self.state)

    def rows(examples: Examples) -> list[dict[str, Any]]:
        return [{"prompt": tokenizer.decode(_prompt(row)), "answer": row.target_text} for (row,), _ in examples]

    ids_of = {tokenizer.decode(_prompt(row)): _prompt(row) for (row,), _ in (*examples, *watched)}
    found = [score_of(reward) for reward in config.rewards]
    arguments = GRPOConfig(
        num_generations=config.generations, max_completion_length=config.max_new_tokens,
        temperature=config.temperature, reward_weights=[weight for _, weight, _ in found], **settings,
    )  # fmt: skip
    functions = [_as_trl_calls_it(name, score) for name, _, score in found]
    return partial(Ready, args=arguments, **_datasets(rows(examples), rows(watched)), reward_funcs=functions)


def _datasets(train: list[dict[str, Any]], watched: list[dict[str, Any]]) -> dict[str, Any]:
    from datasets import Dataset

    evaluated = {"eval_dataset": Dataset.from_list(watched)} if watched else {}
    return {"train_dataset": Dataset.from_list(train), **evaluated}


def _as_trl_calls_it(name: str, score: Score) -> Any:
    def reward(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return list(score(prompts, completions, answer))

    reward.__name__ = name
    return reward


def _prompt(row: Rendered) -> list[int]:
    return list(row.ids[: row.start])


def _answer(row: Rendered) -> list[int]:
    return list(row.ids[row.start :])
