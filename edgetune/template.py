"""The recipe that `edgetune init` writes."""

from __future__ import annotations

_TEXT = """\
# A recipe says what to adapt, how to make it small, and what "ship" means.
# edgetune plan FILE checks it, edgetune run FILE does it. Every key: docs/recipe.md.
name: my-model
base: {base}                  # pkg:NAME, org/model, ./folder or ./file.gguf

data:
  train: train.jsonl          # JSONL, JSON, CSV or Parquet; what a row may be: docs/data.md
  heldout: heldout.jsonl      # rows that training must not show; a row in both files is refused

adapt:
  method: qlora               # base in NF4; lora keeps it in 16 bits
  r: 16
  alpha: 32
  learning_rate: 1.0e-3
  epochs: 1
  batch_size: 16

candidates:                   # each is built, measured in its own runtime and judged
  q4-gguf:
    export: {{gguf: {{type: Q4_K_M}}}}
  q4-onnx:
    compress: [{{gptq: {{bits: 4, group_size: 32, sym: false}}}}]
    export: {{onnx: {{precision: int4}}}}

bench:
  prompt_tokens: [32, 256]
  new_tokens: 64
  threads: 2

budgets:                      # a budget that is left out is not judged
  accuracy: {{metric: exact_match, max_loss: 0.02, confidence: 0.95}}
  itl_ms_p95: 50              # of bench.repeats x bench.runs generations; the median, itl_ms_p50, needs fewer
  ttft_ms_p50: 1000           # ttft_ms_p95 needs 59 generations
  size_mb: 150
  peak_memory_mb: 800
"""


def recipe_text(base: str) -> str:
    """Give a commented recipe for a base model."""
    return _TEXT.format(base=base)
