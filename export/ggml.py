"""The quantizer of ggml, the library under llama.cpp, on rows in memory. For child processes: ggml aborts at faults."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.errors import StageError
from edgetune.ggml_types import named

ROWS = 2**18  # numbers that a thread takes at once


def _library() -> Any:
    require("llama_cpp")
    from llama_cpp import _ggml

    library = _ggml.libggml
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    return library


def floats(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Give rows as float32; int16 stands for bfloat16, which numpy lacks and which is the upper half of float32."""
    rows = np.ascontiguousarray(rows)
    if rows.dtype != np.int16:
        return rows.astype(np.float32, copy=False)
    wide = rows.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


class Quantizer:
    """Rounds rows to a type's blocks, each row by itself, in as many threads as are given."""

    def __init__(self, threads: int) -> None:
        self._library = _library()
        self._threads = ThreadPoolExecutor(threads)

    def n_bytes(self, kind: str, width: int) -> int:
        """Bytes of a row of so many columns."""
        return named(kind).row_bytes(width)

    def __call__(self, rows: NDArray[Any], kind: str, importance: NDArray[np.float32] | None) -> NDArray[Any]:
        """Give the bytes [R, n] of rows [R, C], see `floats`; `importance` [C] weighs each column's squared error.

        Raises StageError where a value is not finite, or ggml made bytes that it does not read.
        """
        n_rows, width = rows.shape
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        out = np.empty((n_rows, self.n_bytes(kind, width)), np.uint8)
        number = named(kind).number
        step = max(1, ROWS // width)

        def part(start: int) -> bool:
            some, made = floats(rows[start : start + step]), out[start : start + step]
            if not np.isfinite(some).all():
                raise StageError("it holds values that are not finite")
            given = weights.ctypes.data if weights is not None else None
            self._library.ggml_quantize_chunk(number, some.ctypes.data, made.ctypes.data, 0, len(some), width, given)
            return bool(self._library.ggml_validate_row_data(number, made.ctypes.data, made.nbytes))

        if not all(self._threads.map(part, range(0, n_rows, step))):
            raise StageError(f"ggml made {kind} blocks that are not valid")
        return out
