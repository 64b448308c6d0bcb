"""Loads a base model for training: in its 16-bit form, or in NF4 with double quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgetune.devices import compute_dtype
from edgetune.nf4 import keep_layout, nf4_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_base(folder: Path, device: str, *, four_bit: bool, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a `model` artifact with frozen weights, its linear layers in NF4 (arXiv:2305.14314) if `four_bit`.

    Without `dtype` it is what the device computes fast.
    """
    from transformers import AutoModelForCausalLM

    dtype = dtype or compute_dtype(device)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        # Without a map a 4-bit base goes to the first GPU that is there, whatever device was asked for.
        device_map={"": torch.device(device)} if four_bit or device != "cpu" else None,
        quantization_config=nf4_config(dtype) if four_bit else None,
        local_files_only=True,
    )
    model.requires_grad_(False)
    if four_bit:
        keep_layout(model)
    return model
