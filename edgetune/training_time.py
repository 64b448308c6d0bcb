"""Seconds of training by arithmetic: operations of a step over the speed of a device's matrix products.

That is all there is for a model or a device that is not here. Where both are, `adapt.step_time` measures steps instead.

Letters: those of `training_memory`.
"""

from __future__ import annotations

import time
from math import ceil
from typing import TYPE_CHECKING

from edgetune.recipe_training import LORA, PAIRED, Adapt, Prefer, Training
from edgetune.training_memory import RECOMPUTING, Lengths, Shape

if TYPE_CHECKING:
    import torch

SHARE = 0.5  # of the speed of its matrix products, which training reaches
# Of one pass forward and back through a block: small operations, however few the rows. On a GPU from the H100's steps
# of a 135M model, 0.25 to 0.34 s for 30 blocks.
BLOCK_S = {"cpu": 0.017, "cuda": 0.01}
PRODUCT = (512, 768, 1024)  # rows, columns and what is summed over, of a product that speed is measured on


def matmul_gflops(
    dtype: torch.dtype, device: str = "cpu", product: tuple[int, int, int] = PRODUCT, seconds: float = 0.3
) -> float:
    """Measure a device's matrix product speed, a CPU's on all of torch's threads, in GFLOP/s."""
    import torch

    M, K, N = product
    a, b = torch.randn(M, K, device=device).to(dtype), torch.randn(K, N, device=device).to(dtype)

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    torch.mm(a, b)
    wait()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        torch.mm(a, b)
        wait()
        times.append(time.perf_counter() - began)
    return 2 * M * K * N / sorted(times)[len(times) // 2] / 1e9


def gflops_of(device: str, shape: Shape) -> float | None:
    """Measure a device on products as wide as a shape's, in the dtype that it trains in; None where it is not here."""
    import torch

    from edgetune.devices import compute_dtype

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        return None
    return matmul_gflops(compute_dtype(device), device, (PRODUCT[0], shape.C, shape.I))


def steps_of(config: Training, n_rows: int) -> int:
    """Give the optimizer steps of a training on so many rows."""
    return config.max_steps or ceil(config.epochs * ceil(n_rows / config.batch_size))


def step_seconds(config: Adapt, shape: Shape, lengths: Lengths, gflops: float, device: str) -> float:
    """Predict seconds of an optimizer step on rows of mean length, from GFLOP/s of matrix products."""
    passes = config.batch_size // (config.micro_batch_size or config.batch_size)
    mean_tokens, mean_labels = lengths.mean
    tokens, labels = config.batch_size * mean_tokens + passes * lengths.shared, config.batch_size * mean_labels
    lora = config.r * shape.lora_per_rank if config.method in LORA else 0
    flop = tokens * ((6 if config.method == "full" else 4) * shape.linear + 6 * lora) + 4 * labels * shape.V * shape.C
    flop *= RECOMPUTING if config.gradient_checkpointing else 1.0
    small = BLOCK_S["cuda" if device.startswith("cuda") else "cpu"]
    return passes * shape.n_layers * small + flop / (gflops * 1e9 * SHARE)


def preference_step_seconds(config: Prefer, shape: Shape, lengths: Lengths, gflops: float, device: str) -> float:
    """Predict seconds of an optimizer step of preference training; what GRPO samples is not in it.

    All but ORPO read each sequence once more for the reference, KTO each and one beside it, and make logits twice.
    """
    passes = config.batch_size // (config.micro_batch_size or config.batch_size)
    tokens = config.batch_size * (2 if config.method in PAIRED else 1) * lengths.mean[0]
    once_more = {"orpo": 0, "kto": 6, "grpo": 2 if config.beta else 0}.get(config.method, 2)
    flop = tokens * ((4 + once_more) * shape.linear + 6 * config.r * shape.lora_per_rank)
    flop += tokens * ((4 if config.method == "orpo" else 6) + once_more) * shape.V * shape.C
    flop *= RECOMPUTING if config.gradient_checkpointing else 1.0
    small = passes * shape.n_layers * BLOCK_S["cuda" if device.startswith("cuda") else "cpu"] * (1 + once_more / 4)
    return small + flop / (gflops * 1e9 * SHARE)
