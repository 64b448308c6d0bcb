"""What a quantized weight is: a scheme, its integers, and the grid of each group.

`w ~ scale * (q - zero_point)`. Scales are rounded to float16 before codes are computed, because that is
what a checkpoint stores. Zero points lie in 1 .. 2^bits - 1: the AutoGPTQ v1 format stores them minus one,
and its readers disagree on what a stored -1 means.
Shapes: R out-features, C in-features, G groups, n columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from edgetune.errors import StageError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GROUP_SIZES = (32, 64, 96, 128, 256)  # what runtimes have kernels for, to suggest from
SCALE_MIN, SCALE_MAX = 2.0**-24, 65504.0  # smallest and largest positive float16
# Factors tried on a group's range when a scale search is asked for: a little clipping pays, and a
# symmetric grid has one code less above zero, so a range that is a little wider can pay as well.
SEARCH = tuple(1.08 - 0.04 * i for i in range(13))


@dataclass(frozen=True)
class Scheme:
    """How weights are rounded: `bits` each, `group_size` columns share a scale (-1: the whole row)."""

    bits: int
    group_size: int = -1
    sym: bool = True

    @property
    def max_code(self) -> int:
        return int(2**self.bits - 1)

    def group_columns(self, in_features: int) -> int:
        """Give the number of columns that share a scale in a layer of that width."""
        return in_features if self.group_size == -1 else self.group_size

    def bits_per_weight(self, in_features: int, *, zero_points: bool = True) -> float:
        """Give stored bits for each weight, float16 scales counted, and zero points where the format stores them."""
        return self.bits + (16 + self.bits * zero_points) / self.group_columns(in_features)


@dataclass(frozen=True)
class Quantized:
    """The integers of one weight, and the grid that they stand for."""

    q: Tensor  # [R, C] uint8
    scales: Tensor  # [R, G] float16
    zero_point: Tensor  # [R, G] int32
    g_idx: Tensor  # [C] int32, the group of each column

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Give the weight [R, C]; float32, which holds it exactly, where no dtype is named."""
        index = self.g_idx.long()
        codes = self.q.float().sub_(self.zero_point.float().index_select(1, index))
        weight = codes.mul_(self.scales.float().index_select(1, index))
        return weight if dtype is None else weight.to(dtype)

    def rows(self, start: int, stop: int) -> Quantized:
        """Give the same for the rows start .. stop, where several weights were stacked."""
        part = slice(start, stop)
        return Quantized(self.q[part], self.scales[part], self.zero_point[part], self.g_idx.clone())

    def to(self, device: torch.device | str) -> Quantized:
        return Quantized(*(part.to(device) for part in (self.q, self.scales, self.zero_point, self.g_idx)))

    def cpu(self) -> Quantized:
        return self.to("cpu")


def check_group(name: str, in_features: int, group_size: int) -> None:
    """Raise UnsupportedError where groups of that size do not cover a layer evenly."""
    if group_size == -1 or (group_size > 0 and in_features % group_size == 0):
        return
    fitting = [str(size) for size in GROUP_SIZES if in_features % size == 0][:3]
    advice = f"{', '.join(fitting)} or -1" if fitting else "-1"
    raise UnsupportedError(f"group_size={group_size} does not divide in_features={in_features} of {name}; use {advice}")


def plain_groups(in_features: int, group_size: int | None, n_groups: int) -> Tensor:
    """Give the group [C] of each column where all lie in order, the last group of what is left (-1: all columns).

    Raises ValueError where these are not so many groups.
    """
    import torch

    n = in_features if group_size == -1 else group_size
    if n is None or n < 1 or ceil(in_features / n) != n_groups:
        raise ValueError(f"{in_features} columns with group_size={group_size} do not make {n_groups} groups")
    return torch.arange(in_features, dtype=torch.int32) // n


def find_grid(
    weight: Tensor, scheme: Scheme, *, search: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Give scale and zero point of each group [..., n], by its range or, with `search`, by least squared error.

    `importance` [..., n], which broadcasts, weighs the squares: with diag(H) they are those of the layer's output if
    columns did not covary. Returns scale and zero_point [...] in the dtype of `weight`; scales hold float16 values.
    Raises StageError where a scale would not fit into float16.
    """
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    best_scale, best_zero = _grid(low, high, scheme)
    if not search:
        return best_scale, best_zero
    best = _error(weight, best_scale, best_zero, scheme, importance)
    for factor in SEARCH:
        scale, zero = _grid(low * factor, high * factor, scheme)
        error = _error(weight, scale, zero, scheme, importance)
        better = error < best
        best = error.where(better, best)
        best_scale, best_zero = scale.where(better, best_scale), zero.where(better, best_zero)
    return best_scale, best_zero


def encode(weight: Tensor, scale: Tensor, zero_point: Tensor, max_code: int) -> Tensor:
    """Give the codes q nearest to `weight`, still in its float dtype; ties go to the even integer."""
    return (weight / scale).round_().add_(zero_point).clamp_(0, max_code)


def _grid(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    if scheme.sym:
        scale = high.maximum(-low) * (2 / scheme.max_code)
    else:
        low = low.minimum(high / (1 - scheme.max_code))  # keeps the zero point at 1 or above
        scale = (high - low) / scheme.max_code
    empty = scale == 0
    scale = scale.clamp(min=SCALE_MIN).half().to(low.dtype).masked_fill(empty, 1.0)
    if not bool((scale <= SCALE_MAX).all()):
        raise StageError(f"weights up to {float(high.max()):.3g} need a scale beyond float16; they are damaged")
    middle = 2 ** (scheme.bits - 1)
    if scheme.sym:
        return scale, scale.new_full(scale.shape, middle)
    zero = (-low / scale).round_().clamp_(1, scheme.max_code)
    return scale, zero.masked_fill(empty, middle)


def _error(weight: Tensor, scale: Tensor, zero: Tensor, scheme: Scheme, importance: Tensor | None) -> Tensor:
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    off = encode(weight, scale, zero, scheme.max_code).sub_(zero).mul_(scale).sub_(weight).square_()
    return (off if importance is None else off.mul_(importance)).sum(-1)
