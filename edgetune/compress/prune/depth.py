"""ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (arXiv:2403.03853), section 2.

A block that hardly turns its input is hardly missed. Its influence is BI = 1 - E[cos(x_in, x_out)], over tokens.
`greedy` is the slower choice: block by block, that without which the model says most nearly the same.
Shapes: B rows, T tokens, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor
from torch.nn import functional

from edgetune.errors import StageError


def block_influence(before: Tensor, after: Tensor) -> float:
    """Give the sum over tokens of 1 - cos(x_in, x_out), from a block's input and output [B, T, C]."""
    x, y = before.flatten(0, 1).float(), after.flatten(0, 1).float()
    return float((1 - functional.cosine_similarity(x, y, dim=1)).sum(dtype=torch.float64))


def most_influential(influence: Sequence[float], n_keep: int) -> list[int]:
    """Give the blocks that stay, in their order; of equal ones the first stays."""
    ranked = sorted(range(len(influence)), key=lambda index: -influence[index])
    return sorted(ranked[:n_keep])


Without = Callable[[list[int]], list[float]]  # the blocks still there -> divergence without each of them


def greedy(
    n_blocks: int, n_keep: int, without: Without, removed: Sequence[tuple[int, float]] = ()
) -> Iterator[tuple[int, float]]:
    """Take out one block after the other, each time that whose loss costs the least divergence.

    `removed` is where an earlier search was stopped. Yields (block, divergence without it and those before it).
    Raises StageError where a divergence is not finite.
    """
    kept = [index for index in range(n_blocks) if index not in {block for block, _ in removed}]
    while len(kept) > n_keep:
        losses = without(kept)
        for block, loss in zip(kept, losses, strict=True):
            if not isfinite(loss):
                raise StageError(
                    f"without block {block} the model's outputs are not finite; check its weights, or leave search out"
                )
        place = min(range(len(kept)), key=losses.__getitem__)
        yield kept.pop(place), losses[place]
