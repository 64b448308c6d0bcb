"""Do two runtimes that hold the same weights give the same logits? Shapes: T positions, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import ContractError

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Tolerance:
    """How far logits may lie apart. A bound that is None is not held."""

    max_abs: float | None = None
    mean_kl: float | None = None
    top1_agreement: float | None = None


# float16 weights and activations. Measured on the 135M model: 4e-6 and 7e-6, with weights in blocks of int4 1e-5.
HALF = Tolerance(mean_kl=1e-3)


@dataclass(frozen=True)
class ParityResult:
    """How far the logits of a runtime lie from a reference, over all positions."""

    max_abs: float
    mean_kl: float  # KL(reference || runtime), nats a position
    top1_agreement: float  # share of positions with the same argmax
    n_positions: int

    def note(self, tolerance: Tolerance) -> dict[str, Any]:
        """Give the manifest's entry: four significant digits, and the tolerance that was held."""
        return {
            "max_abs": float(f"{self.max_abs:.4g}"),
            "mean_kl": float(f"{self.mean_kl:.4g}"),
            "top1_agreement": float(f"{self.top1_agreement:.4g}"),
            "n_positions": self.n_positions,
            "tolerance": {name: bound for name, bound in vars(tolerance).items() if bound is not None},
        }


def parity(
    reference: Iterable[Logits], runtime: Iterable[Logits], see: Callable[[int, Logits, Logits], None] | None = None
) -> ParityResult:
    """Compare texts' logits, each [T, V], pair by pair; both may be generators. `see` is shown each pair, too.

    Raises ContractError where shapes differ or a logit is not finite.
    """
    max_abs, kl, same, n = 0.0, 0.0, 0, 0
    for index, (a, b) in enumerate(zip(reference, runtime, strict=True)):
        if a.shape != b.shape:
            raise ContractError(f"logits of golden text {index}: the reference gives {a.shape}, the runtime {b.shape}")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ContractError(f"logits of golden text {index} are not finite")
        if see is not None:
            see(index, a, b)
        for row_a, row_b in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
            p, q = _log_softmax(row_a), _log_softmax(row_b)
            max_abs = max(max_abs, float(np.abs(row_a - row_b).max()))
            kl += float((np.exp(p) * (p - q)).sum())
            same += int(row_a.argmax() == row_b.argmax())
            n += 1
    if n == 0:
        raise ContractError("no golden text to compare logits on")
    return ParityResult(max_abs, kl / n, same / n, n)


def hold(result: ParityResult, tolerance: Tolerance, what: str = "the export") -> None:
    """Raise ContractError where a result lies outside its tolerance."""
    broken = []
    if tolerance.max_abs is not None and not result.max_abs <= tolerance.max_abs:
        broken.append(f"largest difference {result.max_abs:.3g} > {tolerance.max_abs:g}")
    if tolerance.mean_kl is not None and not result.mean_kl <= tolerance.mean_kl:
        broken.append(f"mean KL {result.mean_kl:.3g} > {tolerance.mean_kl:g}")
    if tolerance.top1_agreement is not None and not result.top1_agreement >= tolerance.top1_agreement:
        broken.append(f"top-1 agreement {result.top1_agreement:.3g} < {tolerance.top1_agreement:g}")
    if broken:
        raise ContractError(
            f"logits of {what} differ from the same weights in torch on {result.n_positions} golden positions: "
            + ", ".join(broken)
        )


def torch_logits(model: Any, ids: Sequence[int]) -> Logits:
    """Give a Transformers model's float32 logits of every position of one text, [T, V]."""
    import torch

    device = next(model.parameters()).device
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    logits: Logits = out.logits[0].float().cpu().numpy()
    return logits


def _log_softmax(row: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = row - row.max()
    out: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return out
