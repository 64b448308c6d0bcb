"""Round to nearest: each weight to the closest point of its group's grid. Needs no data.

Shapes: R out-features, C in-features, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgetune.compress.scheme import Quantized, Scheme, check_group, encode, find_grid


def rtn_quantize(weight: Tensor, scheme: Scheme, *, search: bool = False) -> Quantized:
    """Quantize a weight by rounding.

    weight [R, C]; `search` takes the scale of least squared error instead of the range's.
    Raises UnsupportedError where groups do not fit and StageError where a scale leaves float16.
    """
    R, C = weight.shape
    check_group("weight", C, scheme.group_size)
    n = scheme.group_columns(C)
    W = (weight if weight.dtype == torch.float64 else weight.float()).reshape(R, C // n, n)
    scale, zero = find_grid(W, scheme, search=search)  # [R, G]
    q = encode(W, scale.unsqueeze(-1), zero.unsqueeze(-1), scheme.max_code)
    g_idx = torch.arange(C, dtype=torch.int32, device=W.device) // n
    return Quantized(q.reshape(R, C).to(torch.uint8), scale.half(), zero.int(), g_idx)
