"""The quantizer of ggml, the library under llama.cpp, on rows in memory. For child processes: ggml aborts at faults."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.errors import StageError

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


class Quantizer:
    """Rounds rows to a type's blocks, each row by itself, in as many threads as are given."""

    def __init__(self, threads: int) -> None:
        self._library, self._gguf = _library(), require("gguf")
        self._threads = ThreadPoolExecutor(threads)

    def n_bytes(self, kind: str, width: int) -> int:
        """Bytes of a row of so many columns."""
        block, size = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType[kind]]
        return int(width // block * size)

    def __call__(self, rows: NDArray[np.float32], kind: str, importance: NDArray[np.float32] | None) -> NDArray[Any]:
        """Give the bytes [R, n] of rows [R, C]; `importance` [C] weighs the squared error of each column.

        Raises StageError where ggml made bytes that it does not read.
        """
        rows = np.ascontiguousarray(rows, np.float32)
        n_rows, width = rows.shape
        weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
        out = np.empty((n_rows, self.n_bytes(kind, width)), np.uint8)
        number = int(self._gguf.GGMLQuantizationType[kind])
        step = max(1, ROWS // width)

        def part(start: int) -> bool:
            some, made = rows[start : start + step], out[start : start + step]
            given = weights.ctypes.data if weights is not None else None
            self._library.ggml_quantize_chunk(number, some.ctypes.data, made.ctypes.data, 0, len(some), width, given)
            return bool(self._library.ggml_validate_row_data(number, made.ctypes.data, made.nbytes))

        if not all(self._threads.map(part, range(0, n_rows, step))):
            raise StageError(f"ggml made {kind} blocks that are not valid")
        return out
