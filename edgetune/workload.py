"""What is measured on: held-out rows as token ids, general text, and prompts of fixed length for latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.artifact import Artifact
from edgetune.data import checks, mixture
from edgetune.data.calibration import CalibrationSet, make_calibration
from edgetune.data.formats import Row, read_rows
from edgetune.data.general import general_text
from edgetune.data.golden import Golden, trained_golden
from edgetune.data.provenance import Mixture, describe
from edgetune.data.render import Rendered, render
from edgetune.data.windows import render_windows
from edgetune.errors import DataError
from edgetune.recipe import Calibration
from edgetune.recipe_data import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GOLDEN_ROWS = 8
TEXT_ROWS, TEXT_TOKENS = 4, 256  # general text for perplexity


@dataclass(frozen=True)
class Workload:
    """Everything that a recipe's data gives, rendered for one base model."""

    train: list[Rendered]
    heldout: list[Rendered]
    n_too_long: int  # training rows left out
    mixture: Mixture  # where each training row comes from
    golden: Golden
    calibration_text: list[int]  # general text that calibrates
    measured_text: list[int]  # general text that measures; shares nothing with the former

    def calibration(self, config: Calibration, seed: int) -> CalibrationSet:
        return make_calibration(
            [row.ids for row in self.train],
            self.calibration_text,
            n_samples=config.n_samples,
            n_tokens=config.n_tokens,
            general_share=config.general_share,
            seed=seed,
        )

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


def check_files(data: Data) -> None:
    """Read the rows and refuse what can be refused before a model is there. Raises DataError."""
    mixture.compose(data)


def train_rows(data: Data) -> list[Row]:
    """Read the training rows as they were written, copies counted."""
    return [entry.row for entry in mixture.compose(data).train]


def rows_line(data: Data) -> str:
    """Say how many rows there are, and in which formats they were found."""
    composed = mixture.compose(data)
    said = []
    for rows, use in (([entry.row for entry in composed.train], "to train on"), (composed.heldout, "held out")):
        said.append(f"{len(rows)} {use} ({', '.join(dict.fromkeys(row.form for row in rows))})")
    return f"rows: {', '.join(said)}"


def heldout_rows(data: Data) -> list[Row]:
    """Read the held-out rows as they were written."""
    if data.heldout is None:
        return mixture.compose(data).heldout
    return read_rows(Path(data.heldout), data.format, data.heldout_rows)


def load(data: Data, base: Artifact) -> Workload:
    """Read, check and render the rows for a base model. Raises DataError."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    stop = Golden.read(base.path).stop_ids
    composed = mixture.compose(data)
    paths = [Path(source.path) for source in data.sources]
    once = {id(entry.row): entry for entry in composed.train}
    made = {
        key: _windows(entry.row, tokenizer, stop, paths[entry.source], data.max_length) for key, entry in once.items()
    }
    rendered = [one for entry in composed.train for one in made[id(entry.row)]]
    train, n_too_long = checks.fit(rendered, data.max_length, paths[0])
    kept = [e for e in composed.train if any(len(one.ids) <= data.max_length for one in made[id(e.row)])]
    for index, path in enumerate(paths):
        own = [one for entry in kept if entry.source == index for one in made[id(entry.row)]]
        if own:
            checks.refuse_untaught(own, stop, path)
    talks = [entry.row for entry in list(once.values())[:GOLDEN_ROWS] if entry.row.text is None]
    held = [paths[entry.source] for entry in composed.split] or [Path(str(data.heldout))] * len(composed.heldout)
    general = Path(data.general) if data.general else None
    return Workload(
        train=train,
        heldout=[_render(row, tokenizer, stop, path) for row, path in zip(composed.heldout, held, strict=True)],
        n_too_long=n_too_long,
        mixture=describe(data, composed, kept),
        golden=trained_golden(tokenizer, talks, stop),
        calibration_text=token_ids(tokenizer, general_text(general, "calibrate")),
        measured_text=token_ids(tokenizer, general_text(general, "measure")),
    )


def _windows(
    row: Row, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], path: Path, max_length: int
) -> list[Rendered]:
    try:
        return render_windows(row, tokenizer, stop, max_length)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _render(row: Row, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], path: Path) -> Rendered:
    try:
        return render(row, tokenizer, stop)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize general text, no special tokens; the first 400,000 characters are plenty."""
    ids: list[int] = tokenizer(text[:400_000], add_special_tokens=False)["input_ids"]
    return ids
