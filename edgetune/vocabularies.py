"""A recipe's rows in the ids of pruned vocabularies, known before any model is cut."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgetune import workload
from edgetune.compress.prune import tokenizer_files
from edgetune.compress.prune.vocabulary import choose
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import DataError
from edgetune.recipe_data import Data
from edgetune.workload import Workload


@dataclass(frozen=True)
class CutVocabulary:
    """The tokens of a base that stay, and the rows in their ids."""

    kept: tuple[int, ...]  # ids of the base, ascending; the place of each is its new id
    work: Workload
    n_lost: int  # tokens of training rows that do not stay
    same_rows: bool  # training rows are the same tokens as before, renumbered
    scratch: tempfile.TemporaryDirectory[str]  # holds the tokenizer as long as this lives


class Vocabularies:
    """The pruned vocabularies of one recipe. The tokenizer of every model of a run is the base's until it is cut."""

    def __init__(self, data: Data, work: Workload) -> None:
        self._data, self._work = data, work
        self._cut: dict[int, CutVocabulary] = {}

    def cut(self, n_keep: int) -> CutVocabulary:
        """Choose the tokens that stay and render all rows anew. Raises UnsupportedError, DataError."""
        if n_keep not in self._cut:
            self._cut[n_keep] = self._made(n_keep)
        return self._cut[n_keep]

    def _made(self, n_keep: int) -> CutVocabulary:
        base, work = self._work.tokenizer, self._work
        tokenizer = tokenizer_files.check_folder(base)
        of_rows, of_text = counts(work.train), dict(zip(*_counted(work.calibration_text), strict=True))
        kept = choose(tokenizer, n_keep, [of_rows, of_text], tokenizer_files.named_ids(base))
        scratch = tempfile.TemporaryDirectory(prefix="edgetune-")
        tokenizer_files.write(base, Path(scratch.name), kept)
        made = workload.load_for(self._data, Path(scratch.name))
        place = {old: new for new, old in enumerate(kept)}
        n_lost = len(set(of_rows) - set(kept))
        same = not n_lost and rows_digest(_renumbered(row, place) for row in work.train) == rows_digest(made.train)
        return CutVocabulary(tuple(kept), made, n_lost, same, scratch)

    def refuse_other_rows(self, n_keep: int) -> None:
        """Raise DataError where a teacher's words of the training rows are not words of the same tokens."""
        found = self.cut(n_keep)
        if not found.same_rows:
            raise DataError(
                f"prune.vocabulary={n_keep} lacks {found.n_lost} tokens that training rows use, so teacher and student "
                "would read other tokens; raise it, or distill before it"
            )


def counts(rows: Sequence[Rendered]) -> dict[int, int]:
    """Count each token in training rows."""
    found: dict[int, int] = {}
    for row in rows:
        for token in row.ids:
            found[token] = found.get(token, 0) + 1
    return found


def _counted(ids: Sequence[int]) -> tuple[list[int], list[int]]:
    tokens, n = np.unique(np.asarray(ids, np.int64), return_counts=True)
    return tokens.tolist(), n.tolist()


def _renumbered(row: Rendered, place: dict[int, int]) -> Rendered:
    return replace(row, ids=tuple(place[token] for token in row.ids))
