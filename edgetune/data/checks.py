"""Refusals before the first step: leaks from held-out rows, rows without labels, rows that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgetune.data.formats import Row
from edgetune.data.render import Rendered
from edgetune.errors import DataError


def refuse_leaks(train: Sequence[Row], heldout: Sequence[Row], train_path: Path, heldout_path: Path) -> None:
    """Raise DataError where a held-out prompt is also a training prompt (case and whitespace aside)."""
    seen = {row.prompt.casefold(): row.line for row in train}
    leaks = [(row.line, seen[row.prompt.casefold()]) for row in heldout if row.prompt.casefold() in seen]
    if leaks:
        raise DataError(
            f"{heldout_path} line {leaks[0][0]} is also {train_path} line {leaks[0][1]} ({len(leaks)} such rows); "
            "remove them from the training rows"
        )


def fit(rows: Sequence[Rendered], max_length: int, path: Path) -> tuple[list[Rendered], int]:
    """Leave out rows that are longer than `max_length` tokens; gives the rest and how many were left out."""
    kept = [row for row in rows if len(row.ids) <= max_length]
    if not kept:
        shortest = min(len(row.ids) for row in rows)
        raise DataError(
            f"{path}: every row is longer than max_length={max_length} tokens (shortest {shortest}); raise it"
        )
    return kept, len(rows) - len(kept)


def refuse_untaught(rows: Sequence[Rendered], stop_ids: Sequence[int], path: Path | None = None) -> None:
    """Raise DataError where a row would teach nothing, or no row teaches where an answer ends."""
    where = f"{path}: " if path is not None else ""
    for row in rows:
        if row.n_labels == 0:
            raise DataError(
                f"{where}line {row.line} has no labelled token, it would teach nothing; "
                "give one of its answers the weight 1, or leave it out"
            )
    ends = set(stop_ids)
    if not any(token in ends and learned for row in rows for token, learned in zip(row.ids, row.labels, strict=True)):
        raise DataError(
            f"{where}no training row shows an end token ({sorted(ends)}) as learned, so the model would not stop; "
            "use a template that ends answers with one of them"
        )


def apart(rows: Sequence[Rendered], train: Sequence[int], evaluate: Sequence[int]) -> list[int]:
    """Leave out the places of rows that are also evaluated: copies that a mixture or the data itself repeats."""
    seen = {rows[place].ids for place in evaluate}
    return [place for place in train if rows[place].ids not in seen]
