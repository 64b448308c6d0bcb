"""docs/support.md says what is so: every cell is made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.export import support
from tests.export.test_gguf_families import MODELS

for module in ("gguf", "llama_cpp", "onnx", "onnxruntime_genai", "tensorrt_rtx"):
    pytest.importorskip(module)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_page_says_what_is_made(model: str, tmp_path: Path) -> None:
    text = support.PAGE.read_text(encoding="utf-8")
    notes = dict(line.split(". ", 1) for line in text.splitlines() if line[:1].isdigit())
    for chain, row in support.rows_of(model, tmp_path).items():
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {model} |") and chain in _chains(line))
        said = [notes.get(cell, cell) for cell in line.strip("| ").split(" | ")[2:]]
        assert said == [row[name] for name in support.FORMATS], chain


def _chains(line: str) -> list[str]:
    return line.split(" | ")[1].split("; ")


def test_a_page_names_each_note_once() -> None:
    row = dict.fromkeys(support.FORMATS, "why not") | {"GGUF Q8_0": "yes"}
    text = support.page({"llama": {"nothing": row, "pruned": row, "GPTQ int4": row | {"GGUF Q8_0": "other"}}})
    assert "| llama | nothing; pruned | yes | 1 | 1 | 1 | 1 | 1 | 1 |" in text
    assert "| llama | GPTQ int4 | 2 | 1 | 1 | 1 | 1 | 1 | 1 |" in text
    assert text.endswith("1. why not\n2. other\n")
