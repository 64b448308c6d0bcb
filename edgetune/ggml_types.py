"""ggml's types: what each is called, its number in a file, and its blocks.

They are gguf-py's tables, and one type that llama.cpp has and the gguf package of the index does not know yet.
"""

from __future__ import annotations

from typing import NamedTuple

from edgetune.backends import require


class GgmlType(NamedTuple):
    """A type of tensors."""

    name: str
    number: int
    columns: int  # of a block
    size: int  # bytes of a block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many columns."""
        return columns // self.columns * self.size


_LATER = (GgmlType("Q2_0", 42, 64, 18),)  # ggml-common.h, block_q2_0
FILE_TYPES = {"Q2_0": 41}  # llama.h, llama_ftype


def named(name: str) -> GgmlType:
    """Give a type by its name. Raises KeyError where there is none."""
    for found in _LATER:
        if found.name == name:
            return found
    gguf = require("gguf")
    kind = gguf.GGMLQuantizationType[name]
    return GgmlType(name, int(kind), *gguf.GGML_QUANT_SIZES[kind])


def numbered(number: int) -> GgmlType:
    """Give a type by its number. Raises ValueError where there is none."""
    for found in _LATER:
        if found.number == number:
            return found
    gguf = require("gguf")
    kind = gguf.GGMLQuantizationType(number)
    return GgmlType(kind.name, number, *gguf.GGML_QUANT_SIZES[kind])


def file_type(target: str) -> int:
    """Give llama.cpp's number for what a file mostly holds."""
    if target in FILE_TYPES:
        return FILE_TYPES[target]
    numbers = require("gguf").LlamaFileType
    return int(numbers.ALL_F32 if target == "F32" else numbers[f"MOSTLY_{target}"])
