"""Bits of a layer, how they are written, and what GPTQ may do beyond its paper.

A key that is unset stays out of `model_dump`: identities are digests of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from edgetune.closed import Closed, Count, Positive, Share
from edgetune.recipe_export import Calibration, MeasuredRows

Bits = Literal[2, 3, 4, 5, 6, 8]
GPTQ_BITS = (2, 3, 4, 8)  # those of AutoGPTQ's format


class Tune(Closed):
    """Scales learned block by block after the integers are chosen (Block-AP of EfficientQAT, arXiv:2407.11062)."""

    steps: Count = Field(8, description="steps of AdamW for each block; one sees up to 2048 calibration tokens")
    learning_rate: Positive = Field(5e-3, description="of the factors that scales are multiplied by; falls to 0")
    zeros: bool = Field(
        False, exclude_if=lambda value: not value,
        description="learn zero points as well, of groups that are not symmetric; judged by every fourth batch of "
        "calibration rows, which is then not learned from",
    )  # fmt: skip


class Recover(Closed):
    """A low-rank matrix beside the integers of each layer, fitted to what rounding lost."""

    method: Literal["eora", "lqer"] = Field(
        "eora", description="least error of the layer's output (EoRA, arXiv:2410.21271), or as if its input channels "
        "did not covary (LQER, arXiv:2402.02446)",
    )  # fmt: skip
    rank: Count = Field(16, description="of each layer's matrix; below all widths")


class CheckpointOptions(Closed):
    """How integers are written, and what is written beside them."""

    checkpoint: Literal["gptq", "compressed-tensors"] = Field(
        "gptq", exclude_if=lambda value: value == "gptq",
        description="format of the checkpoint: AutoGPTQ's, or pack-quantized of compressed-tensors",
    )  # fmt: skip
    recover: Recover | None = Field(
        None, exclude_if=lambda value: value is None,
        description="a LoRA adapter beside the checkpoint, fitted to what rounding lost; read by torch, builder own of "
        "onnx, and gguf",
    )  # fmt: skip


class Grid(Closed):
    """Bits and a group size of their own, in the format of compressed-tensors."""

    bits: Bits = Field(description="of a weight")
    group_size: int = Field(description="columns that share a scale; -1 for the whole row")

    def __str__(self) -> str:
        return f"{self.bits}{'row' if self.group_size == -1 else f'g{self.group_size}'}"


# The tags have spaces, which keeps them out of the keys that an error names.
GridChoice = Annotated[
    Annotated[Grid, Tag("bits and groups")] | Annotated[Bits, Tag("bits alone")],
    Discriminator(lambda given: "bits and groups" if isinstance(given, Grid | dict) else "bits alone"),
]


class Allocate(Closed):
    """Bits where they matter: each group of layers gets what its measured divergence is worth."""

    budget: Positive = Field(
        description="bits a weight, the mean over all layers, scales and zero points counted, what recover adds not"
    )
    choices: Annotated[list[GridChoice], Field(min_length=2)] = Field(
        [2, 3, 4, 8],
        description="bits that a group may get, or {bits, group_size} where the group size is not the step's; layers "
        "that read the same input are one group",
    )
    rows: MeasuredRows = Calibration(n_samples=8, n_tokens=128)
    keep_update: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, exclude_if=lambda value: value is None,
        description="a layer gets none of the choices with which less than this share of the weights that training "
        "changed move half a quantization step; absent: whatever its divergence is worth",
    )  # fmt: skip

    @property
    def grids(self) -> list[Grid]:
        """The choices that name a group size."""
        return [choice for choice in self.choices if isinstance(choice, Grid)]

    @field_validator("choices")
    @classmethod
    def _rising(cls, choices: list[Bits | Grid]) -> list[Bits | Grid]:
        numbers = [choice for choice in choices if not isinstance(choice, Grid)]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"name each number once, in rising order: {sorted(set(numbers))}")
        named = [str(choice) for choice in choices]
        if len(set(named)) < len(named):
            raise ValueError("name each choice once")
        return choices


class BitOptions(CheckpointOptions):
    """One number of bits for all layers, or a budget for them together."""

    bits: Bits = 4
    allocate: Allocate | None = Field(
        None, exclude_if=lambda value: value is None,
        description="a number of bits for each group of layers, in place of `bits`",
    )  # fmt: skip

    @property
    def widths(self) -> Sequence[int]:
        """Bits that a layer may get."""
        if self.allocate is None:
            return [self.bits]
        return sorted({choice.bits if isinstance(choice, Grid) else choice for choice in self.allocate.choices})

    @property
    def keeps_update(self) -> bool:
        """Whether choices are held to what they keep of the training."""
        return self.allocate is not None and self.allocate.keep_update is not None

    @model_validator(mode="after")
    def _bits_once(self) -> Self:
        if self.allocate is not None and "bits" in self.model_fields_set:
            raise ValueError("allocate chooses the bits of each layer; leave bits out")
        return self

    @model_validator(mode="after")
    def _the_format_has_them(self) -> Self:
        if self.checkpoint != "gptq":
            return self
        if self.allocate is not None and self.allocate.grids:
            raise ValueError("groups by layer are written for compressed-tensors; set checkpoint: compressed-tensors")
        if missing := [bits for bits in self.widths if bits not in GPTQ_BITS]:
            raise ValueError(f"AutoGPTQ's format has no {missing[0]} bits; set checkpoint: compressed-tensors")
        return self

    @property
    def unread(self) -> set[str]:
        """Keys that others take the place of: they are no part of the identity."""
        return {"bits"} if self.allocate is not None else set()

    @model_serializer(mode="wrap")
    def _what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.unread}


def check_kept(name: str, steps: Sequence[str], *, trained: bool) -> None:
    """Raise ValueError where `keep_update` of a candidate's last step has no base to compare its weights with."""
    if not trained or len(steps) > 1:
        why = f"{steps[0]} changes the weights before" if trained else "nothing is trained"
        raise ValueError(f"candidates.{name}: allocate.keep_update compares with the base, but {why}; leave it out")


class GptqOptions(Closed):
    """Each switched on by its own key; docs/quantization.md has what each is worth."""

    grid: Literal["plain", "weighted"] = Field(
        "plain", exclude_if=lambda value: value == "plain",
        description="error that a group's scale and zero point are searched by: weighted counts columns by diag(H)",
    )  # fmt: skip
    correction: Share = Field(
        0.0, exclude_if=lambda value: not value,
        description="share of GPTAQ's correction (arXiv:2504.02692) for inputs that are quantized already; 0 for none",
    )  # fmt: skip
    hessian: Literal["float32", "bfloat16"] = Field(
        "float32", exclude_if=lambda value: value == "float32",
        description="dtype of the Hessian's factors, not of its sums; bfloat16 where activations are, else float32",
    )  # fmt: skip
    damping: Literal["fixed", "held-out"] = Field(
        "fixed", exclude_if=lambda value: value == "fixed",
        description="held-out: a damping for each layer in place of damp_percent, by its error on every fourth "
        "calibration row, which it is then not solved with; five solves a layer",
    )  # fmt: skip
    tune: Tune | None = Field(
        None, exclude_if=lambda value: value is None,
        description="learn the scales of each block by its output, after its integers are chosen",
    )  # fmt: skip
