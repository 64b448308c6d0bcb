"""Training rows on disk: as they were read, and as they were rendered.

Memory holds where they stand. The files are in the folder for temporary files (`TMPDIR`) and have no name: nothing is
left of them, however a run ends.
"""

from __future__ import annotations

import json
import os
import struct
import tempfile
from array import array
from collections.abc import Iterator, Sequence
from typing import overload

import numpy as np

from edgetune.data.formats import Row
from edgetune.data.render import Rendered

_HEAD = struct.Struct("<qqq")  # tokens, start, line


class Spool:
    """Pieces of bytes in one temporary file, each found by its place."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="edgetune-")  # noqa: SIM115 - closed with the last row that is used
        self._ends = array("q", [0])
        self._unwritten = False

    def __len__(self) -> int:
        return len(self._ends) - 1

    def append(self, piece: bytes) -> int:
        """Keep a piece and give its place. Raises OSError where the disk is full."""
        self._file.write(piece)
        self._ends.append(self._ends[-1] + len(piece))
        self._unwritten = True
        return len(self) - 1

    def __getitem__(self, place: int) -> bytes:
        if self._unwritten:
            self._file.flush()
            self._unwritten = False
        start = self._ends[place]
        return os.pread(self._file.fileno(), self._ends[place + 1] - start, start)


class RowSpool:
    """Rows as they were read."""

    def __init__(self) -> None:
        self._pieces = Spool()

    def append(self, row: Row) -> int:
        values = [row.messages, row.text, row.line, row.tools, row.extras, sorted(row.muted), row.form]
        return self._pieces.append(json.dumps(values).encode())

    def __getitem__(self, place: int) -> Row:
        messages, text, line, tools, extras, muted, form = json.loads(self._pieces[place])
        turns = tuple((role, content) for role, content in messages)
        return Row(turns, text, line, tuple(tools), tuple(extras), frozenset(muted), form)


class RenderedRows(Sequence[Rendered]):
    """Rendered rows in the order of training, in which a row may come several times."""

    def __init__(self, pieces: Spool | None = None, order: array[int] | None = None) -> None:
        self._pieces = pieces if pieces is not None else Spool()
        self._order = order if order is not None else array("q")

    def write(self, row: Rendered) -> int:
        """Keep a row, which comes nowhere yet, and give its place."""
        ids, labels = np.asarray(row.ids, "<i4").tobytes(), bytes(row.labels)
        text = row.target_text.encode("utf-8", "surrogatepass")
        return self._pieces.append(_HEAD.pack(len(row.ids), row.start, row.line) + ids + labels + text)

    def come(self, places: Sequence[int]) -> None:
        """Let rows that were kept come next."""
        self._order.extend(places)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Rendered]:
        return map(self._read, self._order)

    @overload
    def __getitem__(self, index: int) -> Rendered: ...
    @overload
    def __getitem__(self, index: slice) -> RenderedRows: ...
    def __getitem__(self, index: int | slice) -> Rendered | RenderedRows:
        if isinstance(index, slice):
            return RenderedRows(self._pieces, self._order[index])
        return self._read(self._order[index])

    def _read(self, place: int) -> Rendered:
        piece = self._pieces[place]
        n, start, line = _HEAD.unpack_from(piece)
        ends = _HEAD.size + 4 * n, _HEAD.size + 5 * n
        ids = np.frombuffer(piece, "<i4", n, _HEAD.size).tolist()
        labels = map(bool, piece[ends[0] : ends[1]])
        return Rendered(tuple(ids), tuple(labels), start, piece[ends[1] :].decode("utf-8", "surrogatepass"), line)
