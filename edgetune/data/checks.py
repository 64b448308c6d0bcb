"""Refusals before the first step: leaks from held-out rows, too few rows, rows without labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from edgetune.data.formats import Row
from edgetune.data.render import Rendered
from edgetune.errors import DataError

FEWEST = 5  # training rows, one of which is set aside to watch training


def prompt_digest(row: Row) -> bytes:
    """Digest of what a row asks, case and whitespace aside."""
    return _digest(row.prompt)


def learned_digests(row: Row) -> tuple[bytes, ...]:
    """Digests, as of `prompt_digest`, of what each answer that is learned answers."""
    return tuple(map(_digest, row.prompts))


def _digest(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.casefold().encode("utf-8", "surrogatepass"), digest_size=16).digest()


def refuse_leaks(
    train: Iterable[tuple[bytes, int]], heldout: Sequence[Row], train_path: Path, heldout_path: Path
) -> None:
    """Raise DataError where a held-out prompt is also one of the training prompts, given as digest and line."""
    asked = [(prompt_digest(row), row.line) for row in heldout]
    held = {digest for digest, _ in asked}
    seen = {digest: line for digest, line in train if digest in held}
    leaks = [(line, seen[digest]) for digest, line in asked if digest in seen]
    if leaks:
        raise DataError(
            f"{heldout_path} line {leaks[0][0]} is also {train_path} line {leaks[0][1]} ({len(leaks)} such rows); "
            "remove them from the training rows"
        )


def refuse_few(n_rows: int, where: str, n_too_long: int = 0) -> None:
    """Raise DataError where rows are too few to set one in five aside; `n_too_long` were left out before."""
    if n_rows < FEWEST:
        beside = f" ({n_too_long} more are longer than data.max_length)" if n_too_long else ""
        raise DataError(f"{where}: {n_rows} training rows are too few{beside}; give at least {FEWEST}")


def refuse_untaught(rows: Iterable[Rendered], stop_ids: Sequence[int], path: Path | None = None) -> None:
    """Raise DataError where a row would teach nothing, or no row teaches where an answer ends."""
    where = f"{path}: " if path is not None else ""
    ends, shown = set(stop_ids), False
    for row in rows:
        if row.n_labels == 0:
            raise DataError(
                f"{where}line {row.line} has no labelled token, it would teach nothing; "
                "give one of its answers the weight 1, or leave it out"
            )
        shown = shown or any(learned and token in ends for token, learned in zip(row.ids, row.labels, strict=True))
    if not shown:
        raise DataError(
            f"{where}no training row shows an end token ({sorted(ends)}) as learned, so the model would not stop; "
            "use a template that ends answers with one of them"
        )


def apart(rows: Sequence[Rendered], train: Sequence[int], evaluate: Sequence[int]) -> list[int]:
    """Leave out the places of rows that are also evaluated: copies that a mixture or the data itself repeats."""
    seen = {rows[place].ids for place in evaluate}
    return [place for place in train if rows[place].ids not in seen]
