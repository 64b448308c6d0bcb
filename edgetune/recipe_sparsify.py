"""Zeros in a model of stock shapes: the step `sparsify` of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from edgetune.closed import Closed
from edgetune.recipe_export import Calibration

SIXTIES = {2 * 60 + 4: "2:4", 4 * 60 + 8: "4:8"}  # YAML 1.1 reads 2:4 as minutes and seconds where it is not quoted


class Sparsify(Closed):
    """Set weights to zero: Wanda (arXiv:2306.11695), SparseGPT (arXiv:2301.00774); no runtime here is faster for it."""

    method: Literal["wanda", "sparsegpt", "magnitude"] = Field(
        "sparsegpt",
        description="wanda: least |weight| times input size go; sparsegpt: weights that stay make up for those that "
        "go; magnitude: least |weight| go, without any rows",
    )
    sparsity: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="share of the weights that become zero")
    pattern: Literal["unstructured", "2:4", "4:8"] = Field(
        "unstructured",
        description="where zeros lie: anywhere, or two in each four columns of a row, four in each eight",
    )
    calibration: Calibration | None = Field(
        None, exclude_if=lambda value: value is None,
        description="rows to calibrate on, its defaults where absent; magnitude reads none",
    )  # fmt: skip

    @property
    def group(self) -> int:
        """Columns of which half become zero; 0 where zeros may lie anywhere."""
        return 0 if self.pattern == "unstructured" else int(self.pattern[-1])

    @field_validator("pattern", mode="before")
    @classmethod
    def _unquoted(cls, pattern: Any) -> Any:
        return SIXTIES.get(pattern, pattern) if isinstance(pattern, int) else pattern

    @model_validator(mode="before")
    @classmethod
    def _calibrated(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("method") != "magnitude" and given.get("calibration") is None:
            return {**given, "calibration": Calibration()}
        return given

    @model_validator(mode="after")
    def _fits(self) -> Sparsify:
        if self.method == "magnitude" and self.calibration is not None:
            raise ValueError("calibration is not read by method magnitude; remove it")
        if self.group and self.sparsity != 0.5:
            raise ValueError(f"pattern {self.pattern} makes half of the weights zero; remove sparsity: {self.sparsity}")
        return self
