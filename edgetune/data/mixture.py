"""Several sources become one set of training rows: caps, weights, replay, decay by date, balance by label, splits.

Each row of a source has a weight m, 1 unless decay or balance say otherwise. A source of which k rows are wanted gives
each of its rows k m / sum(m) times; what is not whole is drawn by systematic sampling, so that the sum comes out and no
row differs from its due by one copy or more.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.data.checks import learned_digests, prompt_digest, refuse_leaks
from edgetune.data.formats import Format, Row, parse_all, parse_row, read_rows, refuse_halves
from edgetune.data.records import Record
from edgetune.data.spool import RowSpool
from edgetune.errors import DataError
from edgetune.recipe_data import Balance, Data, Decay, Mix, Split, TrainSource

DAY_S = 86_400.0
LEAST = 1e-290  # of what a source's rows weigh together: less cannot be scaled up to a count of rows


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a row of one source is, and the fields that a mixture may go by."""

    source: int  # index of its source
    place: int  # in the spool of its source
    line: int
    form: Format
    asked: tuple[bytes, ...]  # digests of what its learned answers answer
    group: bytes | None = None  # digest of its group, where rows are split
    date: float | None = None  # seconds since 1970
    label: str | None = None
    spool: RowSpool = field(default_factory=RowSpool, compare=False, repr=False)

    @property
    def row(self) -> Row:
        """The row as it was read, from disk."""
        return self.spool[self.place]


@dataclass(frozen=True)
class Composed:
    """Training rows in the order of their sources, copies side by side, and the held-out rows."""

    train: list[Entry]
    heldout: list[Row]
    found: list[int]  # rows of each source, before anything was drawn
    split: list[Entry]  # where the held-out rows come from, if they were taken out of the training rows
    leaks: int = 0  # training rows left out, since a group that is held out has the same prompt


def compose(data: Data) -> Composed:
    """Read every source and draw the mixture. Raises DataError, also where a held-out prompt is in a training file."""
    parts = [_read(source, index, data) for index, source in enumerate(data.sources)]
    found, split, leaks = [len(part) for part in parts], list[Entry](), 0
    if data.split is not None:
        parts, split, leaks = _split(parts, data)
        split = split[: data.heldout_rows]
        heldout = [entry.row for entry in split]
    else:
        assert data.heldout is not None, "a recipe has heldout or split"
        path = Path(data.heldout)
        heldout = read_rows(path, data.format, data.heldout_rows)
        for source, part in zip(data.sources, parts, strict=True):
            asked = ((digest, entry.line) for entry in part for digest in entry.asked)
            refuse_leaks(asked, heldout, Path(source.path), path)
    if isinstance(data.train, str) and data.mix is None:
        return Composed(parts[0], heldout, found, split, leaks)
    return Composed(draw(parts, data.sources, data.mix or Mix()), heldout, found, split, leaks)


def draw(parts: Sequence[list[Entry]], sources: Sequence[TrainSource], mix: Mix) -> list[Entry]:
    """Draw the mixture from the rows of each source. Raises DataError where a source has no row to give."""
    for source, part in zip(sources, parts, strict=True):
        if not part:
            raise DataError(f"{source.path}: no row is left to train on; lower split.share or leave the source out")
    rngs = [np.random.default_rng([mix.seed, index]) for index in range(len(parts))]
    parts = [_capped(part, source.cap, rng) for part, source, rng in zip(parts, sources, rngs, strict=True)]
    newest = max((entry.date for part in parts for entry in part if entry.date is not None), default=0.0)
    weights = [
        np.ones(len(part)) if source.replay else row_weights(part, mix, newest)
        for part, source in zip(parts, sources, strict=True)
    ]
    sizes = [float(one.sum()) for one in weights]
    for source, part, size in zip(sources, parts, sizes, strict=True):
        if size < LEAST:
            age = (newest - max(entry.date or 0.0 for entry in part)) / DAY_S
            raise DataError(
                f"{source.path}: its newest row is {age:.0f} days older than the newest of all, which "
                "mix.decay.half_life_days leaves no weight; raise it or leave the source out"
            )
    counts = shares(sources, sizes, mix)
    drawn = []
    for part, weight, count, rng in zip(parts, weights, counts, rngs, strict=True):
        copies = systematic(weight, [entry.label for entry in part], count, rng)
        drawn += [entry for entry, n in zip(part, copies.tolist(), strict=True) for _ in range(n)]
    return drawn


def shares(sources: Sequence[TrainSource], sizes: Sequence[float], mix: Mix) -> list[int]:
    """Rows that each source gives, by largest remainders; `sizes` are what its rows weigh."""
    replay_share = mix.replay_share or 0.0
    learned = sum(size for size, source in zip(sizes, sources, strict=True) if not source.replay)
    total = mix.rows or round(learned / (1 - replay_share))
    exact = np.zeros(len(sources))
    for replay, part in ((False, 1 - replay_share), (True, replay_share)):
        members = [i for i, source in enumerate(sources) if source.replay is replay]
        due = np.asarray([sources[i].weight or sizes[i] ** (1 / (mix.temperature or 1)) for i in members])
        if members:
            exact[members] = total * part * due / due.sum()
    counts = np.floor(exact).astype(int)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: total - int(counts.sum())]] += 1
    return [int(count) for count in counts]


def row_weights(part: Sequence[Entry], mix: Mix, newest: float) -> NDArray[np.float64]:
    """The weight of each row: 0.5 ** (age / half life), times its label's factor."""
    weights = np.ones(len(part))
    if mix.decay is not None:
        ages = np.asarray([newest - (entry.date or 0.0) for entry in part]) / DAY_S
        weights *= 0.5 ** (ages / mix.decay.half_life_days)
    if mix.balance is not None:
        counts = Counter(entry.label for entry in part)
        most = max(counts.values())
        rarity = np.asarray([most / counts[entry.label] for entry in part])
        weights *= np.minimum(rarity**mix.balance.strength, mix.balance.max_factor)
    return weights


def systematic(
    weights: NDArray[np.float64], labels: Sequence[str | None], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Copies of each row, `count` in all: its due, rounded up or down at random; the sum of a label likewise."""
    order = rng.permutation(len(weights))
    if any(label is not None for label in labels):
        stratum = np.unique([str(label) for label in labels], return_inverse=True)[1]
        order = order[np.argsort(stratum[order], kind="stable")]
    ends = np.cumsum(weights[order])
    ends = np.round(ends * (count / ends[-1]), 9)  # whole numbers stay whole
    ends[-1] = count
    marks = np.floor(ends + rng.random() * (1 - 1e-9))
    copies = np.empty(len(weights), dtype=np.int64)
    copies[order] = np.diff(marks, prepend=0.0)
    return copies


def _capped(part: list[Entry], cap: int | None, rng: np.random.Generator) -> list[Entry]:
    if cap is None or cap >= len(part):
        return part
    return [part[i] for i in sorted(rng.choice(len(part), cap, replace=False))]


def _read(source: TrainSource, index: int, data: Data) -> list[Entry]:
    """Read one source, with the fields that its mixture goes by; replay sources need none of them."""
    path, mix = Path(source.path), data.mix or Mix()
    form: Format = data.format if source.format == "auto" else source.format
    decay, balance = (None, None) if source.replay else (mix.decay, mix.balance)
    split = data.split if not source.replay else None
    spool = RowSpool()

    def parse(record: Record) -> Entry:
        row = parse_row(record, form)
        return Entry(
            index, spool.append(row), row.line, row.form, learned_digests(row),
            group=_group(record, row, split) if split is not None else None,
            date=_date(record, decay) if decay is not None else None,
            label=sys.intern(_label(record, row, balance)) if balance is not None else None,
            spool=spool,
        )  # fmt: skip

    return list(parse_all(path, data.train_rows, parse))


def _value(record: Record, key: str, asked: str) -> str:
    value = record.values.get(key)
    if value is None or isinstance(value, (dict, list)):
        raise DataError(
            f"{record.where}: {asked} names the key {key!r}, the row has {', '.join(map(repr, record.values))}"
        )
    refuse_halves(str(value), f"{key!r} ({asked})", record.where)
    return str(value)


def _date(record: Record, decay: Decay) -> float:
    value = record.values.get(decay.field)
    try:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value).strip())
    except (ValueError, OverflowError) as error:
        found = "nothing" if value is None else repr(value)[:40]
        raise DataError(
            f"{record.where}: {decay.field!r} (mix.decay.field) must be an ISO 8601 date or seconds since 1970, "
            f"found {found}"
        ) from error
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


def _label(record: Record, row: Row, balance: Balance) -> str:
    key = balance.label
    if key in record.values:
        return _value(record, key, "mix.balance.label")
    if key == "answer":
        return row.answer
    try:
        answer = json.loads(row.answer)
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get(key), (str, int, float, bool)):
        raise DataError(
            f"{record.where}: mix.balance.label {key!r} is no key of the row, nor of a JSON object as answer"
        )
    return str(answer[key])


def _split(parts: Sequence[list[Entry]], data: Data) -> tuple[list[list[Entry]], list[Entry], int]:
    """Take whole groups out of what is learned, in the order of their hashes, which other rows do not change."""
    split = data.split
    assert split is not None, "only a recipe with a split gets here"
    learned = [entry for part, source in zip(parts, data.sources, strict=True) if not source.replay for entry in part]
    sizes = Counter(entry.group for entry in learned if entry.group is not None)
    if len(sizes) < 2:
        raise DataError(f"split: the training rows are one group only ({len(learned)} rows); name another split.group")
    held = _held_groups(sizes, split, len(learned))
    heldout = [entry for entry in learned if entry.group in held]
    asked = {prompt_digest(entry.row) for entry in heldout}
    rest = [
        [entry for entry in part if source.replay or entry.group not in held]
        for part, source in zip(parts, data.sources, strict=True)
    ]
    kept = [[entry for entry in part if asked.isdisjoint(entry.asked)] for part in rest]
    return kept, heldout, sum(map(len, rest)) - sum(map(len, kept))


def _group(record: Record, row: Row, split: Split) -> bytes:
    name = _value(record, split.group, "split.group") if split.group is not None else row.prompt.casefold()
    return hashlib.sha256(f"{split.seed}:{name}".encode()).digest()


def _held_groups(sizes: Counter[bytes], split: Split, n_rows: int) -> set[bytes]:
    held: set[bytes] = set()
    taken = 0
    for group in sorted(sizes)[:-1]:  # one group at least is trained on
        if held and taken + sizes[group] / 2 > split.share * n_rows:
            break
        held.add(group)
        taken += sizes[group]
    return held
