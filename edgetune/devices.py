"""Which devices there are, and what each computes fast."""

from __future__ import annotations

import torch

from edgetune.errors import RecipeError


def check_device(device: str) -> None:
    """Raise RecipeError where torch cannot compute on a device of that name."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device: torch cannot use {device!r} ({str(error).splitlines()[0]}); use cpu") from error


def has_fast_bfloat16(device: str) -> bool:
    """Tell whether bfloat16 matrix products run natively there (CUDA, AVX512-BF16, AMX), not emulated."""
    if torch.device(device).type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def compute_dtype(device: str) -> torch.dtype:
    """bfloat16 where it is native; else float32 (emulated bfloat16 is four times slower on AVX-512 alone)."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
