"""Zero points that are learned: straight-through rounding, with the codes following (EfficientQAT, arXiv:2407.11062).

A group's zero point says which levels q - zero_point its codes reach. Moved by one it must not move the weights: codes
move with it, and only those at the ends of the range come to stand for another level, the next one that their weight
asks for, or the last one that is left. So a zero point's gradient comes from the weights that are out of reach.
Rounding passes it on (straight through), and what is stored is an integer between 1 and the greatest code.
Shapes: R out-features, C in-features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgetune.compress.scheme import Quantized
from edgetune.errors import DataError

STEP = 50  # codes that a zero point moves a step, times the learning rate of the scales' factors
EVERY = 4  # batches, the last of which is held out


@dataclass(frozen=True)
class Reach:
    """The levels that a layer's weights ask for, within its codes' reach or not."""

    asked: Tensor  # [R, C] whole numbers, in a float dtype
    index: Tensor  # [C] int64, the group of each column
    max_code: int

    @classmethod
    def of(cls, layer: Quantized, weight: Tensor, max_code: int) -> Reach:
        """Ask for the levels that a layer has; where its code is at an end, for that of its weight [R, C] if beyond."""
        index, dtype = layer.g_idx.long(), torch.promote_types(layer.scales.dtype, torch.float32)
        levels = layer.q.to(dtype) - layer.zero_point.to(dtype)[:, index]
        nearest = (weight.to(dtype) / layer.scales.to(dtype)[:, index]).round_()
        asked = torch.where(layer.q == 0, levels.minimum(nearest), levels)
        return cls(torch.where(layer.q == max_code, asked.maximum(nearest), asked), index, max_code)

    def levels(self, zeros: Tensor) -> Tensor:
        """Give the levels [R, C] that codes show with these zero points [R, G], which need not be whole."""
        whole = (zeros + (self.rounded(zeros) - zeros).detach())[:, self.index]
        return (self.asked + whole).clamp(0, self.max_code) - whole

    def rounded(self, zeros: Tensor) -> Tensor:
        """Give zero points as they are stored, still in their float dtype."""
        return zeros.detach().round().clamp_(1, self.max_code)

    def moved(self, layer: Quantized, zeros: Tensor) -> Quantized:
        """Give the layer with other zero points [R, G] and the codes that belong to them."""
        stored = self.rounded(zeros)
        codes = (self.asked + stored[:, self.index]).clamp_(0, self.max_code)
        return replace(layer, q=codes.to(torch.uint8), zero_point=stored.to(layer.zero_point.dtype))


def shown_and_held(n_batches: int) -> tuple[list[int], list[int]]:
    """Give the batches that are learned from, and those that it is judged by. Raises DataError where there is one."""
    held = [i for i in range(n_batches) if i % EVERY == EVERY - 1] or [n_batches - 1]
    shown = [i for i in range(n_batches) if i not in held]
    if not shown:
        raise DataError("tune.zeros is judged by calibration rows that it does not learn from; give more of them")
    return shown, held
