"""Integers of a GPTQ checkpoint that lie in a GGUF file as they are, where a type of ggml has their grid.

`w = scale * (q - zero_point)` in groups of 32 columns, or of a multiple of 32, is what Q4_0, Q5_0 and Q8_0 hold for a
zero point in the middle, bit for bit, and Q4_1 and Q5_1 for any other, but for the minimum, a float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.export.gguf_blocks import Grid, make_blocks

if TYPE_CHECKING:
    from edgetune.compress.scheme import Quantized
    from edgetune.export.gguf_families import Change
    from edgetune.recipe import Gptq, Rtn

COLUMNS = 32  # of a block of these types
SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}  # by bits
ASYMMETRIC = {4: "Q4_1", 5: "Q5_1"}
MINIMUM_ERROR = 1e-3  # relative, of a whole matrix: what float16 makes of minima


@dataclass(frozen=True)
class Kept:
    """A layer's integers, and the type that holds them."""

    kind: str
    layer: Quantized

    @property
    def error(self) -> float:
        """How far a matrix may lie from the integers, relative to its norm."""
        return MINIMUM_ERROR if self.kind in ASYMMETRIC.values() else 0.0

    def blocks(self, moved: Change | None, model_config: Mapping[str, Any]) -> NDArray[np.uint8]:
        """Give the bytes [R, ...] of the layer in a file, its rows in the file's order."""
        layer, n = self.layer, self.layer.q.shape[1] // COLUMNS
        scale = layer.scales.float().repeat_interleave(n // layer.scales.shape[1], 1)  # [R, blocks of a row]
        zero = layer.zero_point.float().repeat_interleave(n // layer.scales.shape[1], 1)
        parts: list[NDArray[Any]] = [part.numpy() for part in (layer.q, scale, scale * zero)]
        if moved is not None:
            parts = [moved.there(part, model_config) for part in parts]
        codes, scales, minima = parts
        return make_blocks(self.kind, codes, Grid(scales, minima, int(codes.max(initial=0))))


def kept_layers(folder: Path) -> dict[str, Kept | None]:
    """Give the layers of a checkpoint by the name of their weight; None where no type holds one, or it is corrected.

    Raises as `read_layers`.
    """
    from edgetune.compress.checkpoint import read_layers, stored_bits
    from edgetune.compress.correction import read_correction

    bits_of, corrected = stored_bits(folder), read_correction(folder)
    found: dict[str, Kept | None] = {}
    for name, layer in read_layers(folder).items():
        kind = None if name in corrected else holding(layer, bits_of(name))
        found[f"{name}.weight"] = None if kind is None else Kept(kind, layer)
    return found


def holding(layer: Quantized, bits: int) -> str | None:
    """Name the type that holds a layer's integers and grid; None where there is none."""
    import torch

    C, G = layer.q.shape[1], layer.scales.shape[1]
    if C % COLUMNS or G == 0 or (C // G) % COLUMNS or C % G:
        return None
    if not torch.equal(layer.g_idx, torch.arange(C, dtype=layer.g_idx.dtype) // (C // G)):
        return None
    if bool((layer.zero_point == 2 ** (bits - 1)).all()):
        return SYMMETRIC.get(bits)
    largest = float((layer.scales.float() * layer.zero_point).abs().max())
    return ASYMMETRIC.get(bits) if largest <= float(np.finfo(np.float16).max) else None


def planned(made: Rtn | Gptq | None) -> str | None:
    """Name the type that will hold all that such a step makes; None where there is no such type."""
    if made is None or made.recover is not None or made.allocate is not None:
        return None
    if made.group_size != -1 and made.group_size % COLUMNS:
        return None
    return (SYMMETRIC if made.sym else ASYMMETRIC).get(made.bits)
