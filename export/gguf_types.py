"""Which ggml type each tensor of a GGUF file gets. Decided here, tensor by tensor; llama.cpp decides nothing.

The K-quants need rows in multiples of 256 and the others in multiples of 32. Where a row does not fit, llama.cpp
takes another type in silence; here the choice is made before, and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCK = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q5_1": 32, "Q5_0": 32, "IQ4_NL": 32, "Q4_1": 32, "Q4_0": 32}
BLOCK |= {"Q6_K": 256, "Q5_K": 256, "Q4_K": 256}
PLAIN = ("F32", "F16", "BF16")  # written as they are, nothing to quantize
UNWEIGHED = (*PLAIN, "Q8_0")  # llama.cpp rounds these without an importance matrix


@dataclass(frozen=True)
class Mix:
    """The types of one target: most matrices, those that suffer most, and the output head (or the tied embedding)."""

    base: str
    more: str  # value and down projections of the layers that `_more_bits` picks
    head: str
    embedding: str  # where it is not tied to the head
    down: str | None = None  # every down projection, where not as `base` and `more` say
    qkv: str | None = None  # a joint projection of queries, keys and values


# As llama.cpp mixes them (llama-quant.cpp, llama_tensor_get_type_impl).
MIXES: dict[str, Mix] = {
    "Q8_0": Mix("Q8_0", "Q8_0", "Q8_0", "Q8_0"),
    "Q6_K": Mix("Q6_K", "Q6_K", "Q6_K", "Q6_K"),
    "Q5_K_M": Mix("Q5_K", "Q6_K", "Q6_K", "Q5_K", qkv="Q6_K"),
    "Q4_K_M": Mix("Q4_K", "Q6_K", "Q6_K", "Q4_K", qkv="Q5_K"),
    "Q4_1": Mix("Q4_1", "Q4_1", "Q6_K", "Q4_1"),
    "Q4_0": Mix("Q4_0", "Q4_0", "Q6_K", "Q4_0"),
}

# Where the hidden size is no multiple of 256, most matrices cannot take a K-quant. llama.cpp then mixes Q5_0, Q4_K and
# a head of Q8_0; about six bits everywhere cost as many bytes and half the KL divergence. Where GPTQ chooses the codes,
# Q5_0 does, which llama.cpp reads nearly twice as fast (docs/decisions.md).
NARROW_MIXES: dict[str, Mix] = {
    "Q5_K_M": Mix("Q5_1", "Q8_0", "Q8_0", "Q5_1", down="Q6_K"),
    "Q4_K_M": Mix("Q5_1", "Q8_0", "Q5_1", "Q5_1", down="Q6_K"),
}
GPTQ_MIXES = NARROW_MIXES | {"Q4_K_M": Mix("Q5_0", "Q5_0", "Q8_0", "Q5_0")}

# What stands in for a type whose block does not divide a row.
NARROW = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_1"}


def choose_types(
    shapes: Mapping[str, Sequence[int]], target: str, *, gptq: bool = False
) -> tuple[dict[str, str], list[str]]:
    """Give the ggml type of each tensor, and a line for each way in which it is not the target's own.

    `shapes` maps GGUF tensor names to [R, C] (or [C] for norms and biases, which stay F32); `gptq` says who rounds.
    """
    n_layers = 1 + max((int(m[1]) for name in shapes if (m := re.match(r"blk\.(\d+)\.", name))), default=-1)
    tied = "output.weight" not in shapes
    narrow = shapes["token_embd.weight"][-1] % 256 != 0
    types: dict[str, str] = {}
    replaced: Counter[tuple[int, str, str]] = Counter()
    n_matrices = sum(len(shape) > 1 for shape in shapes.values())
    for name, shape in shapes.items():
        if len(shape) == 1 or name == "position_embd.weight":
            types[name] = "F32"
        elif target in PLAIN:
            types[name] = target
        else:
            asked = _of_mix(MIXES[target], name, n_layers, tied)
            mix = (GPTQ_MIXES if gptq else NARROW_MIXES).get(target, MIXES[target]) if narrow else MIXES[target]
            types[name] = fitting(_of_mix(mix, name, n_layers, tied), shape[-1])
            if types[name] != asked:
                replaced[shape[-1], types[name], asked] += 1
    lines = []
    for (width, found, asked), count in sorted(replaced.items()):
        why = "" if width % BLOCK[asked] else " (the other rows are no multiple of 256, so all get the same bits)"
        lines.append(f"{count} of {n_matrices} matrices have rows of {width}: {found} instead of {asked}{why}")
    return types, lines


def fitting(wanted: str, width: int) -> str:
    """Give the type itself where its block divides the row, else what stands in for it, else F16."""
    for kind in (wanted, NARROW.get(wanted, wanted)):
        if width % BLOCK[kind] == 0:
            return kind
    return "F16"


def _of_mix(mix: Mix, name: str, n_layers: int, tied: bool) -> str:
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return mix.head
    if name == "token_embd.weight":
        return mix.embedding
    if mix.down and name.endswith("ffn_down.weight"):
        return mix.down
    if mix.qkv and name.endswith("attn_qkv.weight"):
        return mix.qkv
    layer = re.match(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight$", name)
    return mix.more if layer and _more_bits(int(layer[1]), n_layers) else mix.base


def _more_bits(layer: int, n_layers: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2
