"""Long texts become windows in which every token but the first is learned once."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from edgetune.data.formats import Row
from edgetune.data.render import render
from edgetune.data.windows import render_windows
from tests.conftest import tiny_tokenizer


@pytest.mark.parametrize("max_length", [2, 5, 6, 7, 100])
def test_every_token_but_the_first_is_learned_once(tmp_path: Path, max_length: int) -> None:
    tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = Row((), "set the light in the kitchen to 30 percent at 7", 4)
    whole = render(row, tokenizer, [2])
    windows = render_windows(row, tokenizer, [2], max_length)
    assert (len(windows) > 1) == (len(whole.ids) > max_length)
    assert all(2 <= len(window.ids) <= max_length for window in windows)
    learned = [t for window in windows for t, label in zip(window.ids, window.labels, strict=True) if label]
    assert learned == list(whole.ids[1:])
    assert {window.line for window in windows} == {4}


def test_a_conversation_is_never_cut(tmp_path: Path) -> None:
    tiny_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    row = Row((("user", "set the light to 30"), ("assistant", '{"level":30}')), None, 1)
    assert render_windows(row, tokenizer, [2], 4) == [render(row, tokenizer, [2])]
