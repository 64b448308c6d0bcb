"""What a mixture was made of, exactly: the source, row numbers and digests that go with the adapter.

It tells what was drawn. Of these rows training sets some aside to watch itself by, and leaves out their copies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from edgetune.artifact import file_digest, list_digest, write_text
from edgetune.data.formats import Row
from edgetune.data.mixture import Composed, Entry
from edgetune.recipe_data import Data

FILE = "mixture.json"


class SourceRows(BaseModel):
    """What one source gave. Row numbers are lines of a text file, else rows, from 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    path: str
    sha256: str | None  # of the file; None for folders and hub sets
    formats: dict[str, int]  # rows by the format that was found
    found: int
    used: int  # different rows that were drawn
    drawn: int  # rows, copies counted, before some are set aside to watch training
    rows: str  # "1-3 7 9x2": rows 1 to 3 and 7 once, row 9 twice
    digest: str  # of the drawn rows' content, in order


class Mixture(BaseModel):
    """Every drawn row's origin."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sources: list[SourceRows]
    too_long: int  # rows left out, since they are longer than max_length
    leaks: int  # rows left out, since their prompt is in a group that is held out
    split: list[SourceRows]  # the held-out rows, where they were taken out of the training rows
    settings: dict[str, object]  # mix and split, as the recipe has them

    @property
    def summary(self) -> list[dict[str, object]]:
        """What the manifest says of it beside the file's digest."""
        return [
            {"path": one.path, "rows": one.drawn, "different": one.used, "digest": one.digest} for one in self.sources
        ]

    def write(self, folder: Path) -> None:
        write_text(folder / FILE, self.model_dump_json(indent=1) + "\n")


def describe(data: Data, composed: Composed, kept: Sequence[Entry]) -> Mixture:
    """Say what a mixture is made of; `kept` are the entries that were not too long."""
    settings = {
        name: part.model_dump() for name, part in (("mix", data.mix), ("split", data.split)) if part is not None
    }
    return Mixture(
        sources=_origins(data, composed.found, kept),
        too_long=len(composed.train) - len(kept),
        leaks=composed.leaks,
        split=_origins(data, composed.found, composed.split) if data.split is not None else [],
        settings=settings,
    )


def spell(lines: Sequence[int]) -> str:
    """Row numbers in short: runs of single rows as "1-3", copies as "9x2"."""
    copies = sorted(Counter(lines).items())
    runs = groupby(enumerate(copies), key=lambda at: (at[1][0] - at[0], at[1][1]))
    words = []
    for (_, n), members in runs:
        numbers = [line for _, (line, _) in members]
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        words.append(span if n == 1 else f"{span}x{n}")
    return " ".join(words)


def content_digest(rows: Iterable[Row]) -> str:
    """Digest of what rows say, wherever they stand."""
    return list_digest([row.as_dicts, row.text, list(row.tools), sorted(row.muted)] for row in rows)


def _origins(data: Data, found: Sequence[int], entries: Sequence[Entry]) -> list[SourceRows]:
    parts: list[list[Entry]] = [[] for _ in data.sources]
    for entry in entries:
        parts[entry.source].append(entry)
    return [_rows(source.path, n, part) for source, n, part in zip(data.sources, found, parts, strict=True)]


def _rows(path: str, found: int, entries: Sequence[Entry]) -> SourceRows:
    lines = [entry.line for entry in entries]
    file = Path(path)
    return SourceRows(
        path=path,
        sha256=file_digest(file) if file.is_file() else None,
        formats=dict(Counter(entry.form for entry in entries)),
        found=found,
        used=len(set(lines)),
        drawn=len(lines),
        rows=spell(lines),
        digest=content_digest(entry.row for entry in entries),
    )
