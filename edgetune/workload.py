"""What is measured on: held-out rows as token ids, general text, and prompts of fixed length for latency."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.artifact import Artifact
from edgetune.data import checks
from edgetune.data.calibration import CalibrationSet, make_calibration
from edgetune.data.formats import Row, read_rows
from edgetune.data.general import general_text
from edgetune.data.golden import Golden, make_golden
from edgetune.data.render import Rendered, render
from edgetune.data.windows import render_windows
from edgetune.recipe import Calibration, Data

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
    train = read_rows(Path(data.train), data.format, data.train_rows)
    heldout = read_rows(Path(data.heldout), data.format, data.heldout_rows)
    checks.refuse_leaks(train, heldout, Path(data.train), Path(data.heldout))


def heldout_rows(data: Data) -> list[Row]:
    """Read the held-out rows as they were written."""
    return read_rows(Path(data.heldout), data.format, data.heldout_rows)


def load(data: Data, base: Artifact) -> Workload:
    """Read, check and render the rows for a base model. Raises DataError."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.path, local_files_only=True)
    stop = Golden.read(base.path).stop_ids
    train_path, heldout_path = Path(data.train), Path(data.heldout)
    train_rows = read_rows(train_path, data.format, data.train_rows)
    heldout_rows = read_rows(heldout_path, data.format, data.heldout_rows)
    checks.refuse_leaks(train_rows, heldout_rows, train_path, heldout_path)
    rendered = [one for row in train_rows for one in render_windows(row, tokenizer, stop, data.max_length)]
    train, n_too_long = checks.fit(rendered, data.max_length, train_path)
    heldout = [render(row, tokenizer, stop) for row in heldout_rows]
    talks = [row.as_dicts for row in train_rows[:GOLDEN_ROWS] if row.text is None]
    general = Path(data.general) if data.general else None
    return Workload(
        train=train,
        heldout=heldout,
        n_too_long=n_too_long,
        golden=make_golden(tokenizer, talks, stop),
        calibration_text=token_ids(tokenizer, general_text(general, "calibrate")),
        measured_text=token_ids(tokenizer, general_text(general, "measure")),
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize general text, no special tokens; the first 400,000 characters are plenty."""
    ids: list[int] = tokenizer(text[:400_000], add_special_tokens=False)["input_ids"]
    return ids
