"""What vLLM's kernels take of a quantized checkpoint, told from its scheme and shapes alone. Nothing was run on vLLM.

The numbers are vLLM's own (marlin_utils.py: 64 rows, 128 columns, groups of 32, 64, 128 or the row; gptq.py: 2, 3, 4,
8 bits; compressed_tensors_wNa16.py: 4, 8 bits). Shapes: R out-features, C in-features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgetune.compress.scheme import Scheme

MARLIN_ROWS, MARLIN_COLUMNS, MARLIN_GROUPS, MARLIN_BITS = 64, 128, (-1, 32, 64, 128), (4, 8)
SAYS = {"reads": "vLLM would not load it", "marlin": "Marlin, vLLM's fast kernel, would not run it"}
READ_BITS = {"gptq": (2, 3, 4, 8), "compressed-tensors": MARLIN_BITS}


def broken_rules(form: str, schemes: Sequence[Scheme], shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[str]]:
    """Give what keeps vLLM from reading the checkpoint, and what keeps Marlin, its fast kernel, from running it.

    `schemes` are those that some layer has, or may get.
    """
    reads, marlin = [], []
    for bits in sorted({scheme.bits for scheme in schemes}):
        if bits not in READ_BITS[form]:
            known = ", ".join(map(str, READ_BITS[form]))
            reads.append(f"{form} of {bits} bits; vLLM reads {known}")
        if bits not in MARLIN_BITS:
            marlin.append(f"{bits} bits; it takes 4 and 8")
    sizes = sorted({scheme.group_size for scheme in schemes} - set(MARLIN_GROUPS))
    marlin += [f"group_size {size}; it takes -1, 32, 64 and 128" for size in sizes]
    if form == "gptq" and not all(scheme.sym for scheme in schemes):
        marlin.append("zero points; of GPTQ it takes sym: true")
    for name, (R, C) in shapes.items():
        if R % MARLIN_ROWS or C % MARLIN_COLUMNS:
            marlin.append(
                f"{name} is {R} x {C}; it takes rows in multiples of {MARLIN_ROWS}, columns of {MARLIN_COLUMNS}"
            )
            break
    return {"reads": reads, "marlin": marlin}
