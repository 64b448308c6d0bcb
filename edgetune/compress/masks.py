"""Which weights become zero: by size, by Wanda (arXiv:2306.11695), by SparseGPT (arXiv:2301.00774).

Size is compared within a layer, Wanda's |W| * ||x|| within an output row; what stays is left as it is.
SparseGPT takes, in each block of columns, the weights whose loss is least once the columns that follow have made up
for it, as GPTQ makes up for rounding: w^2 / U_ii^2, with (H + damp)^-1 = U^T U.
Shapes: R out-features, C in-features, n columns of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.compress.gptq import descend
from edgetune.compress.hessian import all_finite, inverse_factor
from edgetune.errors import StageError


@dataclass(frozen=True)
class Pattern:
    """A share of the weights becomes zero: anywhere, or of each `group` neighbours in a row."""

    sparsity: float
    group: int = 0

    def n_zeros(self, n: int) -> int:
        """Give the zeros among n weights that are compared."""
        return round(n * self.sparsity)


@dataclass(frozen=True)
class Sparse:
    """A weight with zeros, in the dtype that it is stored in; what the walker asks of it is that of `Quantized`."""

    weight: Tensor  # [R, C]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Give the weight [R, C]; float32 where no dtype is named."""
        return self.weight.to(dtype or torch.float32)

    def rows(self, start: int, stop: int) -> Sparse:
        """Give the same for the rows start .. stop, where several weights were stacked."""
        return Sparse(self.weight[start:stop])

    def cpu(self) -> Sparse:
        return Sparse(self.weight.cpu())


def magnitude(weight: Tensor, pattern: Pattern) -> Tensor:
    """Set the smallest weights of a layer [R, C] to zero."""
    size = weight.abs()
    mask = _in_groups(size, pattern) if pattern.group else _smallest(size.flatten(), pattern).view_as(size)
    return weight.masked_fill(mask, 0)


def wanda(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Set the weights that move each output least to zero.

    weight [R, C], hessian [C, C] = 2/N X^T X; layers may be stacked on rows. Raises StageError where H is unusable.
    """
    norms = (hessian.diagonal().to(weight.dtype) / 2).clamp(min=0).sqrt()  # [C], root mean squares
    if not all_finite(norms):
        raise StageError("the Hessian is not finite: an activation overflowed; check the calibration rows")
    score = weight.abs() * norms
    return weight.masked_fill(_in_groups(score, pattern) if pattern.group else _smallest(score, pattern), 0)


def sparsegpt(
    weights: Sequence[Tensor], hessian: Tensor, pattern: Pattern, *, damp_percent: float = 0.01, block_size: int = 128
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Set weights of layers with one input to zero, and change those that stay so that the outputs change least.

    weights [R, C] each, hessian [C, C]. Without groups each layer gives up its share in each `block_size` columns.
    float64 weights are solved in float64. Returns the weights, and what damping it took where it is more than
    was asked. Raises StageError where H is unusable.
    """
    dtype = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
    W = torch.cat([weight.to(dtype) for weight in weights]).T.contiguous()  # [C, R], a copy
    factor = inverse_factor(hessian, damp_percent)
    Hinv, dead = factor.upper.to(dtype), hessian.diagonal() <= 0
    d = Hinv.diagonal().masked_fill(dead, torch.inf)  # what is never active costs nothing
    at_once = pattern.group or block_size  # columns whose zeros are chosen together
    block = -(-block_size // at_once) * at_once
    sizes, mask = [len(weight) for weight in weights], torch.empty_like(W, dtype=torch.bool)

    def at(i: int) -> tuple[Tensor, Tensor]:
        if i % at_once == 0:
            chosen = slice(i, i + at_once)
            loss = (W[chosen] / d[chosen, None]).square()
            if pattern.group:
                mask[chosen] = _smallest(loss.T, pattern).T
            else:
                for part, marks in zip(torch.split(loss, sizes, 1), torch.split(mask[chosen], sizes, 1), strict=True):
                    marks.copy_(_smallest(part.flatten(), pattern).view_as(part))
        kept = W[i].masked_fill(mask[i], 0)
        return kept, kept

    made, _ = descend(W, Hinv, at, block)
    return list(torch.split(made.T.contiguous(), sizes)), factor.fallbacks[factor.n_dead > 0 :]


def dead_columns(hessian: Tensor) -> tuple[str, ...]:
    """Say how many input columns calibration never showed."""
    n = int((hessian.diagonal() <= 0).sum())
    return (f"{n} of {len(hessian)} input columns were never active: their weights go first",) if n else ()


def _smallest(score: Tensor, pattern: Pattern) -> Tensor:
    """Mark the smallest of each last dimension; of equal ones the first."""
    order = score.argsort(dim=-1, stable=True)[..., : pattern.n_zeros(score.shape[-1])]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)


def _in_groups(score: Tensor, pattern: Pattern) -> Tensor:
    return _smallest(score.reshape(len(score), -1, pattern.group), pattern).flatten(-2)
