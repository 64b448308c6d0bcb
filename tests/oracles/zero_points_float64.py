"""Learned scales and zero points once more, slow and in numpy float64, gradients by hand.

Shapes: R out-features, C in-features, G groups, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Found:
    scale: Array  # [R, G]
    zero_point: Array  # [R, G]
    codes: NDArray[Any]  # [R, C]
    errors: tuple[float, float]


def asked_levels(q: Array, scale: Array, zero: Array, g_idx: NDArray[Any], weight: Array, top: int) -> Array:
    """The level of each code, or of its weight where the code is at an end of the range and the weight beyond."""
    made = np.empty_like(weight)
    for r, c in np.ndindex(*weight.shape):
        g = g_idx[c]
        level, nearest = q[r, c] - zero[r, g], np.rint(weight[r, c] / scale[r, g])
        made[r, c] = min(level, nearest) if q[r, c] == 0 else max(level, nearest) if q[r, c] == top else level
    return made


def tuned(
    q: Array, scale: Array, zero: Array, g_idx: NDArray[Any], shown: Sequence[Array], held: Sequence[Array],
    weight: Array, *, top: int, steps: int, learning_rate: float, zero_step: float,
) -> Found:  # fmt: skip
    """Adam on the factors of one linear layer's scales and on its zero points, rounding passed over.

    Looked at half-way and at the end, with the zero points of the beginning and with those learned; the best is given.
    """
    asked = asked_levels(q, scale, zero, g_idx, weight, top)
    d, z = np.zeros_like(scale), zero.copy()
    moments = [[np.zeros_like(scale) for _ in range(2)] for _ in range(2)]

    def whole(zeros: Array) -> Array:
        return np.clip(np.rint(zeros), 1, top)

    def codes(zeros: Array) -> Array:
        return np.clip(asked + whole(zeros)[:, g_idx], 0, top)

    def residual(factors: Array, zeros: Array, X: Array) -> tuple[Array, Array]:
        aim = X @ weight.T
        made = (codes(zeros) - whole(zeros)[:, g_idx]) * (scale * factors)[:, g_idx]
        return X @ made.T - aim, (aim**2).sum(1, keepdims=True)

    def error(factors: Array, zeros: Array) -> float:
        parts = [(lambda r, n: (r**2).sum(1) / n[:, 0])(*residual(factors, zeros, X)) for X in held]
        return float(np.concatenate(parts).mean())

    best, least = (np.ones_like(scale), zero), error(np.ones_like(scale), zero)
    first = least
    for step in range(steps):
        X = shown[step % len(shown)]
        left, size = residual(1 + d, z, X)
        to_weight = (2 * left / size / len(X)).T @ X  # [R, C]
        to_d, to_z = np.zeros_like(scale), np.zeros_like(scale)
        for r, c in np.ndindex(*weight.shape):
            g = g_idx[c]
            unclipped = asked[r, c] + whole(z)[r, g]
            level = min(max(unclipped, 0), top) - whole(z)[r, g]
            to_d[r, g] += to_weight[r, c] * level * scale[r, g]
            if not 0 <= unclipped <= top:  # within reach codes move with the zero point, and the weight does not
                to_z[r, g] -= to_weight[r, c] * scale[r, g] * (1 + d[r, g])
        for value, gradient, (m, v), rate in (
            (d, to_d, moments[0], learning_rate),
            (z, to_z, moments[1], learning_rate * zero_step),
        ):
            m[:], v[:] = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            t = step + 1
            value -= rate * (1 - step / steps) * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        if step + 1 in (steps // 2, steps):
            for zeros in (zero, whole(z)):
                if error(1 + d, zeros) < least:
                    best, least = (1 + d.copy(), zeros.copy()), error(1 + d, zeros)
    return Found(scale * best[0], best[1], codes(best[1]), (first, least))
