"""Reads and checks the header of a GGUF file (version 2 and 3) in one pass, weights untouched.

gguf-py's reader takes seconds for a vocabulary of 50,000; planning and refusing must not.
Source of the layout: the GGUF specification of ggml.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgetune.errors import SourceError
from edgetune.ggml_types import numbered

MAX_ITEMS = 2**24  # keys, tensors, array lengths: more is damage
SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorInfo:
    """Shape in ggml's order (fastest dimension first), ggml type number, offset into the data section."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    metadata: dict[str, Any]  # arrays are given as their length
    tensors: list[TensorInfo]
    data: int  # byte at which the data section begins


class _Reader:
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size = stream, size

    def take(self, n: int) -> bytes:
        if n < 0 or self.stream.tell() + n > self.size:
            raise ValueError(f"{n} bytes wanted at byte {self.stream.tell()}, the file ends at {self.size}")
        return self.stream.read(n)

    def scalar(self, kind: int) -> Any:
        if kind not in SCALARS:
            raise ValueError(f"unknown value type {kind} at byte {self.stream.tell()}")
        layout = SCALARS[kind]
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.scalar(10)).decode("utf-8")

    def count(self, what: str) -> int:
        n: int = self.scalar(10)
        if n > MAX_ITEMS:
            raise ValueError(f"{n} {what} are not plausible")
        return n

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.scalar(kind)
        item, n = self.scalar(4), self.count("array items")
        if item == STRING:
            for _ in range(n):
                self.take(self.scalar(10))
        elif item in SCALARS:
            self.take(n * struct.calcsize(SCALARS[item]))
        else:
            raise ValueError(f"unknown array type {item}")
        return n


def read_header(path: Path) -> GgufHeader:
    """Read and check a header: every length, and that each tensor lies within the file.

    Raises SourceError in one line where the file is no GGUF file, or is cut or damaged.
    """
    try:
        with path.open("rb") as stream:
            return _read(_Reader(stream, path.stat().st_size), path.stat().st_size)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, struct.error, MemoryError) as error:
        raise SourceError(f"{path}: truncated or damaged GGUF file ({error}); get it again") from error


def _read(reader: _Reader, size: int) -> GgufHeader:
    if reader.take(4) != b"GGUF":
        raise ValueError("it does not begin with 'GGUF'")
    version = reader.scalar(4)
    if version not in (2, 3):
        raise ValueError(f"version {version}, 2 and 3 are known")
    n_tensors, n_keys = reader.count("tensors"), reader.count("keys")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar(4))
    tensors = []
    for _ in range(n_tensors):
        name, n_dims = reader.string(), reader.scalar(4)
        if not 1 <= n_dims <= 4:
            raise ValueError(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(reader.scalar(10) for _ in range(n_dims))
        tensors.append(TensorInfo(name, shape, reader.scalar(4), reader.scalar(10)))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise ValueError(f"alignment {alignment}")
    start = math.ceil(reader.stream.tell() / alignment) * alignment
    for tensor in tensors:
        if start + tensor.offset + tensor_bytes(tensor) > size:
            raise ValueError(f"tensor {tensor.name} ends behind the end of the file")
    return GgufHeader(metadata, tensors, start)


def tensor_bytes(tensor: TensorInfo) -> int:
    """Give the bytes that a tensor takes in the file."""
    return numbered(tensor.ggml_type).row_bytes(math.prod(tensor.shape))
