"""What GPTQ may do beyond its paper. A key that is unset stays out of `model_dump`: identities are digests of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgetune.closed import Closed, Count, Positive, Share


class Tune(Closed):
    """Scales learned block by block after the integers are chosen (Block-AP of EfficientQAT, arXiv:2407.11062)."""

    steps: Count = Field(8, description="steps of AdamW for each block; one sees up to 2048 calibration tokens")
    learning_rate: Positive = Field(5e-3, description="of the factors that scales are multiplied by; falls to 0")


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
    tune: Tune | None = Field(
        None, exclude_if=lambda value: value is None,
        description="learn the scales of each block by its output, after its integers are chosen",
    )  # fmt: skip
