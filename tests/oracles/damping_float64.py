"""The choice of a damping once more, slow and in numpy float64: all rows at hand, each output computed.

Shapes: N rows, T tokens, R out-features, C in-features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tests.oracles import gptq_float64

Array = NDArray[np.float64]


def heldout_errors(
    weight: Array, rows: Array, dampings: tuple[float, ...], *, every: int, bits: int, group_size: int,
    factors: tuple[float, ...],
) -> list[float]:  # fmt: skip
    """Solve a layer [R, C] on rows [N, T, C] without every so manieth, and give the mean error on the others."""
    held = np.array([n % every == every - 1 for n in range(len(rows))])
    X, Y = (part.reshape(-1, rows.shape[2]) for part in (rows[~held], rows[held]))
    found = []
    for damping in dampings:
        made = gptq_float64.gptq(
            weight, 2 / len(X) * X.T @ X, bits=bits, group_size=group_size, sym=False, damp_percent=damping,
            desc_act=True, static_groups=True, factors=factors,
        )  # fmt: skip
        outputs = [y @ made.dequantized.T - y @ weight.T for y in Y]
        found.append(float(np.mean([np.sum(output**2) for output in outputs])))
    return found
