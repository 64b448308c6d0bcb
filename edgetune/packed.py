"""Rows laid end to end as one sequence: no padding is computed, and what all rows begin with is computed once.

Linear layers, norms and the output head see one row of S tokens: P shared ones, then each row's own. Attention alone
takes the rows apart again, through Transformers' attention interface; so a model that attends in another way than
plainly causal (windows, soft caps, sinks) is not packed.

Shapes: B rows, T own tokens of the longest, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

ATTENTION = "edgetune_packed"


@dataclass(frozen=True)
class Layout:
    """Where the rows of a packed sequence lie."""

    n_prefix: int
    lengths: tuple[int, ...]  # own tokens of each row
    padded: Tensor  # [B * T] place among the own tokens of each token of the padded rows; 0 where there is none
    own: Tensor  # [S - P] place in the padded rows of each own token
    mask: Tensor | None  # [T, P + T] what a row's own token sees; None without a prefix: causal

    @classmethod
    def of(cls, n_prefix: int, lengths: Sequence[int], device: torch.device | str = "cpu") -> Layout:
        """Lay out rows with `lengths` own tokens behind `n_prefix` shared ones."""
        longest = max(lengths)
        inside = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]  # [B, T]
        own = inside.flatten().nonzero().flatten()
        padded = torch.zeros(inside.numel(), dtype=torch.long)
        padded[own] = torch.arange(len(own))
        mask = torch.ones(longest, n_prefix + longest, dtype=torch.bool).tril(n_prefix) if n_prefix else None
        return cls(
            n_prefix, tuple(lengths), padded.to(device), own.to(device), None if mask is None else mask.to(device)
        )

    def positions(self) -> Tensor:
        """Position ids [1, S]: each row goes on where the prefix ends."""
        parts = [torch.arange(self.n_prefix), *(torch.arange(self.n_prefix, self.n_prefix + n) for n in self.lengths)]
        return torch.cat(parts)[None].to(self.own.device)


def common_prefix(rows: Sequence[Sequence[int]], limit: int) -> int:
    """Give how many of the first `limit` tokens all rows share."""
    first = rows[0]
    for n in range(limit):
        if any(row[n] != first[n] for row in rows):
            return n
    return max(limit, 0)


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
    """Attend within each row and to the prefix: query [1, H, S, D], key and value [1, H', S, D] -> [1, S, H, D]."""
    groups = query.shape[1] // key.shape[1]
    n, n_own = packed.n_prefix, query.shape[2] - packed.n_prefix
    (q0, q), (k0, k), (v0, v) = (torch.split(x, [n, n_own], dim=2) for x in (query, key, value))

    def rows(x: Tensor) -> Tensor:
        """[1, H, S - P, D] -> [B, H, T, D]"""
        padded = x[0].transpose(0, 1).index_select(0, packed.padded)
        return padded.view(len(packed.lengths), -1, *padded.shape[1:]).transpose(1, 2)

    def behind(prefix: Tensor, own: Tensor) -> Tensor:
        """Put the shared keys or values [1, H', P, D] before each row's own, for every head."""
        own = rows(own)
        both = torch.cat([prefix.expand(len(own), -1, -1, -1), own], dim=2) if n else own
        return both.repeat_interleave(groups, dim=1) if groups > 1 else both

    found = functional.scaled_dot_product_attention(
        rows(q), behind(k0, k), behind(v0, v),
        attn_mask=packed.mask, is_causal=packed.mask is None, scale=scaling, dropout_p=dropout,
    )  # fmt: skip
    result = found.transpose(1, 2).flatten(0, 1).index_select(0, packed.own)  # [S - P, H, D]
    if n:
        head = functional.scaled_dot_product_attention(
            q0, k0.repeat_interleave(groups, dim=1), v0.repeat_interleave(groups, dim=1),
            is_causal=True, scale=scaling, dropout_p=dropout,
        )  # fmt: skip
        result = torch.cat([head[0].transpose(0, 1), result])
    return result[None], None
