"""Activations between two blocks: in memory up to a bound, beyond it in files of the work folder.

The bytes are the same wherever they lie. Files are mapped while they are read, so that
what is not in use takes no memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HELD_BYTES = 512 << 20  # of activations in memory


class Spill:
    """What all shelves of a walk have in memory together, and the folder for what is more; without one all is held."""

    def __init__(self, work: Path | None) -> None:
        self.folder = None if work is None else work / "activations"
        self.held = 0

    def takes(self, n_bytes: int) -> bool:
        """Tell whether so many more bytes stay in memory."""
        return self.folder is None or self.held + n_bytes <= HELD_BYTES

    def close(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class _File:
    """A tensor in a file."""

    path: Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def read(self) -> Tensor:
        flat = torch.from_file(str(self.path), shared=False, size=self.shape.numel(), dtype=self.dtype)
        return flat.view(self.shape).to(self.device)


class Shelf(MutableMapping[str, Tensor]):
    """Tensors by name."""

    def __init__(self, spill: Spill, name: str) -> None:
        self._spill, self._name = spill, name
        self._places: dict[str, Tensor | _File] = {}

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        return place.read() if isinstance(place, _File) else place

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        if name in self:
            del self[name]
        if self._spill.takes(tensor.nbytes):
            self._spill.held += tensor.nbytes
            self._places[name] = tensor
            return
        assert self._spill.folder is not None, "without a folder all is held"
        self._spill.folder.mkdir(exist_ok=True)
        path = self._spill.folder / f"{self._name}.{name}"
        tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tofile(path)
        self._places[name] = _File(path, tensor.shape, tensor.dtype, tensor.device)

    def __delitem__(self, name: str) -> None:
        place = self._places.pop(name)
        if isinstance(place, _File):
            place.path.unlink()  # who reads it still has its mapping
        else:
            self._spill.held -= place.nbytes

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._places))

    def __len__(self) -> int:
        return len(self._places)


class Batch:
    """A batch of rows between two blocks, and what each block is called with beside it."""

    def __init__(self, first_row: int, hidden: Tensor, block_kwargs: list[dict[str, Any]], spill: Spill) -> None:
        self.first_row, self.block_kwargs = first_row, block_kwargs
        self._streams = Shelf(spill, f"{first_row}.stream")
        self.inputs = Shelf(spill, f"{first_row}.float")  # what the float block shows each group of layers
        self.seen = Shelf(spill, f"{first_row}.seen")  # what the quantized one shows it
        self.hidden = hidden

    @property
    def hidden(self) -> Tensor:
        """The quantized model's stream [B, T, C]."""
        return self._streams["quantized"]

    @hidden.setter
    def hidden(self, found: Tensor) -> None:
        self._streams["quantized"] = found

    @property
    def unquantized(self) -> Tensor | None:
        """The float model's stream [B, T, C], where both are followed."""
        return self._streams.get("float")

    @unquantized.setter
    def unquantized(self, found: Tensor | None) -> None:
        if found is not None:
            self._streams["float"] = found
