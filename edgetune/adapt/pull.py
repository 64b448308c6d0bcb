"""An L2 pull to the base (L2-SP, arXiv:1802.01483): l2 / 2 |W - W0|^2 is added to the loss, summed over all weights.

For LoRA the update is s B A [R, C], and |s B A|^2 = s^2 sum(B^T B * A A^T): two products of rank r, no dense update.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Pull:
    """The penalty on what was trained so far. Made before training, when the weights are the base's own."""

    def __init__(self, model: nn.Module, l2: float) -> None:
        self._l2 = l2
        self._lora: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]
        self._start: list[tuple[Tensor, Tensor]] = []
        if not self._lora:
            self._start = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    def __call__(self) -> Tensor:
        """Give l2 / 2 |W - W0|^2 as a scalar that has a gradient."""
        parts = [(p - start).square().sum() for p, start in self._start]
        for layer in self._lora:
            for name in layer.active_adapters:
                A, B = layer.lora_A[name].weight, layer.lora_B[name].weight  # [r, C], [R, r]
                parts.append(layer.scaling[name] ** 2 * ((B.t() @ B) * (A @ A.t())).sum())
        return 0.5 * self._l2 * torch.stack(parts).sum()
