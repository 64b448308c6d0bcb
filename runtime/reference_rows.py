"""The rows of a reference pack as token ids, written beside it, so that any box scores a file against the pack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgetune.errors import ArtifactError
from edgetune.runtime.accuracy import ScoredRow
from edgetune.runtime.engine import TokenRow, first_line
from edgetune.runtime.reference import DAMAGED

FILE = "rows.npz"


@dataclass(frozen=True)
class ReferenceRows:
    """Held-out rows, texts whose perplexity is measured, and the tokens that end an answer."""

    rows: tuple[ScoredRow, ...]  # without the target as text
    text_rows: tuple[TokenRow, ...]
    stop_ids: frozenset[int]

    @classmethod
    def of(cls, rows: Sequence[ScoredRow], text_rows: Sequence[TokenRow], stop_ids: Sequence[int]) -> ReferenceRows:
        return cls(tuple(ScoredRow(r.ids, r.start, "") for r in rows), tuple(text_rows), frozenset(stop_ids))

    def save(self, path: Path) -> None:
        """Write them as one compressed npz file: all ids one after the other, and what is given and scored of each."""
        all_rows: list[ScoredRow | TokenRow] = [*self.rows, *self.text_rows]
        ids = np.concatenate([np.array(row.ids, np.uint32) for row in all_rows])
        with path.open("wb") as stream:
            np.savez_compressed(
                stream, ids=ids if ids.max() >> 16 else ids.astype(np.uint16), n_rows=np.int64(len(self.rows)),
                lengths=np.array([len(row.ids) for row in all_rows], np.uint32),
                starts=np.array([row.start for row in all_rows], np.uint32),
                stop_ids=np.array(sorted(self.stop_ids), np.uint32),
            )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> ReferenceRows:
        """Read them again. Raises ArtifactError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                ids, lengths, starts = (data[name].tolist() for name in ("ids", "lengths", "starts"))
                n_rows, stop = int(data["n_rows"]), frozenset(data["stop_ids"].tolist())
            ends = np.cumsum(lengths).tolist()
            parts = [tuple(ids[end - length : end]) for end, length in zip(ends, lengths, strict=True)]
            rows = [ScoredRow(part, start, "") for part, start in zip(parts, starts, strict=True)]
        except DAMAGED as error:
            raise ArtifactError(f"{path} does not hold a pack's rows: {first_line(error)}") from error
        return cls(tuple(rows[:n_rows]), tuple(row.tokens for row in rows[n_rows:]), stop)
