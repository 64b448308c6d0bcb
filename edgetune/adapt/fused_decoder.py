"""A decoder of the Llama kind with LoRA on all linear layers, in two steps a block, each with its own backward.

Module by module a small batch costs thousands of small operations, more time than its matrix products. Here layers
that read the same input are one product, norms and activations are a few operations in place, and LoRA
(arXiv:2106.09685) rides along. Numbers are those of the modules, whose parameters these are.

Shapes: S packed tokens, C hidden size, I intermediate size, H and H' query and key heads, D head size, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edgetune.adapt.lora_linear import FusedLora
from edgetune.packed import Layout, attention

# Blocks that are: norm, q/k/v, rotary, attention, o, residual, norm, SiLU-gated MLP, residual.
LLAMA_LIKE = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer")


@dataclass
class Group:
    """Linear layers that read the same input: weights one under the other [R, C], adapters of rank r side by side."""

    layers: Sequence[Any]
    adapter: str
    scale: float
    _stacked: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, layers: Sequence[nn.Module]) -> Group | None:
        """Group layers; None where one of them is more than a frozen product and one plain adapter."""
        found: list[Any] = [layer for layer in layers if isinstance(layer, FusedLora)]
        names = {layer.plain_adapter() for layer in found}
        name = names.pop() if len(names) == 1 and len(found) == len(layers) else None
        if name is None or len({layer.base_bias is None for layer in found}) > 1:
            return None
        scales = {float(layer.scaling[name]) for layer in found}
        return cls(found, name, scales.pop()) if len(scales) == 1 else None

    @property
    def parameters(self) -> list[Tensor]:
        """A of each layer [r, C], then B of each layer [R, r]."""
        return [
            *(layer.lora_A[self.adapter].weight for layer in self.layers),
            *(layer.lora_B[self.adapter].weight for layer in self.layers),
        ]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Frozen weights of all layers [R, C]: dequantized anew where the layers do not hold theirs."""
        if self._stacked is not None:
            return self._stacked
        stacked = _joined([layer.dequantized(dtype) for layer in self.layers])
        bases = [layer.get_base_layer() for layer in self.layers]
        if not any(isinstance(base, bnb.nn.Linear4bit) for base in bases):
            parts = torch.split(stacked, [len(base.weight) for base in bases])
            for base, part in zip(bases, parts, strict=True):
                base.weight.data = part  # the layers keep looking at the same memory
            self._stacked = stacked
        elif all(layer.keep_dense for layer in self.layers):
            self._stacked = stacked
        return stacked

    def bias(self) -> Tensor | None:
        parts = [layer.base_bias for layer in self.layers]
        return None if any(part is None for part in parts) else torch.cat(parts)

    def forward(self, x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """x [S, C] -> y [S, R] and u = s x A^T [S, n r], which the backward reads."""
        n = len(self.layers)
        y = functional.linear(x, self.weight(x.dtype), self.bias())
        u = (x @ _joined(parameters[:n]).t().to(x.dtype)).mul_(self.scale)
        for part, own, B in zip(*self._parts(y, u, parameters), strict=True):
            part.addmm_(own, B.t().to(x.dtype))
        return y, u

    def backward(
        self, g: Tensor, x: Tensor, u: Tensor, parameters: Sequence[Tensor], *, wants_x: bool = True
    ) -> tuple[Tensor | None, list[Tensor]]:
        """From the gradient of y give those of x and of the parameters, in their order."""
        n = len(self.layers)
        A = _joined(parameters[:n]).to(g.dtype)
        parts, own, Bs = self._parts(g, u, parameters)
        gu = _joined([part @ B.to(g.dtype) for part, B in zip(parts, Bs, strict=True)], dim=1).mul_(self.scale)
        grads = [*torch.split(gu.t() @ x, len(parameters[0])), *(p.t() @ o for p, o in zip(parts, own, strict=True))]
        grads = [grad.to(parameter.dtype) for grad, parameter in zip(grads, parameters, strict=True)]
        if not wants_x:
            return None, grads
        return torch.addmm(g @ self.weight(g.dtype), gu, A), grads

    def _parts(self, y: Tensor, u: Tensor, parameters: Sequence[Tensor]) -> tuple[Any, Any, Sequence[Tensor]]:
        Bs = parameters[len(self.layers) :]
        return torch.split(y, [len(B) for B in Bs], dim=1), torch.split(u, Bs[0].shape[1], dim=1), Bs


@dataclass
class Block:
    """One layer of the decoder: its groups, its norms and its heads."""

    qkv: Group
    out: Group
    gate_up: Group
    down: Group
    norms: tuple[Any, Any]
    n_query: int
    n_key: int
    head_size: int
    scale: float

    def __call__(self, x: Tensor, rope: tuple[Tensor, Tensor], layout: Layout) -> Tensor:
        """x [S, C] -> [S, C]"""
        qkv: Tensor = _Project.apply(x, rope, self, *self.qkv.parameters)  # type: ignore[no-untyped-call]
        heads = qkv.view(len(x), -1, self.head_size)
        found = attention(heads, self.n_query, self.n_key, layout, self.scale).flatten(1)
        parameters = [*self.out.parameters, *self.gate_up.parameters, *self.down.parameters]
        y: Tensor = _Feed.apply(x, found, self, *parameters)  # type: ignore[no-untyped-call]
        return y


class FusedDecoder:
    """The decoder of a model that `FusedDecoder.of` accepts."""

    def __init__(self, decoder: Any, blocks: list[Block]) -> None:
        self._decoder, self._blocks = decoder, blocks
        self.checkpointing = False  # keep each block's input only, and compute the block once more on the way back

    @classmethod
    def of(cls, causal: Any) -> FusedDecoder | None:
        """Look at a causal model with adapters; None where it is not of this kind, and its modules must run."""
        decoder = causal.get_decoder()
        if getattr(decoder.config, "hidden_act", None) != "silu":
            return None
        blocks = []
        for layer in decoder.layers:
            if type(layer).__name__ not in LLAMA_LIKE:
                return None
            at, mlp = layer.self_attn, layer.mlp
            qkv, out = Group.of((at.q_proj, at.k_proj, at.v_proj)), Group.of((at.o_proj,))
            gate_up, down = Group.of((mlp.gate_proj, mlp.up_proj)), Group.of((mlp.down_proj,))
            if qkv is None or out is None or gate_up is None or down is None:
                return None
            blocks.append(
                Block(
                    qkv, out, gate_up, down, (layer.input_layernorm, layer.post_attention_layernorm),
                    at.q_proj.out_features // at.head_dim, at.k_proj.out_features // at.head_dim, at.head_dim,
                    at.scaling,
                )
            )  # fmt: skip
        return cls(decoder, blocks)

    def states(self, ids: Tensor, layout: Layout) -> Tensor:
        """Token ids [1, S] -> hidden states [S, C] after the last norm."""
        x: Tensor = self._decoder.embed_tokens(ids)
        cos, sin = self._decoder.rotary_emb(x, position_ids=layout.positions())  # [1, S, D], both halves alike
        half = cos.shape[-1] // 2
        rope = (cos[0, :, None, :half].contiguous(), sin[0, :, None, :half].contiguous())
        x = x[0]
        for block in self._blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, layout, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, rope, layout)
        states: Tensor = self._decoder.norm(x)
        return states


class _Project(torch.autograd.Function):
    """Norm, queries, keys and values, and their rotation: x [S, C] -> [S, (H + 2 H') D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: tuple[Tensor, Tensor], block: Block, *parameters: Tensor) -> Tensor:
        normed, r = _norm(x, block.norms[0])
        qkv, u = block.qkv.forward(normed, parameters)
        _rotate(_rotated_heads(qkv, block), *rope)
        ctx.save_for_backward(x, r, normed, u, *parameters)
        ctx.block, ctx.rope = block, rope
        return qkv

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, r, normed, u, *parameters = ctx.saved_tensors
        block, (cos, sin) = ctx.block, ctx.rope
        g = grads[0].clone()
        _rotate(_rotated_heads(g, block), cos, -sin)
        wants_x = ctx.needs_input_grad[0]
        gn, gp = block.qkv.backward(g, normed, u, parameters, wants_x=wants_x)
        gx = _norm_backward(gn, x, r, block.norms[0]) if gn is not None else None
        return gx, None, None, *gp


class _Feed(torch.autograd.Function):
    """Output projection, residual, norm, gated MLP, residual: x [S, C] and attention's result [S, H D] -> [S, C]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, found: Tensor, block: Block, *parameters: Tensor) -> Tensor:
        of_out, of_gate_up, of_down = _dealt(parameters)
        h, u_out = block.out.forward(found, of_out)
        h.add_(x)
        normed, r = _norm(h, block.norms[1])
        gate_up, u_gate_up = block.gate_up.forward(normed, of_gate_up)
        gate, up = gate_up.chunk(2, dim=1)
        product = functional.silu(gate).mul_(up)
        y, u_down = block.down.forward(product, of_down)
        ctx.save_for_backward(found, h, r, normed, gate_up, product, u_out, u_gate_up, u_down, *parameters)
        ctx.block = block
        return y.add_(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found, h, r, normed, gate_up, product, u_out, u_gate_up, u_down, *parameters = ctx.saved_tensors
        of_out, of_gate_up, of_down = _dealt(parameters)
        block, g = ctx.block, grads[0]
        g_product, g_down = block.down.backward(g, product, u_down, of_down)
        gate, up = gate_up.chunk(2, dim=1)
        g_up = functional.silu(gate).mul_(g_product)
        g_gate = torch.ops.aten.silu_backward(g_product.mul_(up), gate)
        gn, g_gate_up = block.gate_up.backward(torch.cat([g_gate, g_up], dim=1), normed, u_gate_up, of_gate_up)
        gh = _norm_backward(gn, h, r, block.norms[1]).add_(g)
        g_found, g_out = block.out.backward(gh, found, u_out, of_out)
        return gh, g_found, None, *g_out, *g_gate_up, *g_down


def _dealt(parameters: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Deal the parameters of a block's second step: o, gate and up, down."""
    return parameters[:2], parameters[2:6], parameters[6:]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return torch.cat(list(parts), dim=dim) if len(parts) > 1 else parts[0]


def _norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """RMSNorm (arXiv:1910.07467): x r w with r = 1 / sqrt(mean(x^2) + eps) [S, 1], in float32; gives both."""
    wide = x.float()
    r = torch.rsqrt((wide * wide).mean(-1, keepdim=True).add_(norm.variance_epsilon))
    return (wide * r).to(x.dtype).mul_(norm.weight), r


def _norm_backward(g: Tensor, x: Tensor, r: Tensor, norm: Any) -> Tensor:
    wide, g_wide = x.float(), (g * norm.weight).float()
    mean = (g_wide * wide).mean(-1, keepdim=True)
    return torch.addcmul(g_wide, wide, mean * r * r, value=-1).mul_(r).to(x.dtype)


def _rotated_heads(qkv: Tensor, block: Block) -> Tensor:
    """The queries and keys of qkv as a view [S, H + H', D]."""
    n = block.n_query + block.n_key
    return qkv[:, : n * block.head_size].view(len(qkv), n, block.head_size)


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate halves of each head in place (arXiv:2104.09864): heads [S, N, D], cos and sin [S, 1, D / 2]."""
    a, b = heads.chunk(2, dim=-1)
    turned = torch.addcmul(a * cos, b, sin, value=-1)
    b.mul_(cos).addcmul_(a, sin)
    a.copy_(turned)
