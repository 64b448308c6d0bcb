"""Loads a base model for training: in its 16-bit form, or in NF4 with double quantization."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edgetune.devices import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_base(folder: Path, device: str, *, four_bit: bool, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a `model` artifact with frozen weights, its linear layers in NF4 (arXiv:2305.14314) if `four_bit`.

    Without `dtype` it is what the device computes fast.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = dtype or compute_dtype(device)
    quantization = None
    if four_bit:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        device_map={"": torch.device(device)} if device != "cpu" else None,
        quantization_config=quantization,
        local_files_only=True,
    )
    model.requires_grad_(False)
    if four_bit:
        keep_layout(model)
    return model


def keep_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights for the CPU in an evaluation: dequantized they would be noise."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
