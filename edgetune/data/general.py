"""General text for calibration and perplexity: the user's file, or the prose that every Python carries.

`pydoc_data.topics` holds some 700 KB of English (Python's language reference, PSF licence). Its first half calibrates,
its second half measures, so that no text does both. The general probe is questions with choices.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgetune.data.formats import read_rows

Half = Literal["calibrate", "measure"]
PROBE = "pkg:edgetune"  # in a recipe: the questions that come with the package


def general_text(path: Path | None, half: Half) -> str:
    """Give one half of the general text. Raises DataError where the user's file cannot be read."""
    if path is not None:
        rows = read_rows(path)
        texts = [row.text if row.text is not None else "\n".join(c for _, c in row.messages) for row in rows]
    else:
        from pydoc_data.topics import topics

        texts = list(dict.fromkeys(" ".join(topics[key].split()) for key in sorted(topics)))  # some stand there twice
    middle = (len(texts) + 1) // 2
    return "\n\n".join(texts[:middle] if half == "calibrate" else texts[middle:])


def probe_file(name: str) -> Path:
    """Give the rows of a recipe's general probe: those that come with the package, or the user's file."""
    return Path(__file__).with_name("general_probe.jsonl") if name == PROBE else Path(name)
