"""GPTAQ (arXiv:2504.02692), section 4: a layer aims at what it gave before the layers ahead of it were quantized.

GPTQ keeps W x~ on the inputs x~ that the quantized layers ahead give; the float model would have given W x. So the
objective is ||Q x~ - W x||^2. The paper adds a term to each column's update; as the objective is quadratic, its minimum
without rounding can be taken as the new W at once, and GPTQ rounds towards that:
W + W D (H + damp)^-1, with D = 2/N (X - X~)^T X~.
Shapes: N inputs seen, R out-features, C in-features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def corrected(weight: Tensor, cross: Tensor, upper: Tensor, share: float) -> Tensor:
    """Give the weight [R, C] whose output on the quantized model's inputs is nearest to the float model's.

    cross [C, C] is D above; upper [C, C] is M with H + damp = M M^T. `share` of the shift is made: all of it fits
    the calibration rows, noise included.
    """
    half = torch.linalg.solve_triangular(upper.T, share * (weight @ cross), upper=False, left=False)
    shift: Tensor = torch.linalg.solve_triangular(upper, half, upper=True, left=False)
    return weight + shift
