"""A safetensors file whose tensors come one by one, byte for byte what the library writes of all of them at once.

Its order is part of its bytes: falling alignment of the dtype, then the name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

# The library's dtypes in the order in which it writes them, and their names.
DTYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
COPIED = 16 << 20  # bytes at a time


class TensorFile:
    """Collects tensors in a file beside `path` and puts them in order when the block ends well."""

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        self.path, self._metadata = path, metadata
        self._beside = path.with_suffix(".spool")
        self._found: dict[str, tuple[torch.dtype, list[int], int, int]] = {}  # and start and end in the spool

    def __enter__(self) -> TensorFile:
        self._spool = self._beside.open("w+b")
        return self

    def add(self, name: str, parts: Iterable[Tensor]) -> None:
        """Take in a tensor, whole or in parts along its first axis."""
        start, rows, first = self._spool.tell(), 0, None
        for part in parts:
            first = part if first is None else first
            rows += part.shape[0] if part.ndim else 0
            part.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(self._spool)
            self._spool.seek(0, 2)
        assert first is not None, f"{name} has no part"
        shape = [rows, *first.shape[1:]] if first.ndim else []
        self._found[name] = (first.dtype, shape, start, self._spool.tell())

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._write()
        finally:
            self._spool.close()
            self._beside.unlink()

    def _write(self) -> None:
        ranks = list(DTYPES)
        names = sorted(self._found, key=lambda name: (ranks.index(self._found[name][0]), name))
        header: dict[str, Any] = {"__metadata__": self._metadata}
        at = 0
        for name in names:
            dtype, shape, start, end = self._found[name]
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [at, at := at + end - start]}
        head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        with self.path.open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            for name in names:
                _, _, start, end = self._found[name]
                self._spool.seek(start)
                while start < end:
                    start += out.write(self._spool.read(min(COPIED, end - start)))
