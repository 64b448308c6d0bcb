"""What is measured on: held-out rows as token ids, general text, and prompts of fixed length for latency."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact
from edgetune.data import checks, mixture
from edgetune.data.calibration import CalibrationSet, make_apart, make_calibration
from edgetune.data.formats import Row, read_rows
from edgetune.data.general import general_text
from edgetune.data.golden import GOLDEN_ROWS, Golden, make_golden, trained_golden
from edgetune.data.provenance import Mixture, describe
from edgetune.data.render import Rendered, render
from edgetune.data.spool import RenderedRows
from edgetune.data.windows import render_windows
from edgetune.errors import DataError
from edgetune.recipe_data import Data
from edgetune.recipe_export import Calibration
from edgetune.sources import GOLDEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_ROWS, TEXT_TOKENS = 4, 256  # general text for perplexity


@dataclass(frozen=True)
class Workload:
    """Everything that a recipe's data gives, rendered for one base model."""

    train: Sequence[Rendered]
    heldout: list[Rendered]
    n_too_long: int  # training rows left out
    mixture: Mixture  # where each training row comes from
    golden: Golden
    calibration_text: list[int]  # general text that calibrates
    beside_rows: list[int]  # what calibrates beside training rows: that text, or rows that the recipe names
    beside: str  # what messages call it
    measured_text: list[int]  # general text that measures; shares nothing with the former
    tokenizer: Path  # folder of the tokenizer that rendered all this

    def calibration(self, config: Calibration, seed: int) -> CalibrationSet:
        return make_calibration(
            _Ids(self.train),
            self.beside_rows,
            n_samples=config.n_samples,
            n_tokens=config.n_tokens,
            general_share=config.general_share,
            seed=seed,
            called=self.beside,
        )

    def apart(self, config: Calibration, taken: Calibration | None, seed: int) -> CalibrationSet:
        """Give rows to choose by, which `taken` does not show and which are not held out."""
        return make_apart(
            _Ids(self.train), self.beside_rows, config, taken=taken,
            heldout={tuple(row.ids) for row in self.heldout}, seed=seed, called=self.beside,
        )  # fmt: skip

    def text_rows(self) -> list[tuple[int, ...]]:
        """Rows of general text whose perplexity is measured."""
        n = min(TEXT_ROWS, len(self.measured_text) // TEXT_TOKENS)
        return [tuple(self.measured_text[i * TEXT_TOKENS : (i + 1) * TEXT_TOKENS]) for i in range(n)]

    def prompt(self, n_tokens: int) -> list[int]:
        """A prompt of exactly `n_tokens`: held-out rows one after the other, as a server would see them."""
        stream: list[int] = []
        for row in self.heldout:
            stream += row.ids
            if len(stream) >= n_tokens:
                break
        while len(stream) < n_tokens:
            stream += stream
        return stream[:n_tokens]


def check_files(data: Data, *, trained: bool) -> None:
    """Read the rows and refuse what can be refused before a model is there; `trained` where some stage learns them.

    Raises DataError.
    """
    composed = mixture.compose(data)
    train = composed.train
    if trained and all(entry.form != "text" for entry in train):  # a long text becomes several rows
        checks.refuse_few(len(train), data.places)
    if data.general is not None:
        general_text(Path(data.general), "calibrate")
    _named(data, composed.heldout)


def _named(data: Data, heldout: Sequence[Row]) -> list[Row]:
    """Read the rows that a recipe names to calibrate with, if any. Raises DataError where one of them is held out."""
    if data.calibration is None:
        return []
    held = {checks.prompt_digest(row) for row in heldout}
    rows = read_rows(Path(data.calibration))
    for row in rows:
        if checks.prompt_digest(row) in held:
            raise DataError(
                f"{data.calibration} line {row.line} is held out, and nothing but the verdict may look at that; "
                "remove it here or there"
            )
    return rows


def train_rows(data: Data) -> Iterator[Row]:
    """Read the training rows as they were written, copies counted."""
    return (entry.row for entry in mixture.compose(data).train)


def rows_line(data: Data) -> str:
    """Say how many rows there are, and in which formats they were found."""
    composed = mixture.compose(data)
    said = []
    rows: Sequence[mixture.Entry | Row]
    for rows, use in ((composed.train, "to train on"), (composed.heldout, "held out")):
        said.append(f"{len(rows)} {use} ({', '.join(dict.fromkeys(row.form for row in rows))})")
    return f"rows: {', '.join(said)}"


def heldout_rows(data: Data) -> list[Row]:
    """Read the held-out rows as they were written."""
    if data.heldout is None:
        return mixture.compose(data).heldout
    return read_rows(Path(data.heldout), data.format, data.heldout_rows)


def load(data: Data, base: Artifact) -> Workload:
    """Read, check and render the rows for a base model. Raises DataError."""
    return load_for(data, base.path)


def load_for(data: Data, folder: Path) -> Workload:
    """Do so for a folder's tokenizer and golden conversations."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    stop = Golden.read(folder).stop_ids
    composed = mixture.compose(data)
    paths = [Path(source.path) for source in data.sources]
    train, n_too_long, kept = _render_all(composed.train, tokenizer, stop, paths, data.max_length)
    different = (entry.row for entry, _ in groupby(kept))  # copies stand side by side
    talks = list(islice((row for row in different if row.text is None), GOLDEN_ROWS))
    held = [paths[entry.source] for entry in composed.split] or [Path(str(data.heldout))] * len(composed.heldout)
    general = Path(data.general) if data.general else None
    general_ids = token_ids(tokenizer, general_text(general, "calibrate"))
    named = [render_row(row, tokenizer, stop, Path(str(data.calibration))) for row in _named(data, composed.heldout)]
    return Workload(
        train=train,
        heldout=[render_row(row, tokenizer, stop, path) for row, path in zip(composed.heldout, held, strict=True)],
        n_too_long=n_too_long,
        mixture=describe(data, composed, kept),
        golden=_golden(tokenizer, talks, stop),
        calibration_text=general_ids,
        beside_rows=[token for row in named for token in row.ids] or general_ids,
        beside=data.calibration or "general text",
        measured_text=token_ids(tokenizer, general_text(general, "measure")),
        tokenizer=folder,
    )


def _render_all(
    entries: Sequence[mixture.Entry], tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], paths: Sequence[Path],
    max_length: int,
) -> tuple[RenderedRows, int, list[mixture.Entry]]:  # fmt: skip
    """Render each row once. Gives the rows that fit, how many do not, and the entries of which something fits.

    Raises DataError where none fits, and where a source teaches nothing or no end.
    """
    rows, kept, n_too_long, shortest = RenderedRows(), list[mixture.Entry](), 0, sys.maxsize
    own = [rows[:0] for _ in paths]
    before, places, too_long = None, list[int](), 0
    for entry in entries:
        if before is None or (entry.source, entry.place) != (before.source, before.place):
            windows = _windows(entry.row, tokenizer, stop, paths[entry.source], max_length)
            places = [rows.write(one) for one in windows if len(one.ids) <= max_length]
            shortest = min(shortest, *(len(one.ids) for one in windows))
            too_long = len(windows) - len(places)
            own[entry.source].come(places)
            before = entry
        rows.come(places)
        n_too_long += too_long
        if places:
            kept.append(entry)
    if not kept:
        raise DataError(
            f"{paths[0]}: every row is longer than max_length={max_length} tokens (shortest {shortest}); raise it"
        )
    for path, part in zip(paths, own, strict=True):
        if part:
            checks.refuse_untaught(part, stop, path)
    return rows, n_too_long, kept


def _golden(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Row], stop: Sequence[int]) -> Golden:
    """Training's own conversations; those of a base where it has none, so that the template is still held to."""
    if talks or not tokenizer.chat_template:
        return trained_golden(tokenizer, talks, stop)
    return make_golden(tokenizer, GOLDEN, stop)


class _Ids(Sequence[Sequence[int]]):
    """The token ids of rows, each read when it is asked for."""

    def __init__(self, rows: Sequence[Rendered]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index].ids


def _windows(
    row: Row, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], path: Path, max_length: int
) -> list[Rendered]:
    try:
        return render_windows(row, tokenizer, stop, max_length)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def render_row(row: Row, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], path: Path) -> Rendered:
    """Render one row of a file. Raises DataError naming file and line."""
    try:
        return render(row, tokenizer, stop)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize general text, no special tokens; the first 400,000 characters are plenty."""
    ids: list[int] = tokenizer(text[:400_000], add_special_tokens=False)["input_ids"]
    return ids
