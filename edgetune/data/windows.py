"""Continued pretraining: a plain text that is longer than a row may be is cut into windows, and no token is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgetune.data.formats import Row
from edgetune.data.render import Rendered, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render_windows(
    row: Row, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], max_length: int
) -> list[Rendered]:
    """Render one row; a plain text becomes as many rows as it needs.

    A window begins with the last token of the one before, so that every token but the first is learned once.
    """
    whole = render(row, tokenizer, stop_ids)
    if row.text is None or len(whole.ids) <= max_length or max_length < 2:
        return [whole]
    starts = range(0, len(whole.ids) - 1, max_length - 1)
    windows = [whole.ids[start : start + max_length] for start in starts]
    return [Rendered(ids, (False, *[True] * (len(ids) - 1)), 1, "", row.line) for ids in windows]
