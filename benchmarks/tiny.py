"""A tiny model, rows and a recipe that reaches every stage in seconds; what the benchmarks of the machinery run on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "edgetune", "torch", "transformers", "peft", "bitsandbytes", "gguf", "llama-cpp-python", "onnx", "onnxruntime",
    "onnxruntime-genai",
)  # fmt: skip
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # tests.conftest holds the tiny Llama


def make_recipe(folder: Path) -> Path:
    """Write a tiny random Llama, rows and a recipe into `folder`; gives the recipe's file.

    The recipe makes one artifact of each deployable kind: model, adapter, gptq, gguf and onnx.
    """
    from tests.conftest import make_tiny_model

    folder.mkdir(parents=True, exist_ok=True)
    calibration = {"n_samples": 4, "n_tokens": 32}
    recipe: dict[str, Any] = {
        "name": "tiny",
        "base": str(make_tiny_model(folder / "base").path),
        "data": {
            "train": _write_rows(folder / "train.jsonl", 100, 40),
            "heldout": _write_rows(folder / "heldout.jsonl", 500, 6),
        },
        "adapt": {"r": 4, "alpha": 8, "batch_size": 8, "max_steps": 6, "eval_steps": 2, "eval_rows": 4},
        "candidates": {
            "gguf": {"export": {"gguf": {"type": "Q4_0", "calibration": calibration}}},
            "onnx": {
                "compress": [{"gptq": {"group_size": 32, "sym": False, "calibration": calibration}}],
                "export": {"onnx": {}},
            },
        },
        "bench": {"prompt_tokens": [8], "new_tokens": 4, "repeats": 1, "runs": 1, "warmup": 1, "threads": 1},
        "budgets": {"accuracy": {"max_loss": 0.5}, "size_mb": 50},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe, indent=1) + "\n", encoding="utf-8")  # JSON is YAML
    return file


def _write_rows(path: Path, start: int, n: int) -> str:
    rows = [
        {"instruction": "JSON.", "input": f"set light to {i}", "output": f'{{"level":{i}}}'}
        for i in range(start, start + n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
