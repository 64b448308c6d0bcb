"""Scales trained end to end, integers and zero points fixed: E2E-QP of EfficientQAT (arXiv:2407.11062, section 3.3).

A scale is s0 (1 + d), and d is what is trained, so that one learning rate fits all scales. The weight is made anew for
each product, from its levels q - zero_point and its scales: what is kept between forward and backward is the input.
Shapes: N tokens, R out-features, C in-features, G groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.compress.correction import Pair, corrected_weight
from edgetune.compress.scheme import SCALE_MAX, SCALE_MIN, Quantized


class ScaledLinear(nn.Module):
    """A linear layer whose weight is integers by scales, of which `factors` [R, G] alone are trained."""

    scales: Tensor
    levels: Tensor
    index: Tensor
    members: Tensor

    def __init__(self, layer: Quantized, bias: Tensor | None = None, pair: Pair | None = None) -> None:
        super().__init__()
        wide = torch.promote_types(layer.scales.dtype, torch.float32)
        index = layer.g_idx.long()
        levels = layer.q.to(torch.int16) - layer.zero_point.to(torch.int16)[:, index]
        A, B = pair or (None, None)
        held = {"scales": layer.scales.to(wide), "levels": levels, "index": index, "bias": bias, "A": A, "B": B}
        held["members"] = functional.one_hot(index, layer.scales.shape[1]).to(wide)  # [C, G]
        for name, tensor in held.items():  # not persistent: a checkpoint of the trainer has the factors alone
            self.register_buffer(name, tensor, persistent=False)
        self.factors = nn.Parameter(torch.zeros_like(self.scales))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _ScaledProduct.apply(x, self.factors, self)  # type: ignore[no-untyped-call]
        return y

    def weight_now(self, dtype: torch.dtype) -> Tensor:
        """Give the weight [R, C] that the scales make as they are."""
        scales = self.scales * (1 + self.factors.detach())
        weight = scales.index_select(1, self.index).mul_(self.levels)
        return corrected_weight(weight, self.pair).to(dtype)

    @property
    def pair(self) -> Pair | None:
        """What is beside the integers."""
        A, B = self.A, self.B
        return (A, B) if isinstance(A, Tensor) and isinstance(B, Tensor) else None

    def gradient(self, of_weight: Tensor) -> Tensor:
        """Give the gradient of the factors [R, G] from that of the weight [R, C], which is used up."""
        return (of_weight.to(self.scales.dtype).mul_(self.levels) @ self.members).mul_(self.scales)

    def stored(self) -> Tensor:
        """Give the scales [R, G] float16 as a checkpoint has them; one that was not trained is what it was."""
        return (self.scales * (1 + self.factors.detach())).clamp(SCALE_MIN, SCALE_MAX).half().cpu()


class _ScaledProduct(torch.autograd.Function):
    """x [.., C] and the factors [R, G] of a layer -> y [.., R]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor, layer: ScaledLinear) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        bias: Any = layer.bias
        return functional.linear(x, layer.weight_now(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        g = grads[0].reshape(-1, grads[0].shape[-1])  # [N, R]
        flat = x.reshape(-1, x.shape[-1]).to(g.dtype)  # autocast may have made another dtype of it
        of_factors = layer.gradient(g.t() @ flat) if ctx.needs_input_grad[1] else None
        of_x = (g @ layer.weight_now(g.dtype)).view_as(x).to(x.dtype) if ctx.needs_input_grad[0] else None
        return of_x, of_factors, None
