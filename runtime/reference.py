"""The reference pack: what the reference model said, in megabytes, so that divergence needs no 16-bit model.

Shapes: P target positions of all rows, N of one row, K kept tokens (another number at each position), S drawn ones,
V vocabulary.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import ArtifactError, UsageError
from edgetune.runtime.engine import Logits, first_line

KEPT_MASS = 0.02  # every token at least this likely is kept, and the likeliest in any case
DRAWN = 2  # tokens drawn from the rest at each position
ROOT, TAIL_ROOT = 255, 65535  # levels of the square root of a probability: kept tokens, the rest together
LOG_STEP = 1 / 1024  # nats between two levels of a drawn token's log-probability among the rest
# What NumPy and zipfile raise for an npz file that is cut, changed or something else; some say nothing.
DAMAGED = (
    OSError, KeyError, ValueError, EOFError, TypeError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
Doubles = NDArray[np.float64]


class Softmax(NamedTuple):
    """What every figure of N positions begins with, computed once.

    Exponentials are float32, sums of them float64: a whole vocabulary in float64 takes longer than the model that
    gave it.
    """

    chosen: NDArray[np.int64]  # [N], the argmax; ties by lowest id
    top: NDArray[np.float32]  # [N], its logit
    exps: NDArray[np.float32]  # [N, V], exp(logits - top)

    @classmethod
    def of(cls, logits: Logits) -> Softmax:
        """Compute it of logits, [N, V]. Where one is nan or infinite, so is `top`, which the caller looks at."""
        chosen = logits.argmax(1)
        top = logits[np.arange(len(logits)), chosen]
        with np.errstate(invalid="ignore"):
            exps = logits - top[:, None]
        return cls(chosen, top, np.exp(exps, out=exps))


class Divergence(NamedTuple):
    """A row against the reference, position by position."""

    kl: Doubles  # [N], nats
    agree: NDArray[np.bool_]  # [N], equal argmaxes


@dataclass(frozen=True)
class ReferencePack:
    """What the reference said at each target position: its likely tokens, the mass of the rest, and a sample of those.

    KL divergence is that of the kept tokens and one bucket for the rest, which is exact up to rounding, plus the
    divergence inside the rest, estimated on S tokens drawn from the reference: with p and q the two models' rests,
    each made to sum to one, and r = q / p, the mean of r - 1 - log r over tokens drawn from p is KL(p || q) in
    expectation and never below zero. So a mean over many positions is unbiased but for rounding: a probability p
    is stored as the nearest of the levels (i / 255)^2, which moves it by at most sqrt(p) / 255 + 1 / 255^2 / 4.
    """

    workload: str  # digest of the rows it was made of
    subject: str  # artifact digest of the reference
    n_vocab: int
    lengths: NDArray[np.uint32]  # [rows], positions of each row
    counts: NDArray[np.uint8]  # [P], K of each position
    ids: NDArray[np.uint16 | np.uint32]  # [sum of K], likeliest first; ties by lowest id, as argmax does
    roots: NDArray[np.uint8]  # [sum of K], 255 times the square root of the probability
    tail: NDArray[np.uint16]  # [P], 65535 times the square root of the mass of all other tokens
    drawn: NDArray[np.uint16 | np.uint32]  # [P, S], tokens drawn from the others
    drawn_logs: NDArray[np.uint16]  # [P, S], minus log of their probability among the others, in steps

    def compare(self, row: int, logits: Logits, softmax: Softmax | None = None) -> Divergence:
        """Compare the logits of a row's target, [N, V], with the reference.

        `softmax` is theirs, where the caller has it; its exponentials are written over. Raises UsageError where the
        row has another number of positions or the vocabulary differs.
        """
        first, n_positions = int(self.lengths[:row].sum()), int(self.lengths[row])
        if logits.shape != (n_positions, self.n_vocab):
            raise UsageError(
                f"the reference pack has {n_positions} positions of {self.n_vocab} tokens in row {row}, the candidate "
                f"{logits.shape[0]} of {logits.shape[1]}; compare models of one vocabulary on the same rows"
            )
        part = slice(first, first + n_positions)
        counts = self.counts[part].astype(np.int64)
        begin = int(self.counts[:first].sum(dtype=np.int64))
        ids = self.ids[begin : begin + int(counts.sum())].astype(np.int64)
        at = np.repeat(np.arange(n_positions), counts)  # position of each kept token
        p = (self.roots[begin : begin + len(ids)] / ROOT) ** 2
        p_tail = (self.tail[part] / TAIL_ROOT) ** 2
        whole = np.bincount(at, p, n_positions) + p_tail
        p, p_tail = p / whole[at], p_tail / whole

        drawn = self.drawn[part].astype(np.int64)
        softmax = softmax or Softmax.of(logits)
        log_q, log_q_drawn, log_q_tail = _log_masses(logits, softmax, at, ids, drawn)
        with np.errstate(divide="ignore", invalid="ignore"):
            kl = np.zeros(n_positions)
            kl += np.bincount(at, np.where(p > 0, p * (np.log(p) - log_q), 0.0), n_positions)
            log_r = log_q_drawn - log_q_tail[:, None] + self.drawn_logs[part] * LOG_STEP  # [N, S]
            inside = (np.expm1(log_r) - log_r).mean(1)
            kl += np.where(p_tail > 0, p_tail * (np.log(p_tail) - log_q_tail + inside), 0.0)
        likeliest = ids[np.cumsum(counts) - counts]
        return Divergence(kl, softmax.chosen == likeliest)

    def save(self, path: Path) -> None:
        """Write the pack as one compressed npz file."""
        names = np.array([self.workload, self.subject])
        with path.open("wb") as stream:
            np.savez_compressed(
                stream, names=names, n_vocab=np.int64(self.n_vocab), lengths=self.lengths, counts=self.counts,
                ids=self.ids, roots=self.roots, tail=self.tail, drawn=self.drawn, drawn_logs=self.drawn_logs,
            )  # fmt: skip

    @classmethod
    def read(cls, path: Path) -> ReferencePack:
        """Read a pack. Raises ArtifactError where the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as data:
                workload, subject = map(str, data["names"])
                return cls(
                    workload, subject, int(data["n_vocab"]), data["lengths"], data["counts"], data["ids"],
                    data["roots"], data["tail"], data["drawn"], data["drawn_logs"],
                )  # fmt: skip
        except DAMAGED as error:
            raise ArtifactError(f"{path} is not a reference pack: {first_line(error)}") from error


class PackBuilder:
    """Collects rows of a reference pack, one after the other. `seed` draws the sampled tokens."""

    def __init__(self, seed: int | Sequence[int] = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._lengths: list[int] = []
        self._positions: list[_Position] = []
        self._n_vocab = 0

    def add(self, logits: Logits) -> None:
        """Add the next row's logits, [N, V]."""
        self._n_vocab = logits.shape[1]
        self._lengths.append(len(logits))
        self._positions += [self._position(row) for row in logits]

    def _position(self, logits: Logits) -> _Position:
        exps = np.exp(logits - logits.max()).astype(np.float64)
        p = exps / exps.sum()
        kept = np.flatnonzero(p >= KEPT_MASS)
        kept = kept[np.argsort(-logits[kept], kind="stable")] if len(kept) else np.array([logits.argmax()])
        mass = p[kept]
        p[kept] = 0.0
        heap = np.cumsum(p)
        tail = float(heap[-1])
        if tail == 0.0:
            return _Position(kept, mass, 0.0, np.zeros(DRAWN, np.int64), np.ones(DRAWN))
        at = (np.arange(DRAWN) + self._rng.random(DRAWN)) / DRAWN * tail  # one draw in each of S equal parts
        drawn = np.searchsorted(heap, at, side="right").clip(0, np.flatnonzero(p)[-1])
        return _Position(kept, mass, tail, drawn, p[drawn] / tail)

    def build(self, workload: str, subject: str) -> ReferencePack:
        """Give the pack of the rows that were added."""
        found = self._positions
        kind = np.uint16 if self._n_vocab <= 1 << 16 else np.uint32
        tail = np.array([one.tail for one in found])
        steps = -np.log(np.stack([one.drawn_mass for one in found])) / LOG_STEP
        return ReferencePack(
            workload=workload,
            subject=subject,
            n_vocab=self._n_vocab,
            lengths=np.array(self._lengths, np.uint32),
            counts=np.array([len(one.kept) for one in found], np.uint8),
            ids=np.concatenate([one.kept for one in found]).astype(kind),
            roots=np.rint(ROOT * np.sqrt(np.concatenate([one.mass for one in found]))).clip(1).astype(np.uint8),
            tail=np.rint(TAIL_ROOT * np.sqrt(tail)).astype(np.uint16),
            drawn=np.stack([one.drawn for one in found]).astype(kind),
            drawn_logs=np.rint(steps).clip(0, 65535).astype(np.uint16),
        )


class _Position(NamedTuple):
    """One position before it is rounded."""

    kept: NDArray[np.int64]
    mass: Doubles
    tail: float
    drawn: NDArray[np.int64]
    drawn_mass: Doubles  # among the others


def join(packs: Sequence[ReferencePack], workload: str) -> ReferencePack:
    """Put the packs of consecutive rows together."""
    arrays = ("lengths", "counts", "ids", "roots", "tail", "drawn", "drawn_logs")
    joined = {name: np.concatenate([getattr(pack, name) for pack in packs]) for name in arrays}
    return ReferencePack(workload=workload, subject=packs[0].subject, n_vocab=packs[0].n_vocab, **joined)


def _log_masses(
    logits: Logits, softmax: Softmax, at: NDArray[np.int64], ids: NDArray[np.int64], drawn: NDArray[np.int64]
) -> tuple[Doubles, Doubles, Doubles]:
    """Give log-probabilities of kept tokens, [sum of K], of drawn ones, [N, S], and of all but the kept, [N].

    The exponentials of `softmax` are written over.
    """
    top, exps = softmax.top[:, None], softmax.exps
    kept = np.bincount(at, exps[at, ids].astype(np.float64), len(logits))
    exps[at, ids] = 0.0
    rest = exps.sum(1, dtype=np.float64)
    total = np.log(kept + rest)
    shifted = (logits[at, ids] - top[at, 0]).astype(np.float64)
    shifted_drawn = (np.take_along_axis(logits, drawn, axis=1) - top).astype(np.float64)
    with np.errstate(divide="ignore"):
        return shifted - total[at], shifted_drawn - total[:, None], np.log(rest) - total
