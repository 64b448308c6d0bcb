"""GPTQ written a second time, slowly, from the paper's equations (2) and (3) (arXiv:2210.17323, section 2-3).

One column at a time, no blocks and no Cholesky: after a column is rounded, the inverse Hessian of the columns
that remain is found by eliminating it. float64 numpy throughout; scales rounded to float16.
Shapes: R out-features, C in-features, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Oracle:
    q: NDArray[np.int64]  # [R, C]
    scale: Array  # [R, G]
    zero_point: Array  # [R, G]
    g_idx: NDArray[np.int64]  # [C]
    dequantized: Array  # [R, C]


def grid(values: Array, bits: int, sym: bool) -> tuple[float, float]:
    """Scale and zero point of the values of one group of one row."""
    top = 2**bits - 1
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if low == high == 0:
        return 1.0, float(2 ** (bits - 1))
    if sym:
        reach = max(-low, high)
        return float(np.float16(max(2 * reach / top, 2**-24))), float(2 ** (bits - 1))
    low = min(low, -high / (top - 1))  # a zero point of at least one
    scale = float(np.float16(max((high - low) / top, 2**-24)))
    return scale, float(np.clip(np.rint(-low / scale), 1, top))


def searched_grid(
    values: Array, importance: Array, factors: tuple[float, ...], bits: int, sym: bool
) -> tuple[float, float]:
    """The grid of least weighted squared error among those of the range times a factor, the range's own first."""
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    best, least = (1.0, 0.0), np.inf
    for factor in (1.0, *factors):
        ends = np.array([low * factor, high * factor])
        scale, zero = grid(ends, bits, sym)
        off = [scale * (min(max(np.rint(v / scale) + zero, 0), 2**bits - 1) - zero) - v for v in values]
        error = sum(weight * e * e for weight, e in zip(importance, off, strict=True))
        if error < least:
            best, least = (scale, zero), error
    return best


def gptaq_target(weight: Array, floats: Array, seen: Array, damp: float, share: float) -> Array:
    """The weight V [R, C] of least 2/N ||V seen - W floats||^2 + damp ||V - W||^2, a share of the way, by lstsq.

    floats and seen [N, C]: what the float model and the quantized one show the layer.
    """
    root = np.sqrt(2 / len(seen))
    design = np.vstack([root * seen, np.sqrt(damp) * np.eye(weight.shape[1])])
    aims = np.vstack([root * floats @ weight.T, np.sqrt(damp) * weight.T])
    nearest = np.linalg.lstsq(design, aims, rcond=None)[0].T
    moved: Array = weight + share * (nearest - weight)
    return moved


def gptq(
    weight: Array, hessian: Array, *, bits: int, group_size: int, sym: bool,
    damp_percent: float, desc_act: bool, static_groups: bool, factors: tuple[float, ...] | None = None,
) -> Oracle:  # fmt: skip
    """Quantize [R, C] by a Hessian [C, C]; with `factors` the grids are searched, weighted by its diagonal."""
    W, H = weight.astype(np.float64).copy(), hessian.astype(np.float64).copy()
    R, C = W.shape
    n = C if group_size == -1 else group_size
    order = np.argsort(-np.diag(H), kind="stable") if desc_act else np.arange(C)
    live = np.diag(H) > 0
    mean = np.diag(H)[live].mean()
    for j in np.flatnonzero(~live):
        H[j, :] = H[:, j] = 0
        H[j, j] = mean
    Hinv = np.linalg.inv(H + damp_percent * mean * np.eye(C))

    g_idx = np.arange(C) // n
    if not static_groups:
        place = np.empty(C, dtype=np.int64)
        place[order] = np.arange(C)
        g_idx = place // n
    scale, zero = np.zeros((R, C // n)), np.zeros((R, C // n))

    def fit(g: int) -> None:
        for r in range(R):
            values = W[r, g_idx == g]
            if factors is None:
                scale[r, g], zero[r, g] = grid(values, bits, sym)
            else:
                importance = np.diag(hessian)[g_idx == g]
                scale[r, g], zero[r, g] = searched_grid(values, importance, factors, bits, sym)

    if static_groups:
        for g in range(C // n):
            fit(g)
    q, fixed = np.zeros((R, C), dtype=np.int64), np.zeros((R, C))
    for step, j in enumerate(order):
        g = g_idx[j]
        if not static_groups and step % n == 0:
            fit(g)  # on weights that have all earlier corrections in them
        q[:, j] = np.clip(np.rint(W[:, j] / scale[:, g]) + zero[:, g], 0, 2**bits - 1)
        fixed[:, j] = scale[:, g] * (q[:, j] - zero[:, g])
        error = (W[:, j] - fixed[:, j]) / Hinv[j, j]
        W -= np.outer(error, Hinv[j, :])
        Hinv -= np.outer(Hinv[:, j], Hinv[j, :]) / Hinv[j, j]  # Gaussian elimination of j
    return Oracle(q, scale, zero, g_idx, fixed)
