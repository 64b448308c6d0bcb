"""Reads the rows of a data set and counts what a model would learn from them unasked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetune import __version__
from edgetune.artifact import json_digest
from edgetune.data.check import personal
from edgetune.data.check.duplicates import NearIndex, normal
from edgetune.data.check.findings import DataReport, Extremes, File, Finding, Labels, Lengths, Place
from edgetune.data.check.texts import UNTOLD, Languages, evenness, find_labels, is_trivial, repetition
from edgetune.data.formats import Format, Row, detect, parse_row
from edgetune.data.preference import parse_kto, parse_preference
from edgetune.data.records import Record, read_records
from edgetune.data.render import Rendered, render
from edgetune.errors import DataError
from edgetune.recipe_data import DataCheck

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN, EXCERPT = 10, 160
WHOLE = "Whole row"
Hit = tuple["Item", str | None]  # a row, and where its like stands


@dataclass(frozen=True)
class Input:
    """A source to check."""

    path: Path
    heldout: bool = False
    form: Format = "auto"
    limit: int | None = None
    supervised: bool = False  # pairs and labelled answers are refused, as `adapt` does


@dataclass(frozen=True)
class Item:
    """One row: what is learned from it and, of a preference pair, the answer that is learned to be avoided."""

    place: str
    row: Row
    rejected: Row | None = None
    label: str | None = None

    @property
    def question(self) -> str:
        """What tells rows apart: the turns before the answer without the system's, or the text."""
        if self.row.text is not None:
            return self.row.text
        return "\n".join(content for role, content in self.row.messages[:-1] if role != "system")

    @property
    def text(self) -> str:
        return self.row.text if self.row.text is not None else f"{self.question}\n{self.row.answer}"

    @property
    def everything(self) -> str:
        """All that a model would see: system turn, calls and rejected answer, too."""
        turns = [self.row.text or "", *(content for _, content in self.row.messages), *map(str, self.row.extras)]
        return "\n".join([*turns, self.rejected.answer if self.rejected is not None else ""])


@dataclass
class Rows:
    """What was read: rows, and those that could not be."""

    train: list[Item]
    heldout: list[Item]
    refused: list[Place]
    files: list[File]


@dataclass(frozen=True)
class Template:
    """The model's own tokenizer and stop set, as training renders with them."""

    base: str
    tokenizer: PreTrainedTokenizerBase
    stop_ids: Sequence[int]


def examine(inputs: Sequence[Input], config: DataCheck, max_length: int, template: Template | None) -> DataReport:
    """Check sources. Without a template lengths are characters, and what a mask would leave is not known.

    Raises DataError where a source cannot be read at all, or no row of the training sources can.
    """
    rows = read(inputs)
    rendered = _render(rows, template) if template is not None else None
    if not rows.train:
        raise DataError(f"{inputs[0].path}: no row can be used; the first: {rows.refused[0].says}")
    n_rows = len(rows.train) + len(rows.heldout) + len(rows.refused)
    judge = _Judge(config)
    judge.add("refused", "Rows that training cannot read", rows.refused, n_rows)
    if rendered is not None:
        longest = [max(len(one.ids) for one in pair) for pair in rendered]
        too_long = [
            item for item, n in zip(rows.train, longest, strict=False) if n > max_length and item.row.text is None
        ]  # a text is cut into windows
        judge.add("too_long", f"Training rows longer than {max_length} tokens", _places(too_long), len(rows.train))
        mute = [item for item, pair in zip(rows.train, rendered, strict=False) if not pair[0].n_labels]
        judge.add("without_loss", "Training rows whose mask carries no loss", _places(mute), len(rows.train))
        lengths = [
            _lengths(WHOLE, "tokens", longest),
            _lengths("Answer", "tokens", [len(pair[0].ids) - pair[0].start for pair in rendered]),
        ]
    else:
        longest = [len(item.text) for item in [*rows.train, *rows.heldout]]
        answers = [len(item.row.answer) for item in [*rows.train, *rows.heldout]]
        lengths = [_lengths(WHOLE, "characters", longest), _lengths("Answer", "characters", answers)]
    _repeated(rows, config, judge)
    trivial = [i for i in rows.train if i.row.text is None and is_trivial(i.question, i.row.answer)]
    judge.add("trivial", "Trivial answers", _places(trivial), len(rows.train))
    kinds = _personal([*rows.train, *rows.heldout], judge)
    told = _languages(rows.train, config, judge)
    return DataReport(
        edgetune=__version__,
        base=template.base if template is not None else None,
        max_length=max_length,
        similarity=config.similarity,
        files=rows.files,
        lengths=lengths,
        findings=judge.findings,
        labels=_labels(rows.train, config.min_evenness),
        languages=dict(told.most_common()),
        personal=dict(kinds.most_common()),
        extremes=_extremes(rows.train, longest[: len(rows.train)]),
    )


def read(inputs: Sequence[Input]) -> Rows:
    """Read every row; one that its format refuses is kept with the reason, and the others are read on."""
    rows = Rows([], [], [], [])
    for source in inputs:
        formats, items = Counter[str](), []
        for record in read_records(source.path, source.limit):
            try:
                item = _parse(record, f"{source.path}:{record.line}", source)
            except DataError as error:
                rows.refused.append(Place(row=f"{source.path}:{record.line}", says=_reason(error, record.where)))
                continue
            formats[item.row.form] += 1
            items.append(item)
        digest = json_digest([[item.row.as_dicts, item.row.text, item.row.tools, item.label] for item in items])
        rows.files.append(
            File(path=str(source.path), heldout=source.heldout, rows=len(items), formats=dict(formats), digest=digest)
        )
        (rows.heldout if source.heldout else rows.train).extend(items)
    if not rows.train and not rows.refused:
        raise DataError(f"{inputs[0].path}: holds no rows; give one JSON object a line")
    return rows


def _parse(record: Record, place: str, source: Input) -> Item:
    kind = detect(record.values) if source.form == "auto" else source.form
    if kind == "preference" and not source.supervised:
        pair = parse_preference(record, kind)
        chosen, rejected = pair.rows
        return Item(place, chosen, rejected)
    if kind == "kto" and not source.supervised:
        labelled = parse_kto(record, kind)
        return Item(place, labelled.row, label="good" if labelled.label else "bad")
    return Item(place, parse_row(record, source.form))


def _render(rows: Rows, template: Template) -> list[tuple[Rendered, ...]]:
    """Render train, then held-out; a row that the template refuses is moved to the refused ones."""
    made: list[tuple[Rendered, ...]] = []
    for items in (rows.train, rows.heldout):
        kept = []
        for item in items:
            parts = [item.row, *([item.rejected] if item.rejected is not None else [])]
            try:
                made.append(tuple(render(part, template.tokenizer, template.stop_ids) for part in parts))
                kept.append(item)
            except DataError as error:
                rows.refused.append(Place(row=item.place, says=_reason(error, f"line {item.row.line}")))
        items[:] = kept
    return made


class _Judge:
    """Collects findings, each held against the recipe's share of the same name."""

    def __init__(self, config: DataCheck) -> None:
        self._config = config
        self.findings: list[Finding] = []

    def add(self, key: str, title: str, places: Sequence[Place], of: int) -> None:
        limit = getattr(self._config, key)
        over = limit is not None and len(places) > limit * of
        shown = list(places[:SHOWN])
        self.findings.append(
            Finding(key=key, title=title, rows=len(places), of=of, limit=limit, over=over, places=shown)
        )


def _repeated(rows: Rows, config: DataCheck, judge: _Judge) -> None:
    """Duplicates, conflicts and near-duplicates within train, and held-out rows that train shows."""
    index = NearIndex(config.similarity)
    same: list[Hit] = []
    other: list[Hit] = []
    near: list[Hit] = []
    prompts: dict[str, Item] = {}
    answered: dict[tuple[str, str], Item] = {}
    seen: list[Item] = []
    for item in rows.train:
        prompt, answer = item.row.prompt.casefold(), normal(item.row.answer)
        if (prompt, answer) in answered:
            same.append((item, answered[prompt, answer].place))
        elif prompt in prompts:
            other.append((item, prompts[prompt].place))
        else:
            found = index.see(item.question)
            seen.append(item)
            if found is not None:
                near.append((item, seen[found].place))
        prompts.setdefault(prompt, item)
        answered.setdefault((prompt, answer), item)
    n = len(rows.train)
    judge.add("duplicates", "Exact duplicates, answer included", _pairs(same), n)
    judge.add("conflicts", "Same prompt, another answer", _pairs(other), n)
    judge.add("near_duplicates", f"Near-duplicates (similarity {config.similarity:g} or more)", _pairs(near), n)
    if rows.heldout:
        learned = {prompt.casefold(): item for item in reversed(rows.train) for prompt in item.row.prompts}
        leaks: list[Hit] = []
        almost: list[Hit] = []
        for item in rows.heldout:
            known = learned.get(item.row.prompt.casefold())
            found = None if known is not None else index.near(item.question)
            if known is not None:
                leaks.append((item, known.place))
            elif found is not None:
                almost.append((item, seen[found].place))
        judge.add("overlap", "Held-out rows whose prompt is in train", _pairs(leaks), len(rows.heldout))
        judge.add("near_overlap", "Held-out rows almost in train", _pairs(almost), len(rows.heldout))


def _personal(items: Sequence[Item], judge: _Judge) -> Counter[str]:
    """Rows by kind of what looks like personal data; their places say the kinds and nothing else."""
    kinds = Counter[str]()
    hits = []
    for item in items:
        found = personal.find(item.everything)
        kinds.update(found)
        if found:
            hits.append(Place(row=item.place, says=", ".join(found)))
    judge.add("personal", "Rows with what looks like personal data or a key", hits, len(items))
    return kinds


def _languages(items: Sequence[Item], config: DataCheck, judge: _Judge) -> Counter[str]:
    """Rows by language, and those in none that the recipe names; one that cannot be told is in no other."""
    tell = Languages().tell
    told = [tell(item.question) for item in items]
    if config.languages is not None:
        known = {*config.languages, *UNTOLD}
        others = [item for item, language in zip(items, told, strict=True) if language not in known]
        title = f"Questions in a language other than {', '.join(config.languages)}"
        judge.add("other_languages", title, _places(others), len(items))
    return Counter(told)


def _labels(items: Sequence[Item], min_evenness: float | None) -> list[Labels]:
    counts = find_labels([item.row.answer for item in items if item.row.text is None] or [""])
    marked = Counter(item.label for item in items if item.label is not None)
    if marked:
        counts["label"] = marked
    found = []
    for key, values in counts.items():
        shown = Counter[str]()
        for name, n in values.items():
            shown[personal.mask(name)[0]] += n
        counted = dict(shown.most_common())
        found.append(Labels(label=key, counts=counted, evenness=evenness(values), limit=min_evenness))
    return found


def _lengths(what: str, unit: str, values: Sequence[int]) -> Lengths:
    found = np.asarray(values)
    counts, edges = np.histogram(found, bins=min(24, max(1, int(found.max() - found.min()))))
    p50, p90, p99 = np.percentile(found, [50, 90, 99]).tolist()
    return Lengths(
        what=what, unit=unit, minimum=int(found.min()), mean=float(found.mean()), p50=p50, p90=p90, p99=p99,
        maximum=int(found.max()), edges=edges.tolist(), counts=counts.tolist(),
    )  # fmt: skip


def _extremes(items: Sequence[Item], lengths: Sequence[int]) -> list[Extremes]:
    order = sorted(range(len(items)), key=lambda i: lengths[i])
    repeats = [repetition(item.text) for item in items]
    most = [i for i in sorted(range(len(items)), key=lambda i: -repeats[i])[:SHOWN] if repeats[i] > 0]

    def shown(title: str, chosen: Sequence[int], value: Callable[[int], float]) -> Extremes:
        return Extremes(title=title, rows=_places([items[i] for i in chosen]), values=[value(i) for i in chosen])

    return [
        shown("Shortest", order[:SHOWN], lambda i: lengths[i]),
        shown("Longest", order[::-1][:SHOWN], lambda i: lengths[i]),
        shown("Most repetitive (share of word trigrams that stood there before)", most, lambda i: repeats[i]),
    ]


def _places(items: Sequence[Item]) -> list[Place]:
    return _pairs([(item, None) for item in items])


def _pairs(hits: Sequence[Hit]) -> list[Place]:
    """Places of rows; only those that may be shown get an excerpt."""
    shown = [Place(row=item.place, other=other, says=_excerpt(item.text)) for item, other in hits[:SHOWN]]
    return shown + [Place(row=item.place, other=other) for item, other in hits[SHOWN:]]


def _excerpt(text: str) -> str:
    plain = " ".join(personal.mask(text)[0].split())
    return plain if len(plain) <= EXCERPT else plain[: EXCERPT - 1] + "…"


def _reason(error: DataError, where: str) -> str:
    """What was wrong, without the place that stands beside it, and without personal data that it quotes."""
    return personal.mask(str(error).removeprefix(where).removeprefix(": "))[0]
