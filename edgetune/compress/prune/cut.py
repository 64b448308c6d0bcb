"""Cuts the tensors of a model down to what stays, to the logits of the whole model with the rest masked.

Fewer channels of Qwen3 come only near to them: `rms_norm_eps` grows for the norms of the residual stream, and Qwen3's
norms of heads, q_norm and k_norm, read it too. Which axis of a tensor counts what is data, in `AXES`.
Shapes: R out-features, C in-features, D head size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

# Module -> what its weight's axes count. None: an axis that is never cut. A bias has the first axis of its weight.
AXES: dict[str, tuple[str | None, ...]] = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key", "hidden"),
    "self_attn.v_proj": ("key", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "self_attn.q_norm": (None,),
    "self_attn.k_norm": (None,),
    "mlp.gate_proj": ("neuron", "hidden"),
    "mlp.up_proj": ("neuron", "hidden"),
    "mlp.down_proj": ("hidden", "neuron"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
    "model.embed_tokens": ("token", "hidden"),
    "model.norm": ("hidden",),
    "lm_head": ("token", "hidden"),
}
NORMS = ("input_layernorm", "post_attention_layernorm", "model.norm")


@dataclass(frozen=True)
class Keep:
    """What stays: blocks, and within each neurons and key/value groups; channels of the residual stream; tokens.

    None for a width that is not cut.
    """

    layers: Sequence[int]
    neurons: Mapping[int, Tensor] | None  # block -> places
    groups: Mapping[int, Tensor] | None
    hidden: Tensor | None
    tokens: Tensor | None = None


def cut(
    state: Mapping[str, Tensor], keep: Keep, *, head_size: int, queries_per_group: int
) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of the pruned model by name, one after the other.

    A norm over fewer channels divides by a smaller mean; its weight is scaled by sqrt(C' / C)^-1 to make up for it,
    so that the numbers are those of the whole model in which the other channels are zero.
    """
    place = {old: new for new, old in enumerate(keep.layers)}
    for name in state:
        module, _, kind = name.rpartition(".")
        layer = re.match(r"model\.layers\.(\d+)\.(.+)$", module)
        if layer is not None and int(layer[1]) not in place:
            continue
        index = int(layer[1]) if layer else None
        inner = layer[2] if layer else module
        assert inner in AXES, name
        tensor = state[name]
        axes = AXES[inner] if kind == "weight" else AXES[inner][:1]
        part = tensor
        for axis, counts in enumerate(axes):
            places = _places(counts, index, keep, head_size, queries_per_group)
            if places is not None:
                part = part.index_select(axis, places.to(part.device))
        if inner in NORMS and keep.hidden is not None:
            part = (part.float() * sqrt(len(tensor) / len(part))).to(part.dtype)
        renamed = name if index is None else name.replace(f".{index}.", f".{place[index]}.", 1)
        yield renamed, part.contiguous()


def _places(counts: str | None, index: int | None, keep: Keep, head_size: int, queries_per_group: int) -> Tensor | None:
    """Places that stay along an axis, None where all do."""
    if counts == "hidden":
        return keep.hidden
    if counts == "token":
        return keep.tokens
    if counts is None or index is None:
        return None
    if counts == "neuron":
        return None if keep.neurons is None else keep.neurons[index]
    if keep.groups is None:
        return None
    rows = head_size * (queries_per_group if counts == "query" else 1)  # of one group
    return (keep.groups[index][:, None] * rows + torch.arange(rows)).flatten()
