"""Scales and zero points learned block by block: Block-AP of EfficientQAT (arXiv:2407.11062), without its weights.

GPTQ chooses each layer's integers by that layer alone. Here all scales of a block are then learned together, so that
the block's output comes nearest to what the float model's block gives. A scale is s0 (1 + d); AdamW learns d, so that
one learning rate fits all scales. What is kept is the best of what was seen at CHECKS moments, the beginning included,
with scales rounded to float16 as they are stored. Zero points stay, unless it is said what their weights ask for
(`zero_points.py`): then they are learned as well, and each moment is looked at with them and without, on batches that
are not learned from.
Shapes: B rows of a batch, T tokens, C channels of the residual stream, R out-features, G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edgetune.compress.scheme import SCALE_MAX, SCALE_MIN, Quantized
from edgetune.compress.zero_points import STEP, Reach, shown_and_held

# The weights [R, C] of a block's layers, by name, and a batch's number -> the block's output [B, T, C], and its aim.
Outputs = Callable[[Mapping[str, Tensor], int], tuple[Tensor, Tensor]]
CHECKS = 2  # times that all batches are looked at, beside the first
FARTHEST = 0.5  # share of itself that a scale may move


@dataclass(frozen=True)
class Tuned:
    """The scales [R, G] float16 of each layer, and the block's relative error before and after.

    `zeros` are the zero points [R, G] of each layer, as floats, where moving them is better; else there are none.
    """

    scales: dict[str, Tensor]
    before: float
    after: float
    zeros: dict[str, Tensor] = field(default_factory=dict)

    def applied(
        self, layers: Mapping[str, Quantized], reach: Mapping[str, Reach] | None
    ) -> tuple[dict[str, Quantized], int]:
        """Give the layers on the grids that were learned, and how many zero points moved."""
        made = {name: replace(layer, scales=self.scales[name]) for name, layer in layers.items()}
        if reach is None or not self.zeros:
            return made, 0
        made = {name: reach[name].moved(layer, self.zeros[name]) for name, layer in made.items()}
        return made, sum(int((made[name].zero_point != layer.zero_point).sum()) for name, layer in layers.items())


def tune_scales(
    layers: Mapping[str, Quantized],
    outputs: Outputs,
    n_batches: int,
    *,
    steps: int,
    learning_rate: float,
    reach: Mapping[str, Reach] | None = None,
) -> Tuned:
    """Learn the scales of a block's layers, with `reach` their zero points, so that it comes nearest to the float one.

    `outputs(weights, i)` gives the block's output [B, T, C] for batch i with these weights [R, C], which are float32 or
    as wide as the scales, and the float block's. A token's error is relative to its own size, as the norm that reads it
    sees it. Batches take turns, one a step. Never ends above where it began; with `reach` that is said of batches held
    out. Raises DataError where there are none to hold out.
    """
    shown, held = shown_and_held(n_batches) if reach else 2 * [list(range(n_batches))]
    parts = {name: _parts(layer) for name, layer in layers.items()}
    moved = {name: torch.zeros_like(scales, requires_grad=True) for name, (scales, _, _) in parts.items()}
    dtype = {name: scales.dtype for name, (scales, _, _) in parts.items()}
    zeros = {name: layers[name].zero_point.to(dtype[name], copy=True).requires_grad_() for name in reach or {}}
    learned = [*moved.values(), *zeros.values()]
    groups: list[dict[str, Any]] = [
        {"params": list(values.values()), "rate": learning_rate * times}
        for values, times in ((moved, 1), (zeros, STEP))
        if values
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0.0)
    checks = {steps * (i + 1) // CHECKS for i in range(CHECKS)}

    def scales_now() -> dict[str, Tensor]:
        return {name: _stored(scales * (1 + moved[name])) for name, (scales, _, _) in parts.items()}

    def weights(scales: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, (_, levels, index) in parts.items():
            level = reach[name].levels(zeros[name]) if reach and zeros else levels
            made[name] = level * scales[name].to(levels.dtype)[:, index]
        return made

    @torch.no_grad()
    def error(scales: Mapping[str, Tensor], zeros: Mapping[str, Tensor]) -> float:
        made = weights(scales, zeros)
        found = [_relative(*outputs(made, i)) for i in held]
        return float(torch.stack([part.sum() for part in found]).sum()) / sum(part.numel() for part in found)

    best = {name: layer.scales for name, layer in layers.items()}
    best_zeros: dict[str, Tensor] = {}
    before = least = error(best, {})
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / steps)
        with torch.enable_grad():
            made = weights({name: scales * (1 + moved[name]) for name, (scales, _, _) in parts.items()}, zeros)
            loss = _relative(*outputs(made, shown[step % len(shown)])).mean()
            gradients = torch.autograd.grad(loss, learned)
        for value, gradient in zip(learned, gradients, strict=True):
            value.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for d in moved.values():
                d.clamp_(-FARTHEST, FARTHEST)
        if step + 1 in checks:
            with torch.no_grad():
                scales = scales_now()
            whole = {name: reach[name].rounded(z) for name, z in zeros.items()} if reach else {}
            for tried in [{}, whole] if whole else [{}]:
                found = error(scales, tried)
                if found < least:
                    best, best_zeros, least = scales, tried, found
    return Tuned(best, before, least, best_zeros)


def call_with(block: nn.Module, prefix: str, weights: Mapping[str, Tensor], hidden: Tensor, **kwargs: Any) -> Tensor:
    """Call a block [B, T, C] -> [B, T, C], its layers, named with `prefix`, having other weights."""
    dtype = next(block.parameters()).dtype
    named = {f"{name.removeprefix(prefix)}.weight": weight.to(dtype) for name, weight in weights.items()}
    made: Tensor = functional_call(block, named, (hidden,), kwargs)
    return made


def _parts(layer: Quantized) -> tuple[Tensor, Tensor, Tensor]:
    """Give the scales [R, G], q - zero_point [R, C], and the group of each column."""
    dtype = torch.float64 if layer.scales.dtype == torch.float64 else torch.float32
    index = layer.g_idx.long()
    return layer.scales.to(dtype), layer.q.to(dtype) - layer.zero_point.to(dtype)[:, index], index


def _stored(scales: Tensor) -> Tensor:
    return scales.clamp(SCALE_MIN, SCALE_MAX).half()


def _relative(found: Tensor, target: Tensor) -> Tensor:
    """Give each token's squared error as a share of its target's square, [B, T]."""
    wide = torch.promote_types(target.dtype, torch.float32)
    aim = target.to(wide)
    return (found.to(wide) - aim).square().sum(-1) / aim.square().sum(-1).clamp(min=torch.finfo(wide).tiny)
