"""A base in NF4 with double quantization (arXiv:2305.14314), the same for training and for scoring."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PreTrainedModel


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Give the settings with which Transformers loads a base in NF4 that computes in `dtype`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def keep_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking weights for the CPU in an evaluation: dequantized they would be noise."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
