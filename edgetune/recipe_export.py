"""What ships: the part `export` of a candidate, and the token rows that calibrate."""

from __future__ import annotations

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

from edgetune.closed import Closed, Count, Positive, Share, exactly_one
from edgetune.export.gguf_mixes import WEIGHED
from edgetune.export.gguf_types import PLAIN, UNWEIGHED


class Calibration(Closed):
    """Token rows that show a layer its inputs: training rows under their template, and a share of general text."""

    n_samples: Count = 128
    n_tokens: Count = Field(256, description="tokens in each sample; short rows are packed into it")
    general_share: Share = 0.25


MeasuredRows = Annotated[
    Calibration,
    Field(description="rows that each choice is measured on, none of which calibrates; 8 of 128 tokens if absent"),
]


class ExportFormat(Closed):
    """One format. A key that it does not read may not be set, and is no part of the identity."""

    @property
    def unread(self) -> dict[str, str]:
        """Keys that are not read, and by what."""
        return {}

    @model_validator(mode="after")
    def _reads_what_is_set(self) -> Self:
        for key, by in self.unread.items():
            if key in self.model_fields_set and getattr(self, key) is not False:
                raise ValueError(f"{key} is not read by {by}; remove it")
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in self.unread}


GgufType = Literal[
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0",
    "IQ4_NL", "IQ4_XS", "Q3_K_L", "Q3_K_M", "Q3_K_S", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "Q2_K_S",
    "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0",
]  # fmt: skip


BlockType = Literal[
    "IQ2_S", "Q2_K", "IQ3_XXS", "Q3_K", "IQ3_S", "IQ4_XS", "Q4_0", "IQ4_NL", "Q4_K", "Q4_1", "Q5_0", "Q5_K", "Q5_1",
    "Q6_K", "Q8_0",
]  # fmt: skip


class TokenTime(Closed):
    """A budget of time, as this machine takes it."""

    ms_per_token: Positive = Field(description="median of a further token's, after the shortest of bench.prompt_tokens")


# The tags have spaces, which keeps them out of the keys that an error names.
TypesBudget = Annotated[
    Annotated[TokenTime, Tag("a time")] | Annotated[Positive, Tag("bits a weight")],
    Discriminator(lambda given: "a time" if isinstance(given, TokenTime | dict) else "bits a weight"),
]


class AllocateTypes(Closed):
    """Types where they matter: each group of layers gets the one that its measured divergence is worth."""

    budget: TypesBudget = Field(
        description="bits a weight, the mean over all linear layers of the blocks, scales counted; or {ms_per_token}, "
        "by what this machine takes for each type"
    )
    choices: Annotated[list[BlockType], Field(min_length=2)] = Field(
        ["Q3_K", "Q4_0", "Q4_K", "Q5_0", "Q5_K", "Q6_K", "Q8_0"],
        description="types that a group of layers may get, where their blocks divide its rows; layers that read one "
        "input are a group",
    )  # fmt: skip
    rows: MeasuredRows = Calibration(n_samples=8, n_tokens=128)

    @property
    def ms_per_token(self) -> float | None:
        """The budget where it is one of time."""
        return self.budget.ms_per_token if isinstance(self.budget, TokenTime) else None

    def __str__(self) -> str:
        if isinstance(self.budget, TokenTime):
            return f"{self.budget.ms_per_token:g} ms"
        return f"{self.budget:g} bits"

    @field_validator("choices")
    @classmethod
    def _once(cls, choices: list[BlockType]) -> list[BlockType]:
        if len(set(choices)) < len(choices):
            raise ValueError("name each type once")
        return choices


class GgufExport(ExportFormat):
    """A GGUF file for llama.cpp."""

    type: GgufType = "Q4_K_M"
    imatrix: bool = Field(True, description="weigh the rounding by the second moments of the calibration rows")
    gptq: bool = Field(
        False, exclude_if=lambda value: not value,
        description="choose the codes by GPTQ, on the scales that llama.cpp found; as many bytes, less lost",
    )  # fmt: skip
    allocate: AllocateTypes | None = Field(
        None, exclude_if=lambda value: value is None,
        description="a type for each group of layers; `type` is then that of the embedding and the head",
    )  # fmt: skip
    calibration: Calibration = Calibration()

    @property
    def weighed(self) -> bool:
        """Whether an importance matrix is read."""
        return self.imatrix and (self.allocate is not None or self.type not in UNWEIGHED)

    @model_validator(mode="after")
    def _is_allocated_what_can_be(self) -> Self:
        if self.allocate is None:
            return self
        if not self.imatrix:
            raise ValueError("allocate measures types with an importance matrix; leave imatrix out")
        if self.type in PLAIN:
            raise ValueError(f"type {self.type} is written as it is; take a quantized one for embedding and head")
        others = [kind for kind in self.allocate.choices if kind[:2] not in ("Q4", "Q5", "Q6", "Q8")]
        if self.gptq and others:
            raise ValueError(f"gptq: true chooses codes of Q4, Q5 and Q6 and keeps Q8_0; drop {', '.join(others)}")
        return self

    @model_validator(mode="after")
    def _is_weighed_where_it_must(self) -> Self:
        if self.type in WEIGHED and not self.imatrix:
            raise ValueError(f"type {self.type} is not made without an importance matrix; leave imatrix out")
        return self

    @property
    def unread(self) -> dict[str, str]:
        if self.gptq or self.allocate:
            return {}
        if self.type in UNWEIGHED:
            return dict.fromkeys(("imatrix", "calibration"), f"type {self.type}")
        return {} if self.imatrix else {"calibration": "imatrix: false"}


class OnnxExport(ExportFormat):
    """An ONNX folder for ONNX Runtime and onnxruntime-genai."""

    precision: Literal["fp32", "fp16", "int8", "int4"] = "int4"
    accuracy_level: Literal[0, 1, 2, 3, 4] = Field(4, description="MatMulNBits: 4 computes with int8 activations")
    head_bits: Literal[4, 8] = Field(8, description="bits of the output head, which GPTQ leaves alone")
    builder: Literal["genai", "own"] = Field(
        "genai", description="who writes the graph: onnxruntime-genai, or edgetune itself, for any shape, fp16 and int8"
    )
    adapters: bool = Field(
        False, exclude_if=lambda value: not value,
        description="builder own: each linear layer takes the factors of a LoRA adapter, in fp32 or fp16",
    )  # fmt: skip

    @property
    def unread(self) -> dict[str, str]:
        if self.precision not in ("fp32", "fp16"):
            return {}
        return dict.fromkeys(("accuracy_level", "head_bits"), f"precision {self.precision}")


class TensorrtExport(Closed):
    """A TensorRT engine for NVIDIA GPUs, for one row at a time."""

    precision: Literal["fp16", "int4"] = "fp16"
    compute_capability: (
        Annotated[list[Literal["7.5", "8.0", "8.6", "8.9", "12.0", "12.1"]], Field(min_length=1)] | None
    ) = Field(None, description="GPUs that one file is built for; 8.0, 8.6, 8.9 and 12.0 if absent")
    max_length: Annotated[int, Field(ge=16)] | None = Field(
        None, description="most tokens of context; 2048 or, where it has fewer, all that the model has if absent"
    )
    library: Literal["tensorrt-rtx", "tensorrt"] = Field(
        "tensorrt-rtx", description="tensorrt-rtx builds on any machine, tensorrt for the GPU of this one"
    )


class Export(Closed):
    """The format that ships: exactly one key."""

    gguf: GgufExport | None = None
    onnx: OnnxExport | None = None
    tensorrt: TensorrtExport | None = None

    @model_validator(mode="after")
    def _one(self) -> Export:
        return exactly_one(self)
