"""GPTQ (arXiv:2210.17323), section 3: round column by column, and let the columns that follow make up for it.

Shapes: R out-features, C in-features, G groups. Inside, weights lie transposed, W [C, R], so that a column of
the paper is contiguous memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.compress.gptaq import corrected
from edgetune.compress.hessian import inverse_factor
from edgetune.compress.scheme import Quantized, Scheme, check_group, encode, find_grid


@dataclass(frozen=True)
class GptqResult:
    """Codes with their grid, the loss tr(E H E^T) on the damped H, and what fell back."""

    quantized: Quantized
    loss: float
    fallbacks: tuple[str, ...]


def gptq_quantize(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    *,
    block_size: int = 128,
    damp_percent: float = 0.01,
    desc_act: bool = True,
    static_groups: bool = True,
    search: bool = False,
    weighted: bool = False,
    cross: Tensor | None = None,
    correction: float = 0.0,
) -> GptqResult:
    """Quantize a weight so that its layer's output changes least.

    weight [R, C], hessian [C, C] = 2/N X^T X. Weights that share an input may be stacked on rows: rows do not
    see each other. `desc_act` visits columns in the order of falling diag(H). With `static_groups` the grids are
    found beforehand, in the columns' own order, and g_idx is plain; without, each grid is found when its group
    is reached. `search` takes grids of least squared error instead of the range's; `weighted` weighs these errors by
    diag(H). With `cross` [C, C] that share `correction` of GPTAQ's shift comes before all else.
    `block_size` changes speed, not the result. float64 weights are solved in float64.
    Raises UnsupportedError where groups do not fit; StageError where H or a scale is unusable.
    """
    R, C = weight.shape
    check_group("weight", C, scheme.group_size)
    n = scheme.group_columns(C)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    W = weight.detach().to(dtype)
    diagonal = hessian.diagonal()
    plain = torch.arange(C, device=W.device)
    order = diagonal.argsort(descending=True, stable=True) if desc_act else plain
    g_idx = plain // n
    factor = inverse_factor(hessian, damp_percent, order)
    Hinv, fallbacks = factor.upper.to(dtype), factor.fallbacks
    del factor  # its float64 matrix
    if cross is not None:
        target = corrected(W[:, order], cross[order][:, order].to(dtype), Hinv, correction)
        W = torch.empty_like(W).index_copy_(1, order, target)
    importance = diagonal.to(dtype) if weighted else None
    if static_groups:
        shaped = None if importance is None else importance.reshape(C // n, n)
        scales, zeros = find_grid(W.reshape(R, C // n, n), scheme, search=search, importance=shaped)
        scales, zeros = scales.T.contiguous(), zeros.T.contiguous()  # [G, R]
        group_of = g_idx[order].tolist()
    else:
        scales, zeros = W.new_ones(C // n, R), W.new_zeros(C // n, R)
        group_of = g_idx.tolist()
        g_idx = torch.empty_like(g_idx).scatter_(0, order, g_idx)
    W = W.T[order].contiguous()  # [C, R], a copy

    block = -(-block_size // n) * n if n < C else block_size  # a group never straddles two blocks

    def at(i: int) -> tuple[Tensor, Tensor]:
        g = group_of[i]
        if not static_groups and i % n == 0:
            group = slice(i, i + n)
            shaped = None if importance is None else importance[order[group]]
            scales[g], zeros[g] = find_grid(W[group].T, scheme, search=search, importance=shaped)
        q = encode(W[i], scales[g], zeros[g], scheme.max_code)
        return q, (q - zeros[g]).mul_(scales[g])

    Q, loss = descend(W, Hinv, at, block)
    codes = torch.empty_like(Q).index_copy_(0, order, Q).T.to(torch.uint8).contiguous()
    quantized = Quantized(codes, scales.T.contiguous().half(), zeros.T.contiguous().int(), g_idx.int())
    return GptqResult(quantized, loss, fallbacks)


def gptq_codes(
    weight: Tensor,
    hessian: Tensor,
    scale: Tensor,
    minimum: Tensor,
    max_code: int,
    *,
    damp_percent: float = 0.01,
    block_size: int = 128,
) -> tuple[Tensor, tuple[str, ...]]:
    """Choose codes on a grid that is given, `w ~ scale * code - minimum`, so that a layer's output changes least.

    weight [R, C], hessian [C, C], scale and minimum [R, G]; a scale of 0 gives code 0. Columns are visited in the order
    of falling diag(H). Returns codes [R, C] uint8 and what fell back. Raises StageError where H is unusable.
    """
    C = weight.shape[1]
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    order = hessian.diagonal().argsort(descending=True, stable=True)
    group = (order // (C // scale.shape[1])).tolist()
    scales, minima = scale.T.to(dtype).contiguous(), minimum.T.to(dtype).contiguous()  # [G, R]
    inverse = torch.where(scales == 0, 0, 1 / scales)
    factor = inverse_factor(hessian, damp_percent, order)
    Hinv, fallbacks = factor.upper.to(dtype), factor.fallbacks
    del factor  # its float64 matrix
    W = weight.detach().to(dtype).T[order].contiguous()  # [C, R], a copy

    def at(i: int) -> tuple[Tensor, Tensor]:
        g = group[i]
        q = (W[i] + minima[g]).mul_(inverse[g]).round_().clamp_(0, max_code)
        return q, (q * scales[g]).sub_(minima[g])

    Q, _ = descend(W, Hinv, at, block_size)
    return torch.empty_like(Q).index_copy_(0, order, Q).T.to(torch.uint8).contiguous(), fallbacks


def descend(
    W: Tensor, Hinv: Tensor, at: Callable[[int], tuple[Tensor, Tensor]], block_size: int
) -> tuple[Tensor, float]:
    """Round the rows of W [C, R] one after the other, each error made up for by the rows that follow; W is used up.

    Hinv [C, C] is the upper factor of the inverse Hessian; `at(i)` gives codes [R] of W[i] as it then is, and what they
    stand for. Returns codes [C, R] and the loss.
    """
    d = Hinv.diagonal().tolist()
    Q, loss = torch.empty_like(W), 0.0
    for i1 in range(0, len(W), block_size):
        i2 = min(i1 + block_size, len(W))
        Err = torch.empty_like(W[i1:i2])
        for i in range(i1, i2):
            Q[i], value = at(i)
            err = (W[i] - value).div_(d[i])
            W[i + 1 : i2].addr_(Hinv[i, i + 1 : i2], err, alpha=-1)
            Err[i - i1] = err
        W[i2:].addmm_(Hinv[i1:i2, i2:].T, Err, alpha=-1)
        loss += float(Err.square().sum(dtype=torch.float64))  # W - Q = Err U, so |Err|^2 is the loss
    return Q, loss
