"""Damping chosen layer by layer, by the error on rows that a layer was not solved with.

GPTQ (arXiv:2210.17323, section 3.3) adds a share of H's mean diagonal to H: too little, and the codes fit the noise of
the calibration rows; too much, and columns no longer make up for one another. Here every fourth row is held out. A
layer is solved on the moments of the others with each of DAMPINGS, and the one whose codes lose least on the rows held
out is taken to solve it once more, on all rows.
Shapes: R out-features, C in-features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edgetune.compress.hessian import Hessian, output_loss
from edgetune.errors import DataError, StageError

DAMPINGS = (0.002, 0.01, 0.05, 0.2)
EVERY = 4  # rows, the last of which is held out


@dataclass(frozen=True)
class Moments:
    """H [C, C] of some rows, the cross moments of `gptaq.py` where asked for, and the number of inputs seen."""

    H: Tensor
    cross: Tensor | None
    n_inputs: int


class Seen:
    """Collects the moments of a layer's inputs; with `apart` those of every fourth row by themselves."""

    def __init__(self, in_features: int, *, apart: bool, **kwargs: Any) -> None:
        """`kwargs` are those of `Hessian`."""
        self._new = partial(Hessian, in_features, **kwargs)
        self._parts = [[self._new()] for _ in range(1 + apart)]

    def add(self, X: Tensor, floats: Tensor | None, first_row: int) -> None:
        """Take in rows [B, T, C] from `first_row` on, and what the float model shows the layer, if it is followed."""
        held = torch.arange(first_row, first_row + len(X), device=X.device) % EVERY == EVERY - 1
        for part, chosen in zip(self._parts, [~held, held] if len(self._parts) > 1 else [None], strict=True):
            x, f = (t if t is None or chosen is None else t[chosen] for t in (X, floats))
            if x is None or not len(x):
                continue
            part[0].add(x)
            if f is not None:
                if len(part) == 1:
                    part.append(self._new())
                part[1].add(x, f - x)

    @property
    def parts(self) -> list[Moments]:
        """The moments of all rows, or those of the rows that are shown and those of the rows held out."""
        return [Moments(H.H, cross[0].H if cross else None, H.n_inputs) for H, *cross in self._parts]


def least_damping(
    solvers: Mapping[float, Any], names: Sequence[str], weight: Tensor, parts: Sequence[Moments]
) -> float:
    """Give the damping, of those that `solvers` have, whose codes of a weight [R, C] lose least on the rows held out.

    `solvers` are those of `layerwise.quantize_blocks`, `parts` the moments of the rows shown and of those held out.
    Of equal losses the larger damping is taken. Raises StageError where none of them can be solved with.
    """
    shown, held = parts
    if not held.n_inputs:
        raise DataError(f"damping: held-out holds out every {EVERY}th calibration row, and there are fewer; give more")
    losses: dict[float, float] = {}
    failed = StageError("no damping can be solved with")
    for damping, solve in solvers.items():
        try:
            made, _ = solve(names, weight, shown.H, shown.cross)
        except StageError as error:
            failed = error
            continue
        losses[damping] = heldout_loss(weight, made.dequantize(), held)
    if not losses:
        raise failed
    return min(losses, key=lambda damping: (losses[damping], -damping))


def heldout_loss(weight: Tensor, made: Tensor, held: Moments) -> float:
    """Give twice the mean squared distance of a layer's output from its aim, without what no choice of `made` changes.

    With E = W - Q that is tr(E H E^T): the aim is W on the same inputs. With cross moments D it is what the float model
    gave on its own, and 2 tr(W D E^T) is added.
    """
    E = weight - made.to(weight.dtype)
    loss = output_loss(E, held.H)
    if held.cross is not None:
        loss += 2 * float(((weight @ held.cross) * E).sum(dtype=torch.float64))
    return loss


def joined(parts: list[Moments]) -> tuple[Tensor | None, Tensor | None]:
    """Give H [C, C] and the cross moments of all rows, in the memory of the last part; `parts` are used up."""
    if not parts:
        return None, None
    n = sum(part.n_inputs for part in parts)
    whole = parts.pop()
    for part in parts:
        for mine, other in ((whole.H, part.H), (whole.cross, part.cross)):
            if mine is not None and other is not None:
                mine.mul_(whole.n_inputs / n).add_(other, alpha=part.n_inputs / n)
    parts.clear()
    return whole.H, whole.cross
