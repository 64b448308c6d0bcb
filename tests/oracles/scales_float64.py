"""Scales that are trained end to end once more, slow and in numpy float64: one linear layer and a softmax.

Shapes: N positions, V vocabulary (the layer's out-features), C in-features, G groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.oracles.students_float64 import softmax

Array = NDArray[np.float64]


def weight(q: NDArray[Any], zero: NDArray[Any], scale: Array, d: Array, g_idx: NDArray[Any], beside: Array) -> Array:
    """scale (1 + d) (q - zero) of each weight, and what is beside the integers, [V, C]."""
    made = beside.copy()
    for r, c in np.ndindex(*made.shape):
        g = g_idx[c]
        made[r, c] += scale[r, g] * (1 + d[r, g]) * (int(q[r, c]) - int(zero[r, g]))
    return made


def trained(
    q: NDArray[Any], zero: NDArray[Any], scale: Array, g_idx: NDArray[Any], beside: Array, X: Array, P: Array, *,
    steps: int, learning_rate: float,
) -> tuple[Array, list[float]]:  # fmt: skip
    """Adam on d, so that softmax(X W^T) comes nearest to P [N, V]: gives d and the mean KL(P || .) before each step."""
    d, m, v = np.zeros_like(scale), np.zeros_like(scale), np.zeros_like(scale)
    losses = []
    for t in range(1, steps + 1):
        W = weight(q, zero, scale, d, g_idx, beside)
        Q = np.stack([softmax(W @ x) for x in X])
        losses.append(float(np.mean([np.sum(p * (np.log(p) - np.log(s))) for p, s in zip(P, Q, strict=True)])))
        to_weight = (Q - P).T @ X / len(X)
        gradient = np.zeros_like(d)
        for r, c in np.ndindex(*W.shape):
            gradient[r, g_idx[c]] += to_weight[r, c] * scale[r, g_idx[c]] * (int(q[r, c]) - int(zero[r, g_idx[c]]))
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        d = d - learning_rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return d, losses
