"""GPTQ inside a GGUF file: llama.cpp finds the grid of each block, codes are chosen so that outputs change least.

llama.cpp rounds each weight by itself (weighed by its input's moment). GPTQ (arXiv:2210.17323) lets the columns that
follow make up for each error. Types, scales, minima and the size of the file stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.backends import require
from edgetune.export.gguf_blocks import CODED, Grid, read_blocks, with_codes
from edgetune.export.gguf_families import change, family
from edgetune.export.gguf_write import Weights, tensors
from edgetune.progress import Report

if TYPE_CHECKING:
    from torch import Tensor

    from edgetune.compress.scheme import Quantized

KEPT = "Q8_0"  # eight bits are close enough as they are


def choose_codes(
    file: Path, source: Artifact, weights: Weights, model_config: Mapping[str, Any], rows: NDArray[np.int64], *,
    work: Path, key: str, device: str, progress: Report,
) -> tuple[dict[str, Any], list[str]]:  # fmt: skip
    """Give the matrices of a quantized file other codes, in place; returns notes for the manifest and what fell back.

    `source` is the float `model` artifact and rows [N, T] are token ids. Each layer is calibrated on what the layers
    before it give with their new codes. Finished blocks are kept in `work` under `key`.
    Raises StageError naming the layer.
    """
    import torch

    from edgetune.compress.layerwise import quantize_blocks
    from edgetune.compress.streamed import open_model

    gguf = require("gguf")
    of = family(model_config)
    reader = gguf.GGUFReader(file, "r+")
    written = {tensor.name: tensor for tensor in reader.tensors}
    stored = {hf: written[name] for name, hf in tensors(weights, model_config)}

    def found(name: str) -> tuple[str, NDArray[np.uint8], Grid]:
        """Type, codes and grid of a layer, rows in Transformers' order."""
        tensor, moved = stored[f"{name}.weight"], change(f"{name}.weight", of)
        kind = tensor.tensor_type.name
        codes, grid = read_blocks(kind, tensor.data, int(tensor.shape[0]))
        if moved is not None:
            codes, scale, minimum = (moved.back(part, model_config) for part in (codes, grid.scale, grid.minimum))
            grid = Grid(scale, minimum, grid.max_code)
        return kind, codes, grid

    def solve(
        names: Sequence[str], weight: Tensor, hessian: Tensor | None, _: Tensor | None
    ) -> tuple[Quantized, tuple[str, ...]]:
        assert hessian is not None, "there are rows"
        return _solve([found(name) for name in names], weight, hessian)

    model: Any = open_model(source)
    embedding = stored["model.embed_tokens.weight"]
    rounded = gguf.quants.dequantize(embedding.data, embedding.tensor_type)
    table = model.get_input_embeddings()
    made = torch.from_numpy(rounded.reshape(table.weight.shape)).to(table.weight.dtype)
    table.weight = torch.nn.Parameter(made, requires_grad=False)
    results = quantize_blocks(model, rows, solve, work=work, key=key, device=device, progress=progress, fast=True)
    n_chosen = 0
    for name, result in results.items():
        tensor, moved = stored[f"{name}.weight"], change(f"{name}.weight", of)
        if tensor.tensor_type.name == KEPT:
            continue
        codes = result.quantized.q.numpy()
        codes = moved.there(codes, model_config) if moved is not None else codes
        data = with_codes(tensor.tensor_type.name, tensor.data, codes)
        tensor.data[...] = data.reshape(tensor.data.shape)
        n_chosen += 1
    reader.data.flush()
    errors = [result.relative_error for result in results.values()]
    notes = {"gptq": {"matrices": n_chosen, "mean_relative_error": round(sum(errors) / len(errors), 6)}}
    return notes, [f"{name}: {line}" for name, result in results.items() for line in result.fallbacks]


def _solve(
    layers: list[tuple[str, NDArray[np.uint8], Grid]], weight: Tensor, hessian: Tensor
) -> tuple[Quantized, tuple[str, ...]]:
    """Solve the layers that share an input, stacked in `weight` [R, C], each on its own grid."""
    import torch

    from edgetune.compress.gptq import gptq_codes
    from edgetune.compress.scheme import Quantized

    C, start = weight.shape[1], 0
    n_groups = max(grid.scale.shape[1] for _, _, grid in layers)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    said: tuple[str, ...] = ()
    for kind, codes, grid in layers:
        scale, minimum = torch.from_numpy(grid.scale), torch.from_numpy(grid.minimum)
        q = torch.from_numpy(codes)
        if kind in CODED:
            device = weight.device
            part = weight[start : start + len(q)]
            q, said = gptq_codes(part, hessian, scale.to(device), minimum.to(device), grid.max_code)
        start += len(q)
        # where a group has no scale it is its minimum: a scale of that size, and the one code 0
        zero = torch.where(scale == 0, (minimum != 0).float(), minimum / scale)
        scale = torch.where(scale == 0, minimum, scale)
        wider = n_groups // scale.shape[1]
        parts.append((q.cpu(), scale.repeat_interleave(wider, 1), zero.repeat_interleave(wider, 1)))
    q, scales, zeros = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return Quantized(q, scales, zeros, (torch.arange(C) // (C // n_groups)).int()), said
