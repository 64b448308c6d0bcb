"""The blocks of ggml's quantized types, taken apart into codes and the grid that they stand on, and put together again.

`w = scale * code - minimum`; a scale and a minimum are shared by `Grid.group` columns. How the bits lie is that of
ggml-common.h and ggml-quants.c. Shapes: R rows, C columns, G groups, n blocks of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# type -> bytes of a block, bits of a code, whether a minimum is stored
_SMALL = {"Q4_0": (18, 4, False), "Q4_1": (20, 4, True), "Q5_0": (22, 5, False), "Q5_1": (24, 5, True)}
_SUPER = {"Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
CODED = (*_SMALL, *_SUPER)  # the types whose codes can be chosen anew


@dataclass(frozen=True)
class Grid:
    """What the codes of a matrix stand for."""

    scale: Floats  # [R, G]
    minimum: Floats  # [R, G]
    max_code: int

    def dequantize(self, codes: Bytes) -> Floats:
        """Give the weights [R, C] of codes [R, C]."""
        group = codes.shape[1] // self.scale.shape[1]
        found: Floats = self.scale.repeat(group, 1) * codes - self.minimum.repeat(group, 1)
        return found


def read_blocks(kind: str, data: NDArray[Any], columns: int) -> tuple[Bytes, Grid]:
    """Give the codes [R, C] and the grid of a tensor's bytes [R, ...]. `kind` is one of CODED, or Q8_0."""
    rows = np.ascontiguousarray(data).view(np.uint8).reshape(len(data), -1)
    if kind == "Q8_0":
        return _read_q8(rows.reshape(len(rows), columns // 32, 34))
    if kind in _SMALL:
        return _read_small(kind, rows, columns)
    blocks = rows.reshape(len(rows), columns // 256, _SUPER[kind])
    return _read_q6(blocks) if kind == "Q6_K" else _read_q45(kind, blocks)


def with_codes(kind: str, data: NDArray[Any], codes: Bytes) -> Bytes:
    """Give the bytes [R, ...] of a tensor with other codes [R, C] on the same grid."""
    rows = np.array(data).view(np.uint8).reshape(len(data), -1)
    R, C = codes.shape
    if kind in _SMALL:
        size, bits, _ = _SMALL[kind]
        blocks, q = rows.reshape(R, C // 32, size), codes.reshape(R, C // 32, 32)
        blocks[..., -16:] = q[..., :16] & 15 | (q[..., 16:] & 15) << 4
        if bits == 5:
            blocks[..., -20:-16] = np.packbits(q >> 4, axis=-1, bitorder="little")
    elif kind == "Q6_K":
        blocks, q = rows.reshape(R, C // 256, 210), codes.reshape(R, C // 256, 2, 4, 32)
        low, high = q & 15, q >> 4
        blocks[..., :128] = (low[..., :2, :] | low[..., 2:, :] << 4).reshape(R, -1, 128)
        blocks[..., 128:192] = np.bitwise_or.reduce(high << np.array([0, 2, 4, 6], np.uint8)[:, None], axis=-2).reshape(
            R, -1, 64
        )
    else:
        blocks, q = rows.reshape(R, C // 256, _SUPER[kind]), codes.reshape(R, C // 256, 4, 2, 32)
        blocks[..., -128:] = (q[..., 0, :] & 15 | (q[..., 1, :] & 15) << 4).reshape(R, -1, 128)
        if kind == "Q5_K":  # bit i of byte j is the fifth bit of column 32 i + j
            bits_of_byte = (codes.reshape(R, C // 256, 8, 32) >> 4).swapaxes(-1, -2)
            blocks[..., 16:48] = np.packbits(bits_of_byte, axis=-1, bitorder="little")[..., 0]
    return rows


def make_blocks(kind: str, codes: Bytes, grid: Grid) -> Bytes:
    """Give the bytes [R, ...] of codes [R, C] on a grid [R, C / 32]; `kind` has blocks of 32 columns, or is Q8_0.

    Scales are float16 values. Where the type stores no minimum it is the scale times the middle code.
    """
    R, C = codes.shape
    size = 34 if kind == "Q8_0" else _SMALL[kind][0]
    blocks = np.zeros((R, C // 32, size), np.uint8)
    blocks[..., :2] = _two_bytes(grid.scale)
    if kind == "Q8_0":
        blocks[..., 2:] = codes.reshape(R, C // 32, 32) ^ np.uint8(128)  # int8, counted from -128
        return blocks.reshape(R, -1)
    if _SMALL[kind][2]:
        blocks[..., 2:4] = _two_bytes(-grid.minimum)
    return with_codes(kind, blocks.reshape(R, -1), codes)


def _two_bytes(values: Floats) -> Bytes:
    """Write float16, little-endian, along a new last axis."""
    return np.ascontiguousarray(values).astype("<f2")[..., None].view(np.uint8)


def _read_small(kind: str, rows: Bytes, columns: int) -> tuple[Bytes, Grid]:
    size, bits, has_minimum = _SMALL[kind]
    blocks = rows.reshape(len(rows), columns // 32, size)
    scale = _half(blocks[..., :2])
    codes = np.concatenate([blocks[..., -16:] & 15, blocks[..., -16:] >> 4], axis=-1)
    if bits == 5:
        codes |= np.unpackbits(blocks[..., -20:-16], axis=-1, bitorder="little") << 4
    minimum = -_half(blocks[..., 2:4]) if has_minimum else scale * 2 ** (bits - 1)
    return codes.reshape(len(rows), columns), Grid(scale, minimum.astype(np.float32), 2**bits - 1)


def _read_q8(blocks: Bytes) -> tuple[Bytes, Grid]:
    scale = _half(blocks[..., :2])
    codes = blocks[..., 2:] ^ np.uint8(128)  # int8, counted from -128
    return codes.reshape(len(blocks), -1), Grid(scale, 128 * scale, 255)


def _read_q6(blocks: Bytes) -> tuple[Bytes, Grid]:
    R, n, _ = blocks.shape
    low = blocks[..., :128].reshape(R, n, 2, 2, 32)
    high = blocks[..., 128:192].reshape(R, n, 2, 1, 32)
    codes = np.concatenate([low & 15, low >> 4], axis=-2)
    codes |= (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
    scale = (_half(blocks[..., 208:210])[..., None] * blocks[..., 192:208].view(np.int8)).reshape(R, -1)
    return codes.reshape(R, -1), Grid(scale.astype(np.float32), (32 * scale).astype(np.float32), 63)


def _read_q45(kind: str, blocks: Bytes) -> tuple[Bytes, Grid]:
    R, n, _ = blocks.shape
    packed = blocks[..., 4:16]
    first, second, mixed = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    # six bits each: the first four lie alone, of the last four the upper two bits lie above the first ones
    scales = np.concatenate([first & 63, mixed & 15 | first >> 6 << 4], axis=-1)
    minima = np.concatenate([second & 63, mixed >> 4 | second >> 6 << 4], axis=-1)
    low = blocks[..., -128:].reshape(R, n, 4, 1, 32)
    codes = np.concatenate([low & 15, low >> 4], axis=-2).reshape(R, n, 8, 32)
    if kind == "Q5_K":
        high = np.unpackbits(blocks[..., 16:48, None], axis=-1, bitorder="little")  # [R, n, 32, 8]
        codes |= high.swapaxes(-1, -2) << 4
    scale = (_half(blocks[..., :2])[..., None] * scales).reshape(R, -1).astype(np.float32)
    minimum = (_half(blocks[..., 2:4])[..., None] * minima).reshape(R, -1).astype(np.float32)
    return codes.reshape(R, -1), Grid(scale, minimum, 15 if kind == "Q4_K" else 31)


def _half(two_bytes: Bytes) -> Floats:
    """Read little-endian float16 from the last axis, which goes."""
    return np.ascontiguousarray(two_bytes).view("<f2")[..., 0].astype(np.float32)
