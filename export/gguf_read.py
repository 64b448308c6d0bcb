"""The tensors of a GGUF file, mapped from the disk, and their values. Shapes: R rows, C columns.

gguf-py's reader parses the whole vocabulary first, and refuses a type that it has no number for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.ggml_types import numbered
from edgetune.gguf_header import read_header, tensor_bytes

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it: `data` [R, n] are the bytes of its rows, of which `shape` begins with the number."""

    kind: str
    shape: tuple[int, ...]
    data: Bytes


def read_tensors(file: Path) -> dict[str, Stored]:
    """Map the tensors of a file by their names. Raises SourceError where it is cut or damaged."""
    header = read_header(file)
    mapped = np.memmap(file, np.uint8, "r")
    found = {}
    for tensor in header.tensors:
        shape, start = tensor.shape[::-1], header.data + tensor.offset
        rows = mapped[start : start + tensor_bytes(tensor)].reshape(shape[0], -1)
        found[tensor.name] = Stored(numbered(tensor.ggml_type).name, shape, rows)
    return found


def dequantize(kind: str, data: Bytes) -> Floats:
    """Give the values [R, C] that the bytes [R, n] of rows stand for."""
    rows = np.ascontiguousarray(data)
    if kind in _OWN:
        return _OWN[kind](rows)
    if kind in _FLOATS:
        return rows.view(_FLOATS[kind]).astype(np.float32, copy=False)
    known: Any = getattr(require("gguf").quants, kind)
    known.init_grid()
    found: Floats = known.dequantize_rows(rows)
    return found


def _q1_0(data: Bytes) -> Floats:
    """A scale and 128 signs a block."""
    scale, packed = _blocks(data, 18)
    signs = np.unpackbits(packed, axis=-1, bitorder="little").astype(np.float32) * 2 - 1
    found: Floats = (scale * signs).reshape(len(data), -1)
    return found


def _q2_0(data: Bytes) -> Floats:
    """A scale and 64 codes from -1 to 2 a block."""
    scale, packed = _blocks(data, 18)
    codes = (packed[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(*packed.shape[:-1], -1)
    found: Floats = (scale * (codes.astype(np.float32) - 1)).reshape(len(data), -1)
    return found


def _blocks(data: Bytes, size: int) -> tuple[Floats, Bytes]:
    blocks = data.reshape(len(data), -1, size)
    return np.ascontiguousarray(blocks[..., :2]).view("<f2").astype(np.float32), blocks[..., 2:]


_FLOATS = {"F32": "<f4", "F16": "<f2"}
_OWN: dict[str, Callable[[Bytes], Floats]] = {"Q1_0": _q1_0, "Q2_0": _q2_0}  # gguf-py has their numbers at best
