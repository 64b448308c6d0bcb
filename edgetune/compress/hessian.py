"""The second-order statistics of a layer's inputs, and the triangular factor that GPTQ walks along.

H = 2/N X^T X (arXiv:2210.17323, section 3). Shapes: N inputs seen, R out-features, C in-features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edgetune.errors import StageError

RETRIES = (1, 10, 100)  # times damp_percent, tried in turn
DIRECT = 192  # rows of a triangular matrix that are inverted by substitution
WHOLE, STEP = 4096, 1024  # columns up to which LAPACK factors a copy; rows or columns of a matrix at a time
PANEL, PANELS = 192, 8  # a symmetric product is made of so wide pieces at least, and so many at most


class Hessian:
    """Running mean of 2 x x^T over all inputs seen, in float32 unless another dtype is named.

    `fast` sums the float32 products of bfloat16 values: exact where the inputs are bfloat16, and twice as fast on AMX.
    """

    def __init__(
        self, in_features: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
        fast: bool = False,
    ) -> None:  # fmt: skip
        self._mean = torch.zeros(in_features, in_features, device=device, dtype=dtype)
        self._symmetric = True
        self.n_inputs = 0
        self.fast = fast

    @property
    def H(self) -> Tensor:  # noqa: N802
        """The mean [C, C]; what is below the panels of a symmetric one is put in here."""
        if self._symmetric:
            for start, stop in _panels(len(self._mean)):
                self._mean[stop:, start:stop] = self._mean[start:stop, stop:].T
        return self._mean

    def add(self, inputs: Tensor, others: Tensor | None = None) -> None:
        """Take in a batch x [.., C]; with `others` y, of the same shape, the mean is of 2 y x^T."""
        C, dtype = len(self._mean), self._mean.dtype
        X = inputs.reshape(-1, C).to(dtype)
        Y = X if others is None else others.reshape(X.shape).to(dtype)
        self._symmetric = others is None
        seen = self.n_inputs + X.shape[0]
        # A mean that runs, instead of a sum that is divided at the end: the size stays that of one input.
        shares: Any = {"beta": self.n_inputs / seen, "alpha": 2 / seen}
        with _bfloat16_products() if self.fast else nullcontext():
            for start, stop in _panels(C) if self._symmetric else [(0, C)]:
                left, above = slice(start, stop), start if self._symmetric else 0
                self._mean[left, above:].addmm_(Y[:, left].T, X[:, above:], **shares)
        self.n_inputs = seen


def _panels(n: int) -> list[tuple[int, int]]:
    """Cut n columns into panels: of a symmetric product each needs only what is not left of it."""
    width = max(PANEL, -(-n // PANELS))
    return [(start, min(start + width, n)) for start in range(0, n, width)]


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices as bfloat16 ones; sums and results stay float32."""
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@dataclass(frozen=True)
class Factor:
    """Upper triangular M with H + damp = M M^T."""

    upper: Tensor  # [C, C]
    damp_percent: float  # what was needed, not what was asked
    n_dead: int
    fallbacks: tuple[str, ...]


@dataclass(frozen=True)
class InverseFactor:
    """Upper triangular U with (H + damp)^-1 = U^T U."""

    upper: Tensor  # [C, C] float64
    damp_percent: float  # what was needed, not what was asked
    n_dead: int
    fallbacks: tuple[str, ...]


def damped_factor(hessian: Tensor, damp_percent: float, order: Tensor | None = None) -> Factor:
    """Damp H and factor it, in its own dtype; of a wide H one copy is in memory.

    hessian [C, C]; order [C] permutes its columns and rows.
    The damping is `damp_percent` (a share, 0.01 is one percent) of the mean diagonal of the columns that were ever
    active. A dead column gets that mean as its diagonal, so that it is rounded to nearest.
    Where H is not positive definite, ten and a hundred times the damping are tried, and said in `fallbacks`.
    Raises StageError where H is not finite, or no damping helps.
    """
    if not all_finite(hessian):
        raise StageError("the Hessian is not finite: an activation overflowed; check the calibration rows")
    C = len(hessian)
    order = torch.arange(C, device=hessian.device) if order is None else order
    backwards = order.flip(0)  # M is the Cholesky factor of H read backwards
    diagonal = hessian.diagonal()[backwards]
    dead = diagonal <= 0
    n_dead = int(dead.sum())
    mean = float(diagonal[~dead].mean(dtype=torch.float64)) if n_dead < C else 1.0
    fallbacks = [f"{n_dead} of {C} input columns were never active: rounded to nearest"] if n_dead else []
    for times in RETRIES:
        damped = torch.empty_like(hessian)
        for i in range(0, C, STEP):
            damped[i : i + STEP] = hessian[backwards[i : i + STEP]].index_select(1, backwards)
        if n_dead:
            damped[dead, :] = 0
            damped[:, dead] = 0
            damped.diagonal()[dead] = mean
        damped.diagonal().add_(damp_percent * times * mean)
        upper = _backwards(damped)
        if upper is not None:
            if times > 1:
                fallbacks.append(
                    f"the Hessian needed damp_percent={damp_percent * times:g}, {damp_percent:g} was asked"
                )
            return Factor(upper, damp_percent * times, n_dead, tuple(fallbacks))
    raise StageError(
        f"the Hessian is not positive definite, even with damp_percent={damp_percent * RETRIES[-1]:g}; "
        "give more calibration rows or a larger damp_percent"
    )


def inverse_factor(hessian: Tensor, damp_percent: float, order: Tensor | None = None) -> InverseFactor:
    """Damp H and factor its inverse, in float64; else as `damped_factor`."""
    factor = damped_factor(hessian.to(torch.float64), damp_percent, order)
    _invert(factor.upper)  # U = M^-1
    return InverseFactor(factor.upper, factor.damp_percent, factor.n_dead, factor.fallbacks)


def output_loss(difference: Tensor, hessian: Tensor, *, fast: bool = False) -> float:
    """Give tr(E H E^T): twice the mean squared error that a weight difference [R, C] makes in a layer's output.

    `fast` rounds both to bfloat16 and sums in float32: 1e-4 off, and several times as fast on AMX.
    """
    E, loss = difference.to(hessian.dtype), 0.0
    with _bfloat16_products() if fast else nullcontext():
        for start, stop in _panels(len(hessian)):
            panel = hessian[start:, start:stop].clone()
            panel[: stop - start] /= 2  # what is right of it counts twice, as H is symmetric
            loss += 2 * float((E[:, start:] @ panel).mul_(E[:, start:stop]).sum())
    return loss


def all_finite(x: Tensor) -> bool:
    """Tell whether no value is infinite or NaN; the sum mostly tells, far cheaper than a look at each value."""
    return math.isfinite(float(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)))) or bool(
        torch.isfinite(x).all()
    )


def _backwards(H: Tensor) -> Tensor | None:
    """Give the Cholesky factor of H, which is used up, read backwards; None where H is not positive definite."""
    n = len(H)
    if n <= WHOLE:
        lower, info = torch.linalg.cholesky_ex(H)
        return lower.flip(0, 1) if int(info) == 0 and all_finite(lower) else None
    for i in range(0, n, STEP):
        j = min(i + STEP, n)
        H[i:, i:j] -= H[i:, :i] @ H[i:j, :i].T
        lower, info = torch.linalg.cholesky_ex(H[i:j, i:j])
        if int(info) or not all_finite(lower):
            return None
        H[i:j, i:j], H[i:j, j:] = lower, 0
        H[j:, i:j] = torch.linalg.solve_triangular(lower.T, H[j:, i:j], upper=True, left=False)
    for i in range(0, n // 2, STEP):  # turned by half a turn, in place
        j = min(i + STEP, n // 2)
        first = H[i:j].flip(0, 1)
        H[i:j] = H[n - j : n - i].flip(0, 1)
        H[n - j : n - i] = first
    if n % 2:
        H[n // 2] = H[n // 2].flip(0)
    return H


def _invert(upper: Tensor) -> None:
    """Invert an upper triangular matrix in place, by halves, so that most of the work is plain products."""
    n = len(upper)
    if n <= DIRECT:
        unit = torch.eye(n, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, unit, upper=True))
        return
    h = n // 2
    _invert(upper[:h, :h])
    _invert(upper[h:, h:])
    upper[:h, h:] = (upper[:h, :h] @ (upper[:h, h:] @ upper[h:, h:])).neg_()
