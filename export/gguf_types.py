"""Which ggml type each tensor of a GGUF file gets. Decided here, tensor by tensor; llama.cpp decides nothing.

The K-quants need rows in multiples of 256 and the others in multiples of 32. Where a row does not fit, llama.cpp
takes another type in silence; here the choice is made before, and named.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from edgetune.export.gguf_mixes import GPTQ_MIXES, MIXES, NARROW_MIXES, At, of_mix
from edgetune.ggml_types import named

BLOCK = {"F32": 1, "F16": 1, "BF16": 1, "Q8_0": 32, "Q5_1": 32, "Q5_0": 32, "IQ4_NL": 32, "Q4_1": 32, "Q4_0": 32}
BLOCK |= {"Q2_0": 64, "Q1_0": 128}
BLOCK |= dict.fromkeys(("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "TQ2_0", "TQ1_0"), 256)
BLOCK |= dict.fromkeys(
    ("IQ4_XS", "IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"), 256
)  # fmt: skip
PLAIN = ("F32", "F16", "BF16")  # written as they are, nothing to quantize
UNWEIGHED = (*PLAIN, "Q8_0", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0")  # llama.cpp rounds these without an importance matrix

# What stands in for a type whose block does not divide a row; Q5_1 for Q4_K loses less than llama.cpp's own Q5_0.
NARROW = {"Q6_K": "Q8_0", "Q5_K": "Q5_1", "Q4_K": "Q5_1"}
NARROW |= dict.fromkeys(("Q3_K", "Q2_K", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0"), "Q4_0")
NARROW |= {kind: "IQ4_NL" for kind in BLOCK if kind.startswith("IQ") and kind != "IQ4_NL"}


def choose_types(
    shapes: Mapping[str, Sequence[int]],
    target: str,
    *,
    gptq: bool = False,
    n_shared: int = 1,
    weighed: bool = False,
    given: Mapping[str, str] | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Give the ggml type of each tensor, and a line for each way in which it is not the target's own.

    `shapes` maps GGUF tensor names to [R, C] (or [C] for norms and biases, which stay F32); `gptq` says who rounds,
    `n_shared` how many query heads read one key/value head, `weighed` whether there is an importance matrix. Types in
    `given` were chosen before.
    """
    n_layers = 1 + max((int(m[1]) for name in shapes if (m := re.match(r"blk\.(\d+)\.", name))), default=-1)
    tied = "output.weight" not in shapes
    narrow = shapes["token_embd.weight"][-1] % 256 != 0
    types: dict[str, str] = {}
    replaced: Counter[tuple[int, str, str]] = Counter()
    n_matrices = sum(len(shape) > 1 for shape in shapes.values())
    for name, shape in shapes.items():
        if given and name in given:
            types[name] = given[name]
        elif len(shape) == 1 or name == "position_embd.weight":
            types[name] = "F32"
        elif target in PLAIN:
            types[name] = target
        else:
            layer = re.match(r"blk\.(\d+)\.", name)
            at = At(int(layer[1]) if layer else 0, n_layers, n_shared, weighed)
            asked = of_mix(MIXES[target], name, at, tied=tied)
            mix = (GPTQ_MIXES if gptq else NARROW_MIXES).get(target, MIXES[target]) if narrow else MIXES[target]
            types[name] = fitting(of_mix(mix, name, at, tied=tied), shape[-1])
            if types[name] != asked:
                replaced[shape[-1], types[name], asked] += 1
    lines = []
    for (width, found, asked), count in sorted(replaced.items()):
        why = "" if width % BLOCK[asked] else " (the other rows are no multiple of 256, so all get the same bits)"
        lines.append(f"{count} of {n_matrices} matrices have rows of {width}: {found} instead of {asked}{why}")
    return types, lines


def n_bytes(shapes: Mapping[str, Sequence[int]], types: Mapping[str, str]) -> int:
    """Give the bytes that tensors of these types take in a file."""
    known = {kind: named(kind) for kind in set(types.values())}
    return sum(known[types[name]].row_bytes(prod(shape)) for name, shape in shapes.items())


def fitting(wanted: str, width: int) -> str:
    """Give the type itself where its block divides the row, else what stands in for it, else F16."""
    for kind in (wanted, NARROW.get(wanted, wanted)):
        if width % BLOCK[kind] == 0:
            return kind
    return "F16"
