"""What training a model would take, from its `config.json` alone: no weights, no rows, no work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgetune import workload
from edgetune.errors import RecipeError, SourceError
from edgetune.estimate import Counts
from edgetune.recipe import Recipe
from edgetune.recipe_training import Adapt
from edgetune.training_memory import GB, Lengths, Shape, fitted, number_bytes, peak_bytes, said

METHODS = ("qlora", "lora", "full")  # what is shown where no recipe names one
ROW_TOKENS = 512  # of each row, every one learned, where there are no rows


@dataclass(frozen=True)
class Way:
    """One method: how it would be trained, and its peak in GB of 10^9 bytes; or why it would not."""

    method: str
    how: str
    peak_gb: float | None


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
    config: dict[str, Any], recipe: Recipe | None = None, memory_gb: float | None = None, device: str = "cuda"
) -> list[Way]:
    """Predict each method, or the one of a recipe on rows as long as its own.

    Raises UnsupportedError for an unknown architecture.
    """
    shape, lengths, asked = Shape.of(config), Lengths(((ROW_TOKENS, ROW_TOKENS),)), [Adapt(method=m) for m in METHODS]
    if recipe is not None:
        if recipe.adapt is None:
            raise RecipeError("adapt is null, there is no training to plan")
        lengths, asked = Counts.guess(workload.train_rows(recipe.data)).lengths, [recipe.adapt]
    b = 2 if device.startswith("cuda") else number_bytes(device)  # such a GPU need not be here
    return list(_ways(asked, shape, lengths, memory_gb, device, b))


def _ways(
    asked: Sequence[Adapt], shape: Shape, lengths: Lengths, memory_gb: float | None, device: str, b: int
) -> list[Way]:
    ways = []
    for config in asked:
        if memory_gb is not None:
            config = config.model_copy(update={"memory_gb": memory_gb})
        try:
            chosen = fitted(config, shape, lengths, device, b)
        except RecipeError as error:
            ways.append(Way(config.method, str(error).partition(": ")[2].partition(";")[0], None))
            continue
        ways.append(Way(config.method, said(chosen), peak_bytes(chosen, shape, lengths, device, b) / GB))
    return ways
