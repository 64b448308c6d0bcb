"""What training a model would take, memory and time, from its `config.json` alone: no weights, no rows, no work."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import workload
from edgetune.counts import Counts
from edgetune.errors import RecipeError, SourceError
from edgetune.recipe import Recipe
from edgetune.recipe_training import Adapt
from edgetune.training_memory import GB, Lengths, Shape, fitted, number_bytes, peak_bytes, said
from edgetune.training_time import gflops_of, step_seconds, steps_of

METHODS = ("qlora", "lora", "full")  # what is shown where no recipe names one
ROW_TOKENS = 512  # of each row, every one learned, where there are no rows


@dataclass(frozen=True)
class Way:
    """One method: how it would be trained, its peak in GB of 10^9 bytes and seconds of a step; or why it would not."""

    method: str
    how: str
    peak_gb: float | None
    step_s: float | None = None  # None, too, where the device is not here
    all_s: float | None = None  # of all steps, where a recipe or the caller tells how many rows there are


def read_shape(path: Path) -> dict[str, Any]:
    """Read a `config.json`, or the one in a folder. Raises SourceError where there is none."""
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
        raise SourceError(f"{file}: cannot be read ({why}); give the config.json of a model, or its folder") from error
    if not isinstance(config, dict):
        raise SourceError(f"{file}: holds a JSON {type(config).__name__}; give the config.json of a model")
    return config


def shape_plan(
    config: dict[str, Any], recipe: Recipe | None = None, memory_gb: float | None = None, device: str = "cuda",
    gflops: float | None = None, n_rows: int | None = None,
) -> list[Way]:  # fmt: skip
    """Predict each method, or the one of a recipe on rows as long as its own.

    Time is that of `gflops`, of matrix products in the dtype of training; without it the device is measured, if it is
    here. `n_rows` are trained on, a recipe's own where it is None. Raises UnsupportedError for an unknown architecture.
    """
    shape, lengths, asked = Shape.of(config), Lengths(((ROW_TOKENS, ROW_TOKENS),)), [Adapt(method=m) for m in METHODS]
    if recipe is not None:
        if recipe.adapt is None:
            raise RecipeError("adapt is null, there is no training to plan")
        lengths, asked = Counts.guess(workload.train_rows(recipe.data)).lengths, [recipe.adapt]
        n_rows = n_rows or len(lengths.rows)
    gflops = gflops or gflops_of(device, shape)
    return [_way(config, shape, lengths, memory_gb, device, gflops, n_rows) for config in asked]


def _way(
    config: Adapt, shape: Shape, lengths: Lengths, memory_gb: float | None, device: str, gflops: float | None,
    n_rows: int | None,
) -> Way:  # fmt: skip
    b = 2 if device.startswith("cuda") else number_bytes(device)  # such a GPU need not be here
    if memory_gb is not None:
        config = config.model_copy(update={"memory_gb": memory_gb})
    try:
        chosen = fitted(config, shape, lengths, device, b)
    except RecipeError as error:
        return Way(config.method, str(error).partition(": ")[2].partition(";")[0], None)
    peak_gb = peak_bytes(chosen, shape, lengths, device, b) / GB
    if gflops is None:
        return Way(config.method, said(chosen), peak_gb)
    step_s = step_seconds(chosen, shape, lengths, gflops, device)
    all_s = None if n_rows is None else steps_of(chosen, n_rows) * step_s
    return Way(config.method, said(chosen), peak_gb, step_s, all_s)
