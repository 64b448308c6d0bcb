"""The parts of a recipe that train: `adapt` (supervised), `prefer` (preference, reward), and what `distill` shares with
`adapt`. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from edgetune.closed import Amount, Closed, Count, Positive, Share, exactly_one
from edgetune.data.formats import Format

Method = Literal["qlora", "lora", "dora", "rslora", "ia3", "prefix", "full"]
LORA = ("qlora", "lora", "dora", "rslora")
# Keys that only some methods read. A key that is not here is read by all.
ADAPT_READS: dict[str, tuple[str, ...]] = {
    "r": LORA,
    "alpha": LORA,
    "dropout": LORA,
    "loraplus_lr_ratio": LORA,
    "keep_dense": ("qlora", "lora", "rslora"),
    "base_bits": ("dora", "rslora", "ia3", "prefix"),
    "virtual_tokens": ("prefix",),
    "unfreeze_steps": ("full",),
    **dict.fromkeys(("l2", "ewc"), ("qlora", "lora", "rslora", "full")),
    "gradient_checkpointing": (*LORA, "ia3", "full"),  # a prefix lives in the cache, which checkpointing does without
}
Logger = Literal["tensorboard", "wandb", "mlflow"]


def _unset(value: Any) -> bool:
    return not value


class Training(Closed):
    """What every training on labelled rows is told: adapting and distilling run the same trainer."""

    learning_rate: Positive = 1e-3
    epochs: Positive = 1
    max_steps: Count | None = None
    batch_size: Count = Field(16, description="rows an optimizer step")
    micro_batch_size: Count | None = Field(None, description="rows at once; batch_size where absent")
    warmup_ratio: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    eval_steps: Count = Field(50, description="optimizer steps between held-out losses and checkpoints")
    eval_rows: Count = Field(64, description="training rows set aside for early stopping")
    patience: Count = Field(3, description="held-out losses without progress before training stops")
    best_by: Literal["loss", "exact_match"] = Field(
        "loss", exclude_if=lambda value: value == "loss",
        description="what early stopping and the choice of the best checkpoint look at, on the rows set aside",
    )  # fmt: skip
    gradient_checkpointing: bool = Field(
        False, exclude_if=_unset,
        description="keep each block's input only and compute the block once more on the way back: less memory, a "
        "third more time",
    )  # fmt: skip
    report_to: list[Logger] = ["tensorboard"]

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> Self:
        _refuse_uneven_batches(self.batch_size, self.micro_batch_size)
        return self


class Adapt(Training):
    """Supervised fine-tuning: LoRA (arXiv:2106.09685) and its kin, IA3, a prefix, or all weights; docs/adapt.md."""

    method: Method = "qlora"
    r: Count = 16
    alpha: Count = 32
    dropout: Share = 0.0
    loraplus_lr_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        1.0, description="learning rate of LoRA's B over that of its A (arXiv:2402.12354); 1 is plain LoRA"
    )
    keep_dense: bool = Field(
        False, description="base in NF4: keep dequantized weights; faster, as large as the 16-bit base"
    )
    base_bits: Literal[4, 16] | None = Field(
        None, exclude_if=_unset, description="dora, rslora, ia3, prefix: 4 holds the base in NF4; 16 where absent"
    )
    virtual_tokens: Count = Field(20, description="prefix: keys and values that every layer sees before the prompt")
    unfreeze_steps: Count | None = Field(
        None,
        description="full: steps before one more block is trained, the last one first; all at once where absent",
    )
    l2: Amount = Field(
        0.0, exclude_if=_unset,
        description="pull to the base: l2 / 2 times the squared length of the update is added to the loss",
    )  # fmt: skip
    ewc: Amount = Field(
        0.0, exclude_if=_unset,
        description="pull to the base by what each weight means for general text (arXiv:1612.00796): weight of the "
        "divergence there, in nats a token, beside the loss",
    )  # fmt: skip
    memory_gb: Positive | None = Field(
        None, exclude_if=_unset,
        description="memory to train in, in GB of 10^9 bytes: chooses micro_batch_size and gradient_checkpointing",
    )  # fmt: skip
    merge: Literal["base16", "base4", "auto", "separate"] | None = Field(
        None, exclude_if=_unset,
        description="into the 16-bit base (where absent), into the base after its 4-bit round trip, whichever of both "
        "diverges less from the adapter on the 4-bit base, or not at all",
    )  # fmt: skip

    @property
    def four_bit(self) -> bool:
        """Whether the base is held in NF4 while it trains."""
        return self.method == "qlora" or self.base_bits == 4

    @property
    def separate(self) -> bool:
        """Whether the adapter is never merged."""
        return self.merge == "separate" or self.method == "prefix"

    @model_validator(mode="after")
    def _fits_its_method(self) -> Adapt:
        _refuse_unread(self, ADAPT_READS, self.method)
        if self.keep_dense and not self.four_bit:
            raise ValueError(f"keep_dense keeps what 4 bits were turned into; method {self.method} holds a 16-bit base")
        if self.merge in ("base4", "auto") and not self.four_bit:
            raise ValueError(f"merge {self.merge} needs a base in 4 bits; method {self.method} holds 16, leave it out")
        if self.method == "prefix" and self.merge not in (None, "separate"):
            raise ValueError(f"merge {self.merge}: a prefix is no change of weights and stays separate; leave it out")
        if self.method == "full" and self.merge is not None:
            raise ValueError("merge: method full trains the model itself, there is nothing to merge; leave it out")
        chosen = {"micro_batch_size", "gradient_checkpointing"} & self.model_fields_set
        if self.memory_gb is not None and chosen:
            raise ValueError(f"memory_gb chooses {' and '.join(sorted(chosen))}; leave one of both out")
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what the method does not read: it is no part of the identity."""
        return {k: v for k, v in handler(self).items() if self.method in ADAPT_READS.get(k, (self.method,))}


class JsonReward(Closed):
    """1 where the answer is valid JSON, else 0."""

    weight: Positive = 1.0


class ExactReward(Closed):
    """1 where the answer is the row's own answer, white space aside, else 0."""

    weight: Positive = 1.0


class RegexReward(Closed):
    """1 where the whole answer matches the pattern, else 0."""

    pattern: str
    weight: Positive = 1.0

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error
        return pattern


class LengthReward(Closed):
    """1 up to `characters`, then falling in proportion to the excess, 0 at twice as many."""

    characters: Count
    weight: Positive = 1.0


class FunctionReward(Closed):
    """A function of yours: called with prompts, completions and answers (lists of text), it gives a list of numbers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:function")]
    weight: Positive = 1.0


class Reward(Closed):
    """One reward: exactly one key."""

    json_valid: JsonReward | None = None
    exact_match: ExactReward | None = None
    regex: RegexReward | None = None
    length: LengthReward | None = None
    function: FunctionReward | None = None

    @model_validator(mode="after")
    def _one(self) -> Reward:
        return exactly_one(self)


PAIRED = ("dpo", "ipo", "orpo")  # a row is a chosen and a rejected answer
PREFER_READS: dict[str, tuple[str, ...]] = {
    "max_length": ("dpo", "ipo", "kto", "orpo"),
    **dict.fromkeys(("rewards", "generations", "max_new_tokens", "temperature"), ("grpo",)),
    "best_by": ("dpo", "ipo", "orpo"),
}


class Prefer(Closed):
    """Preference or reward training of a LoRA adapter, after `adapt` or alone, held to the model without it."""

    method: Literal["dpo", "ipo", "kto", "orpo", "grpo"]
    train: str = Field(
        description="rows: prompt, chosen, rejected; kto: prompt, completion, label; grpo: as data.train"
    )
    train_rows: Count | None = Field(None, description="use the first N rows")
    format: Format = Field(
        "auto", exclude_if=lambda value: value == "auto", description="format of the rows; auto looks at their keys"
    )
    adapter: Literal["qlora", "lora", "dora", "rslora"] = Field("qlora", description="as adapt.method")
    r: Count = 16
    alpha: Count = 32
    learning_rate: Positive = 5e-5
    beta: Amount = Field(
        0.1, description="how strongly the model is held to the reference; orpo: weight of the odds ratio"
    )
    epochs: Positive = 1
    max_steps: Count | None = None
    batch_size: Count = Field(8, description="rows an optimizer step; grpo: answers")
    micro_batch_size: Count | None = Field(None, description="rows at once; batch_size where absent")
    max_length: Count = Field(512, description="tokens of prompt and answer; longer rows are left out and counted")
    rewards: list[Reward] = Field([], description="grpo: what an answer earns, summed by weight")
    generations: Annotated[int, Field(ge=2)] = Field(4, description="grpo: answers sampled for each prompt")
    max_new_tokens: Count = Field(64, description="grpo: tokens of a sampled answer")
    temperature: Positive = Field(1.0, description="grpo: of sampling")
    warmup_ratio: Share = 0.05
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    save_steps: Count = Field(50, description="optimizer steps between checkpoints")
    eval_rows: Count | None = Field(
        None, exclude_if=_unset,
        description="rows set aside to watch training by, with early stopping and the best checkpoint kept; none where "
        "absent",
    )  # fmt: skip
    eval_steps: Count | None = Field(
        None, exclude_if=_unset,
        description="optimizer steps between looks at them, and then between checkpoints; save_steps where absent",
    )  # fmt: skip
    patience: Count | None = Field(
        None, exclude_if=_unset, description="looks without progress before training stops; 3 where absent"
    )
    best_by: Literal["loss", "pair_accuracy"] | None = Field(
        None, exclude_if=_unset,
        description="what early stopping and the best checkpoint look at: the loss (where absent), or the share of "
        "pairs whose chosen answer is likelier; kto: loss; grpo: the mean reward",
    )  # fmt: skip
    merge: Literal["base16", "base4", "auto"] | None = Field(
        None, exclude_if=_unset,
        description="as adapt.merge; auto measures on rows of data.train that adapt set aside, else on 64 of them",
    )  # fmt: skip
    gradient_checkpointing: bool = Field(False, exclude_if=_unset, description="as adapt.gradient_checkpointing")
    report_to: list[Logger] = ["tensorboard"]

    @property
    def four_bit(self) -> bool:
        """Whether the model is held in NF4 while it trains."""
        return self.adapter == "qlora"

    @property
    def watched_by(self) -> Literal["loss", "pair_accuracy", "reward"]:
        """What tells the best checkpoint, where rows are set aside."""
        return "reward" if self.method == "grpo" else self.best_by or "loss"

    @model_validator(mode="after")
    def _fits_its_method(self) -> Prefer:
        _refuse_unread(self, PREFER_READS, self.method)
        _refuse_uneven_batches(self.batch_size, self.micro_batch_size)
        if self.method == "grpo" and not self.rewards:
            raise ValueError(f"grpo needs rewards; give a list of {', '.join(Reward.model_fields)}")
        if self.method == "grpo" and self.batch_size % self.generations:
            raise ValueError(f"generations={self.generations} does not divide the {self.batch_size} answers of a step")
        if self.method == "kto" and (self.micro_batch_size or self.batch_size) < 2:
            raise ValueError("kto compares rows of a batch with one another; give at least 2 rows at once")
        if self.method in ("dpo", "ipo", "kto") and self.beta == 0:
            raise ValueError(f"{self.method} learns nothing with beta 0; give more than 0, such as 0.1")
        watching = {"eval_steps", "patience", "best_by"} & self.model_fields_set
        if self.eval_rows is None and watching:
            raise ValueError(f"{', '.join(sorted(watching))}: no rows are set aside to look at; set eval_rows")
        if self.merge in ("base4", "auto") and not self.four_bit:
            raise ValueError(f"merge {self.merge} needs a model in 4 bits; adapter {self.adapter} holds 16, leave it "
                             "out")  # fmt: skip
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in handler(self).items() if self.method in PREFER_READS.get(k, (self.method,))}


def _refuse_unread(part: BaseModel, reads: Mapping[str, Sequence[str]], method: str) -> None:
    for key in sorted(part.model_fields_set):
        if method not in reads.get(key, (method,)):
            raise ValueError(f"{key} is not read by method {method} ({', '.join(reads[key])} read it); remove it")


def _refuse_uneven_batches(batch: int, micro: int | None) -> None:
    if micro is not None and batch % micro:
        raise ValueError(f"micro_batch_size={micro} does not divide batch_size={batch}")
