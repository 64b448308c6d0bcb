"""What GPTQ may do beyond its paper. A key that is unset stays out of `model_dump`: identities are digests of it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgetune.closed import Closed, Share


class CheckpointOptions(Closed):
    """How integers are written."""

    checkpoint: Literal["gptq", "compressed-tensors"] = Field(
        "gptq", exclude_if=lambda value: value == "gptq",
        description="format of the checkpoint: AutoGPTQ's, or pack-quantized of compressed-tensors",
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
