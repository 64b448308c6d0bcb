"""The part `distill` of a recipe. A key that is unset stays out of `model_dump`. Imports nothing heavy."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from edgetune.closed import Amount, Count, Positive, Share
from edgetune.recipe_training import Training

Block = Annotated[int, Field(ge=0)]


def _unset(value: Any) -> bool:
    return not value


class Distill(Training):
    """A student learns what the adapted model says of every token (arXiv:1503.02531), all its weights trained."""

    student: str | None = Field(
        None,
        description="what the step before made if absent; base, or a model of the same tokenizer, as `base` names one",
    )
    into: Literal["scales", "adapter"] | None = Field(
        None, exclude_if=_unset,
        description="after rtn or gptq, whose integers stay: what is trained, their scales (EfficientQAT, "
        "arXiv:2407.11062) or a LoRA adapter beside them; all weights of a float model where absent",
    )  # fmt: skip
    rank: Count | None = Field(
        None, exclude_if=_unset, description="into: adapter: rank of each layer's matrix; 16 where absent"
    )
    divergence: Literal["forward", "reverse"] = Field(
        "forward", description="KL(teacher || student), or KL(student || teacher) as in MiniLLM (arXiv:2306.08543)"
    )
    skew: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of one distribution mixed into the other (DistiLLM, arXiv:2402.03898)"
    )
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    label_weight: Share = Field(0.1, description="share of the cross-entropy on the labels; the rest is divergence")
    hidden_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="weight of the loss between hidden states; above 0 the teacher runs in every step"
    )
    hidden_layers: Literal["last", "all"] | list[Block] = Field(
        "last", exclude_if=lambda value: value == "last",
        description="hidden_weight: blocks of the student whose states are compared, from 0; each with the teacher's "
        "block at the same share of the depth",
    )  # fmt: skip
    relation_weight: Amount = Field(
        0.0, exclude_if=_unset,
        description="weight of the loss between the last blocks' relations of queries, keys and values (MiniLMv2, "
        "arXiv:2012.15828); above 0 the teacher runs in every step",
    )  # fmt: skip
    relation_heads: Count | None = Field(
        None, exclude_if=_unset,
        description="relation_weight: heads that both are split into; where absent as many as fit both, at most the "
        "teacher's",
    )  # fmt: skip
    on_policy: Share = Field(
        0.0, exclude_if=_unset,
        description="share of the steps whose answers the student samples and the teacher judges (GKD, "
        "arXiv:2306.13649)",
    )  # fmt: skip
    sample_temperature: Positive = Field(
        1.0, exclude_if=lambda value: value == 1, description="on_policy: temperature that the student samples at"
    )
    answers: Literal["gold", "teacher"] = Field(
        "gold", exclude_if=lambda value: value == "gold",
        description="last answers of the rows: their own, or those that the teacher writes greedily (arXiv:1606.07947)",
    )  # fmt: skip
    max_new_tokens: Count | None = Field(
        None, exclude_if=_unset,
        description="on_policy, answers: tokens of an answer at most; those of the rows' longest where absent",
    )  # fmt: skip
    top_k: Count = Field(32, description="teacher probabilities kept for each token; all others are one sum")
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 5e-4

    @property
    def compares(self) -> bool:
        """Whether the teacher's insides are compared in every step."""
        return bool(self.hidden_weight or self.relation_weight)

    @property
    def adapter_rank(self) -> int:
        """The rank of what is trained beside integers."""
        return self.rank or 16

    @property
    def writes(self) -> str | None:
        """The key that lets a model write answers; None where the rows' own are all that is read."""
        return "on_policy" if self.on_policy else "answers" if self.answers == "teacher" else None

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> Distill:
        if self.into is not None and self.compares:
            raise ValueError("hidden_weight and relation_weight are not read with into; remove them")
        off = {
            "rank": (self.into == "adapter", "into: adapter"),
            "hidden_layers": (self.hidden_weight, "hidden_weight"),
            "relation_heads": (self.relation_weight, "relation_weight"),
            "sample_temperature": (self.on_policy, "on_policy"),
            "max_new_tokens": (self.writes, "on_policy or answers: teacher"),
        }
        for key in sorted(self.model_fields_set & off.keys()):
            if not off[key][0]:
                raise ValueError(f"{key} is read with {off[key][1]} only; remove it")
        named = self.hidden_layers
        if isinstance(named, list) and (not named or len(set(named)) < len(named)):
            raise ValueError(f"hidden_layers={named} names {'a block twice' if named else 'no block'}; name each once, "
                             "or last or all")  # fmt: skip
        return self
