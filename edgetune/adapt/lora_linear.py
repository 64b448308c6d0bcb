"""A LoRA linear layer with its own backward (arXiv:2106.09685): y = x W^T + s x A^T B^T.

It saves its input and s x A^T, which is small, and nothing else: W is frozen. peft's layer also keeps copies of its
output and of every cast. Same numbers, less memory, fewer passes over it.

Shapes: N tokens, C in-features, R out-features, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from peft import LoraConfig


class LoraProduct(torch.autograd.Function):
    """x [N, C], A [r, C], B [R, r] -> y [N, R], for a layer that gives its frozen weight [R, C] when asked."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, scale: float, layer: FusedLora) -> Tensor:
        W = layer.frozen_weight(x.dtype)
        y = functional.linear(x, W, layer.base_bias)
        x_flat, y_flat = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        u = (x_flat @ A.t().to(x.dtype)).mul_(scale)  # [N, r]
        y_flat.addmm_(u, B.t().to(y.dtype))
        ctx.save_for_backward(x, u, A, B)
        ctx.scale, ctx.layer = scale, layer
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, u, A, B = ctx.saved_tensors
        g = grads[0].reshape(-1, grads[0].shape[-1])  # [N, R]
        gB = (g @ B.to(g.dtype)).mul_(ctx.scale)  # [N, r]
        grad_A = (gB.t() @ x.view(-1, x.shape[-1])).to(A.dtype)
        grad_B = (g.t() @ u).to(B.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = g @ ctx.layer.frozen_weight(g.dtype)
            grad_x.addmm_(gB, A.to(g.dtype))
            grad_x = grad_x.view_as(x)
        return grad_x, grad_A, grad_B, None, None


class FusedLora(nn.Module):
    """What both kinds of layer share; mixed in before peft's class, whose forward remains for all other cases."""

    keep_dense = False  # hold the dequantized weight instead of making it anew for each product
    _dense: Tensor | None = None

    @property
    def base_bias(self) -> Tensor | None:
        bias: Tensor | None = self.get_base_layer().bias  # type: ignore[operator]
        return bias

    def frozen_weight(self, dtype: torch.dtype) -> Tensor:
        """Give the base's weight [R, C] as a plain tensor, kept if the recipe says so."""
        if self._dense is not None:
            return self._dense
        dense = self.dequantized(dtype)
        if self.keep_dense and dense is not self.get_base_layer().weight:  # type: ignore[operator]
            self._dense = dense
        return dense

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Give the base's weight [R, C] as a plain tensor, made anew."""
        weight: Tensor = self.get_base_layer().weight  # type: ignore[operator]
        if isinstance(weight, bnb.nn.Params4bit):
            weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return weight.to(dtype)

    def plain_adapter(self) -> str | None:
        """Name the one adapter that is nothing but A and B, None where there is more to it."""
        active: Any = self.active_adapters
        name: str | None = active[0] if len(active) == 1 else None
        plain = (
            name in self.lora_A  # type: ignore[operator]
            and not (self.disable_adapters or self.merged or self.lora_variant)
            and isinstance(self.lora_dropout[name], nn.Identity)  # type: ignore[index]
        )
        return name if plain else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self.plain_adapter()
        if name is None or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        A, B = self.lora_A[name].weight, self.lora_B[name].weight  # type: ignore[index, union-attr]
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # or its product and its gradient differ in dtype
        y: Tensor = LoraProduct.apply(x.contiguous(), A, B, self.scaling[name], self)  # type: ignore[index, no-untyped-call]
        return y


class FusedLinear(FusedLora, PeftLinear):  # type: ignore[misc]
    """LoRA on a 16-bit linear layer."""


class FusedLinear4bit(FusedLora, PeftLinear4bit):  # type: ignore[misc]
    """LoRA on an NF4 linear layer."""


class DenseLinear4bit(FusedLinear4bit):
    """LoRA on an NF4 linear layer whose dequantized weight is kept: faster, and as large as the unquantized base."""

    keep_dense = True


def use_fused_layers(config: LoraConfig, *, keep_dense: bool) -> None:
    """Make peft put the fused layers where it would put its own."""
    four_bit = DenseLinear4bit if keep_dense else FusedLinear4bit
    config._register_custom_module({bnb.nn.Linear4bit: four_bit, nn.Linear: FusedLinear})
