"""Rows read over a cache that keeps what all of them begin with: ONNX Runtime's and TensorRT's way of scoring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

from edgetune.runtime.engine import TokenRow, common_prefix


class Kept(Protocol):
    """A key/value cache whose content so far can be kept and gone back to."""

    def clear(self) -> None: ...

    def keep(self) -> None: ...

    def rewind(self) -> None: ...


class KeptPrefix(ABC):
    """An engine that reads a shared beginning once. It holds `_n_past` tokens, which `_reader` has put there."""

    _n_past: int
    _reader: object

    @property
    @abstractmethod
    def _kept(self) -> Kept: ...

    @abstractmethod
    def _skip(self, ids: Sequence[int]) -> None:
        """Append tokens whose logits nobody reads."""

    def _forget(self, reader: object) -> None:
        self._n_past, self._reader = 0, reader
        self._kept.clear()

    def _behind_prefix(self, rows: Sequence[TokenRow]) -> Iterator[tuple[TokenRow, int]]:
        """Give each row, and how many of its first tokens the cache holds at that moment: those that all begin with."""
        if not rows:
            return
        n_shared = common_prefix(rows)
        reader = object()
        for row in rows:
            if self._reader is not reader:  # at first, and where the caller used the engine in between
                self._forget(reader)
                if n_shared:
                    self._skip(row.ids[:n_shared])
                self._kept.keep()
            self._n_past = n_shared
            self._kept.rewind()
            yield row, n_shared
