"""What a teacher says of a set of rows, as a file: its K likeliest tokens at each position, and the rest as one bucket.

Unlike the reference pack of `runtime/reference.py` every position has the same K, so that rows stack into tensors.

Shapes: P labelled positions of all rows, N of one row, K kept tokens, V vocabulary.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import ArtifactError
from edgetune.runtime.engine import Logits

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class TeacherPack:
    """The K likeliest tokens of the teacher at each position, and the probability of all others together."""

    workload: str  # digest of the rows it was made of
    subject: str  # artifact digest of the teacher
    n_vocab: int
    starts: NDArray[np.int64]  # [rows + 1], where each row's positions begin
    ids: NDArray[np.uint32]  # [P, K], likeliest first; ties by lowest id
    log_probs: NDArray[np.float32]  # [P, K], natural log
    tail: NDArray[np.float32]  # [P], log of the mass of all other tokens; -inf where there are none

    @property
    def mean_tail_mass(self) -> float:
        """Probability outside of the kept tokens, mean over positions."""
        return float(np.exp(self.tail.astype(np.float64)).mean()) if len(self.tail) else 0.0

    def save(self, path: Path) -> None:
        """Write the pack as one compressed npz file."""
        names = np.array([self.workload, self.subject])
        with path.open("wb") as stream:
            np.savez_compressed(
                stream, names=names, n_vocab=np.int64(self.n_vocab), starts=self.starts, ids=self.ids,
                log_probs=self.log_probs, tail=self.tail,
            )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> TeacherPack:
        """Read a pack. Raises ArtifactError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                workload, subject = map(str, data["names"])
                return cls(
                    workload, subject, int(data["n_vocab"]), data["starts"], data["ids"], data["log_probs"],
                    data["tail"],
                )  # fmt: skip
        except (
            OSError, KeyError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error
        ) as error:  # fmt: skip
            said = (str(error) or type(error).__name__).splitlines()[0]
            raise ArtifactError(f"{path} is not a teacher's pack: {said}") from error


class PackBuilder:
    """Collects rows of a pack, one after the other."""

    def __init__(self) -> None:
        self._ids: list[NDArray[np.uint32]] = []
        self._log_probs: list[NDArray[np.float32]] = []
        self._tail: list[NDArray[np.float32]] = []
        self._n_vocab = 0

    def add(self, logits: Logits, k: int, named: NDArray[np.int64] | None = None) -> None:
        """Add the next row's logits, [N, V].

        Where `named` are given, ids in ascending order, only they are kept, each by its place among them; the mass of
        all others is in the tail.
        """
        told = logits if named is None else logits[:, named]
        self._n_vocab = told.shape[1]
        k = min(k, self._n_vocab)
        near = np.sort(np.argpartition(-told, k - 1, axis=1)[:, :k], axis=1)  # ascending ids, so that ties keep order
        order = np.argsort(-np.take_along_axis(told, near, axis=1), axis=1, kind="stable")
        ids = np.take_along_axis(near, order, axis=1)
        top = told.argmax(1)  # a tie at the cut may have left the lowest id out
        ids[:, 0] = np.where((ids == top[:, None]).any(1), ids[:, 0], top)
        log_probs, tail = _buckets(logits, ids if named is None else named[ids])
        self._ids.append(ids.astype(np.uint32))
        self._log_probs.append(log_probs.astype(np.float32))
        self._tail.append(tail.astype(np.float32))

    def build(self, workload: str, subject: str) -> TeacherPack:
        """Give the pack of the rows that were added."""
        starts = np.cumsum([0, *map(len, self._ids)]).astype(np.int64)
        return TeacherPack(
            workload, subject, self._n_vocab, starts, np.concatenate(self._ids), np.concatenate(self._log_probs),
            np.concatenate(self._tail),
        )  # fmt: skip


def join(packs: Sequence[TeacherPack], workload: str) -> TeacherPack:
    """Put the packs of consecutive rows together."""
    starts = [np.zeros(1, np.int64)]
    for pack in packs:
        starts.append(pack.starts[1:] + starts[-1][-1])
    return TeacherPack(
        workload, packs[0].subject, packs[0].n_vocab, np.concatenate(starts),
        np.concatenate([p.ids for p in packs]), np.concatenate([p.log_probs for p in packs]),
        np.concatenate([p.tail for p in packs]),
    )  # fmt: skip


def _buckets(logits: Logits, ids: NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """Give the log-probabilities of `ids`, [N, K], and the log of the mass of all others, [N].

    Exponentials are float32, sums float64: a whole vocabulary in float64 takes longer than the model that gave it.
    """
    top = logits.max(1, keepdims=True)
    exps = np.exp(logits - top)
    kept = np.take_along_axis(exps, ids, axis=1).sum(1, dtype=np.float64)
    np.put_along_axis(exps, ids, 0.0, axis=1)
    rest = exps.sum(1, dtype=np.float64)
    total = np.log(kept + rest)
    shifted = (np.take_along_axis(logits, ids, axis=1) - top).astype(np.float64)
    with np.errstate(divide="ignore"):
        return shifted - total[:, None], np.log(rest) - total
