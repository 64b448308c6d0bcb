"""Compact Language Models via Pruning and Knowledge Distillation (Minitron, arXiv:2407.14679), section 2.2.

What is rarely large is rarely missed. Importance is read off activations: of a feed-forward neuron its value after the
gate, of a head the norm of what it attends to, of a channel of the residual stream its values behind the norms.
Each is the mean over a row's tokens, then the 2-norm over rows, the pair that the paper found best.
Shapes: B rows, T tokens, C features, H query heads, G key/value groups, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def feature_energy(X: Tensor) -> Tensor:
    """Give sum_B (mean_T |x|)^2 of each feature, float64 [C], from a layer's inputs [B, T, C]."""
    return X.abs().mean(1, dtype=torch.float32).double().square().sum(0)


def head_energy(X: Tensor, head_size: int) -> Tensor:
    """Give sum_B (mean_T |x_h|_2)^2 of each head, float64 [H], from the output projection's inputs [B, T, H D]."""
    norms: Tensor = X.float().reshape(*X.shape[:2], -1, head_size).norm(dim=-1)  # [B, T, H]
    return norms.mean(1).double().square().sum(0)


def group_energy(heads: Tensor, n_groups: int) -> Tensor:
    """Give the energy of each key/value group [G]: that of the query heads [H] which share it."""
    return heads.reshape(n_groups, -1).sum(1)


def most_important(energy: Tensor, n_keep: int) -> Tensor:
    """Give the places that stay, in their order; of equal ones the first stays."""
    order = energy.sqrt().argsort(descending=True, stable=True)
    return order[:n_keep].sort().values


def channel_energy(of_inputs: Sequence[Tensor]) -> Tensor:
    """Give the energy of each residual channel [C], summed as 2-norms over the norms of the blocks that stay."""
    return torch.stack([energy.sqrt() for energy in of_inputs]).sum(0).square()
