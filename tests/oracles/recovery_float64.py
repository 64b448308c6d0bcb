"""Low-rank corrections and learned scales once more, slow and in numpy float64, from the papers alone.

Shapes: R out-features, C in-features, G groups, N tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def eora(error: Array, hessian: Array, rank: int) -> Array:
    """EoRA as its paper has it: project by the eigenvectors of X X^T, cut the SVD off, project back; B A [R, C]."""
    values, vectors = np.linalg.eigh(hessian)
    project = vectors * np.sqrt(np.maximum(values, 0))
    U, s, V = np.linalg.svd(error @ project, full_matrices=False)
    made: Array = (U[:, :rank] * s[:rank]) @ V[:rank] @ np.linalg.pinv(project)
    return made


def lqer(error: Array, sizes: Array, rank: int) -> Array:
    """LQER: columns times the size of their inputs, the SVD cut off, and the sizes taken out again; B A [R, C]."""
    U, s, V = np.linalg.svd(error * sizes, full_matrices=False)
    made: Array = (U[:, :rank] * s[:rank]) @ V[:rank] / sizes
    return made


def tuned_scales(
    q: NDArray[Any], scale: Array, zero_point: NDArray[Any], g_idx: NDArray[Any], inputs: list[Array], weight: Array, *,
    steps: int, learning_rate: float,
) -> tuple[Array, tuple[float, float]]:  # fmt: skip
    """Adam on the factors 1 + d of one linear layer's scales, its gradient by hand; the best of two looks and none.

    Returns scales [R, G] and the mean relative error of a token before and after.
    """
    levels = q.astype(np.float64) - zero_point[:, g_idx]
    d, m, v = np.zeros_like(scale), np.zeros_like(scale), np.zeros_like(scale)

    def residual(factors: Array, X: Array) -> tuple[Array, Array]:
        aim = X @ weight.T
        return X @ (levels * (scale * factors)[:, g_idx]).T - aim, (aim**2).sum(1, keepdims=True)

    def error(factors: Array) -> float:
        parts = [(lambda r, n: (r**2).sum(1) / n[:, 0])(*residual(factors, X)) for X in inputs]
        return float(np.concatenate(parts).mean())

    first = error(np.ones_like(scale))
    best, least = scale, first
    for step in range(steps):
        X = inputs[step % len(inputs)]
        left, size = residual(1 + d, X)
        to_weight = (2 * left / size / len(X)).T @ X  # [R, C]
        gradient = np.zeros_like(scale)
        for c, g in enumerate(g_idx):
            gradient[:, g] += to_weight[:, c] * levels[:, c] * scale[:, g]
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        t = step + 1
        d -= learning_rate * (1 - step / steps) * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        if t in (steps // 2, steps) and error(1 + d) < least:
            best, least = scale * (1 + d), error(1 + d)
    return best, (first, least)
