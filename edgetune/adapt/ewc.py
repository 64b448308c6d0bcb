"""Elastic weight consolidation (arXiv:1612.00796): ewc / 2 sum(F (W - W0)^2) is added to the loss.

F is the diagonal of the Fisher information of the base on general text, for each token, its labels drawn from the
base's own distribution. To second order 1/2 sum(F (W - W0)^2) is the KL divergence that the update makes there, so
`ewc: 1` weighs a nat of it like a nat of the loss.

F comes from the squared gradients of rows. Under LoRA only its sums over the rows and columns of a weight [R, C] are
kept, and F[i, j] is taken for G[i] X[j], which has the same sums (Adafactor, arXiv:1804.04235, section 3). Then for the
update s B A the penalty is s^2 sum(B^T G B * A X A^T): two products of rank r, no dense update.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

N_ROWS, N_TOKENS = 32, 128  # of general text that F is estimated on


def general_rows(ids: Sequence[int]) -> list[list[int]]:
    """Cut general text into the rows that F is estimated on."""
    n = min(N_ROWS, len(ids) // N_TOKENS)
    return [list(ids[i * N_TOKENS : (i + 1) * N_TOKENS]) for i in range(n)]


class Consolidation:
    """The penalty on what was trained so far. Made before training, when the weights are the base's own."""

    def __init__(self, model: nn.Module, ewc: float, rows: Sequence[Sequence[int]], seed: int) -> None:
        self._ewc = ewc
        self._lora: list[Any] = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]
        was_training = model.training
        model.eval()
        if self._lora:
            self._factors = factored_fisher(model, self._lora, rows, seed)
        else:
            fisher = diagonal_fisher(model, rows, seed)
            self._start = [(p, p.detach().clone(), F) for p, F in fisher]
        model.zero_grad(set_to_none=True)
        model.train(was_training)

    def __call__(self) -> Tensor:
        """Give ewc / 2 sum(F (W - W0)^2) as a scalar that has a gradient."""
        if not self._lora:
            parts = [(F * (p - start).square()).sum() for p, start, F in self._start]
        else:
            parts = []
            for layer, (G, X) in zip(self._lora, self._factors, strict=True):
                for name in layer.active_adapters:
                    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight  # [r, C], [R, r]
                    parts.append(layer.scaling[name] ** 2 * ((B.t() * G @ B) * (A * X @ A.t())).sum())
        return 0.5 * self._ewc * torch.stack(parts).sum()


def diagonal_fisher(model: nn.Module, rows: Sequence[Sequence[int]], seed: int) -> list[tuple[nn.Parameter, Tensor]]:
    """Give each trained weight with its F. Labels of a row are drawn apart, so the row's gradient may be squared."""
    trained = [p for p in model.parameters() if p.requires_grad]
    fisher = [torch.zeros_like(p) for p in trained]
    n_tokens = 0
    for loss, n in _drawn_losses(model, rows, seed):
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
        for F, grad in zip(fisher, grads, strict=True):
            if grad is not None:
                F += grad.square()
        n_tokens += n
    return [(p, F / n_tokens) for p, F in zip(trained, fisher, strict=True)]


def factored_fisher(
    model: nn.Module, layers: Sequence[Any], rows: Sequence[Sequence[int]], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Give for each layer G [R] and X [C], whose product has the sums of F over rows and columns."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    n_tokens = 0
    with _watched(layers, sums):
        for loss, n in _drawn_losses(model, rows, seed):
            loss.backward()  # type: ignore[no-untyped-call]
            n_tokens += n
    found = []
    for layer in layers:
        of_rows, of_columns = sums[id(layer)]
        found.append((of_rows / n_tokens, of_columns / of_columns.sum().clamp(min=1e-30)))
    return found


@contextmanager
def _watched(layers: Sequence[Any], sums: dict[int, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the block sum the squares of the gradient that each backward would give a layer's weight."""

    def seen(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)  # [T, C]
        output.register_hook(lambda grad: add(layer, grad, x))  # type: ignore[no-untyped-call]

    def add(layer: nn.Module, grad: Tensor, x: Tensor) -> None:
        squares = (grad.flatten(0, -2).t() @ x).float().square()  # [R, C]
        of_rows, of_columns = sums.get(id(layer), (0.0, 0.0))
        sums[id(layer)] = (of_rows + squares.sum(1), of_columns + squares.sum(0))

    hooks = [layer.register_forward_hook(seen) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drawn_losses(model: nn.Module, rows: Sequence[Sequence[int]], seed: int) -> Iterator[tuple[Tensor, int]]:
    """Give each row's summed loss on labels drawn from the model's own distribution, and its number of tokens."""
    draw = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    for row in rows:
        logits = model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float()  # [T, V]
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=draw)[:, 0]
        yield functional.cross_entropy(logits, labels.to(device), reduction="sum"), len(row)
