"""Rows laid end to end as one sequence: no padding is computed, and what all rows begin with is computed once.

Linear layers, norms and the output head see one row of S tokens: P shared ones, then each row's own. Attention alone
takes the rows apart again, through Transformers' attention interface; so a model that attends in another way than
plainly causal (windows, soft caps, sinks) is not packed.

Shapes: B rows, T own tokens of the longest, L tokens that a row sees, H heads, H' key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ATTENTION = "edgetune_packed"
SHORT = 256  # tokens that a row sees; beyond, the fused kernel's blocks pay
TOKENS, OWN = 32, 8  # packed tokens and those of the longest row come in multiples: a product of a new shape costs more


@dataclass(frozen=True)
class Layout:
    """Where the rows of a packed sequence lie."""

    n_prefix: int
    lengths: tuple[int, ...]  # own tokens of each row
    padded: Tensor  # [B * T] place among the own tokens of each token of the padded rows; 0 where there is none
    own: Tensor  # [S - P] place in the padded rows of each own token; 0 for those that only fill up the sequence
    mask: Tensor | None  # [T, P + T] what a row's own token sees; None without a prefix: causal

    @classmethod
    def of(
        cls, n_prefix: int, lengths: Sequence[int], device: torch.device | str = "cpu", n_tokens: int | None = None
    ) -> Layout:
        """Lay out rows with `lengths` own tokens behind `n_prefix` shared ones, in a sequence of `n_tokens`."""
        longest = multiple(max(lengths), OWN)
        n_filling = 0 if n_tokens is None else n_tokens - n_prefix - sum(lengths)
        inside = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]  # [B, T]
        own = inside.flatten().nonzero().flatten()
        padded = torch.zeros(inside.numel(), dtype=torch.long)
        padded[own] = torch.arange(len(own))
        own = torch.cat([own, own.new_zeros(n_filling)])
        mask = torch.ones(longest, n_prefix + longest, dtype=torch.bool).tril(n_prefix) if n_prefix else None
        return cls(
            n_prefix, tuple(lengths), padded.to(device), own.to(device), None if mask is None else mask.to(device)
        )

    def positions(self) -> Tensor:
        """Position ids [1, S]: each row goes on where the prefix ends."""
        n = self.n_prefix
        parts = [torch.arange(n), *(torch.arange(n, n + length) for length in self.lengths)]
        filling = torch.zeros(len(self.own) - sum(self.lengths), dtype=torch.long)
        return torch.cat([*parts, filling])[None].to(self.own.device)


def multiple(n: int, of: int) -> int:
    """Round up to a multiple."""
    return -(-n // of) * of


def shared_start(rows: Iterable[Sequence[int]], limit: int) -> int:
    """Give how many of the first `limit` tokens all rows share."""
    shared, first = max(limit, 0), None
    for row in rows:
        first = row[:shared] if first is None else first
        while row[:shared] != first[:shared]:
            shared -= 1
    return shared


def can_pack(model: nn.Module) -> bool:
    """Whether the model's attention is plainly causal and goes through Transformers' attention interface."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    plain = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    capped = getattr(config, "attn_logit_softcapping", None)
    return bool(getattr(model, "_supports_attention_backend", False)) and plain and not window and not capped


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Within the block the model attends by the `packed` layout that it is called with."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attend)
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    packed: Layout, scaling: float | None = None, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attend as Transformers asks for it: query [1, H, S, D], key and value [1, H', S, D] -> [1, S, H, D]."""
    heads = torch.cat([query[0], key[0], value[0]]).transpose(0, 1)
    return attention(heads, query.shape[1], key.shape[1], packed, scaling, dropout)[None], None


def attention(
    heads: Tensor, n_query: int, n_key: int, packed: Layout, scale: float | None, dropout: float = 0.0
) -> Tensor:
    """Attend within each row and to the prefix: queries, keys and values [S, H + 2 H', D] -> [S, H, D]."""
    if torch.is_autocast_enabled(heads.device.type):  # rotation leaves queries and keys wider than their products
        heads = heads.to(torch.get_autocast_dtype(heads.device.type))
    n, sizes = packed.n_prefix, [n_query, n_key, n_key]
    prefix, own = torch.split(heads, [n, len(heads) - n])
    rows = own.index_select(0, packed.padded).view(len(packed.lengths), -1, *own.shape[1:]).transpose(1, 2)
    q, k, v = torch.split(rows, sizes, dim=1)  # [B, H, T, D]
    if n:
        q0, k0, v0 = torch.split(prefix.transpose(0, 1)[None], sizes, dim=1)  # [1, H, P, D]
        k = torch.cat([k0.expand(len(k), -1, -1, -1), k], dim=2)
        v = torch.cat([v0.expand(len(v), -1, -1, -1), v], dim=2)
    result = _attend_rows(q, k, v, packed.mask, scale, dropout).transpose(1, 2).flatten(0, 1)
    result = result.index_select(0, packed.own)  # [S - P, H, D]
    if n:
        head = _attend_rows(q0, k0, v0, None, scale, dropout)
        result = torch.cat([head[0].transpose(0, 1), result])
    return result


def _attend_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, dropout: float) -> Tensor:
    """Attend in each row: q [B, H, T, D], k and v [B, H', L, D] -> [B, H, T, D]; causal where mask [T, L] is None."""
    if q.device.type == "cpu" and not dropout and q.requires_grad and k.shape[2] <= SHORT:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril() if mask is None else mask
        short: Tensor = _ShortAttention.apply(q, k, v, seen, scale or q.shape[-1] ** -0.5)  # type: ignore[no-untyped-call]
        return short
    n_heads = q.shape[1]
    return functional.scaled_dot_product_attention(
        q, _for_each(k, n_heads), _for_each(v, n_heads), attn_mask=mask, is_causal=mask is None, scale=scale,
        dropout_p=dropout,
    )  # fmt: skip


class _ShortAttention(torch.autograd.Function):
    """Attention by plain products: for short rows on a CPU many times as fast as the fused kernel's backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
        n_groups = k.shape[0] * k.shape[1]  # query heads of one key/value head lie one after the other
        rows = q.reshape(n_groups, -1, q.shape[-1])  # [B H', H / H' T, D]
        keys, values = k.reshape(n_groups, *k.shape[2:]), v.reshape(n_groups, *v.shape[2:])  # [B H', L, D]
        scores = torch.bmm(rows, keys.transpose(1, 2)).float().mul_(scale)
        scores.view(n_groups, -1, *seen.shape).masked_fill_(~seen, -torch.inf)
        p = torch.softmax(scores, dim=-1).to(q.dtype)
        ctx.save_for_backward(rows, keys, values, p)
        ctx.scale = scale
        return torch.bmm(p, values).view(q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, values, p = ctx.saved_tensors
        g = grads[0].reshape(rows.shape)
        gp = torch.bmm(g, values.transpose(1, 2))
        gs = (gp - (gp * p).sum(-1, keepdim=True)).mul_(p).mul_(ctx.scale)
        shape, shared = grads[0].shape, (grads[0].shape[0], -1, *keys.shape[1:])
        gq, gk, gv = torch.bmm(gs, keys), torch.bmm(gs.transpose(1, 2), rows), torch.bmm(p.transpose(1, 2), g)
        return gq.view(shape), gk.view(shared), gv.view(shared), None, None


def _for_each(x: Tensor, n_heads: int) -> Tensor:
    """Repeat shared keys or values for every query head: [B, H', T, D] -> [B, H, T, D]."""
    return x.repeat_interleave(n_heads // x.shape[1], dim=1) if n_heads != x.shape[1] else x
