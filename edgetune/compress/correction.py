"""A low-rank matrix beside the integers: EoRA (arXiv:2410.21271) and LQER (arXiv:2402.02446), kept as a LoRA adapter.

With E = W - Q, what rounding lost, and H the second moments of the layer's inputs, tr((E - BA) H (E - BA)^T) is the
layer's squared output error. EoRA takes its minimum of rank r: it projects E by the eigenvectors of H, cuts the
singular value decomposition off at r and projects back. That is B A = U U^T E, with U the first r eigenvectors of
E H E^T, which needs no inverse and so no damping. LQER scales columns by the size of their inputs alone: H without
what columns covary. (Its sizes are mean magnitudes, here they are root mean squares, of which H's diagonal is made.)
Shapes: R out-features, C in-features, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgetune.artifact import write_text
from edgetune.compress.hessian import all_finite
from edgetune.errors import ArtifactError, StageError

FOLDER = "correction"  # within a checkpoint; beside config.json Transformers would take the checkpoint for an adapter
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
Pair = tuple[Tensor, Tensor]  # A [r, C] and B [R, r]


def low_rank(error: Tensor, hessian: Tensor, rank: int, method: Literal["eora", "lqer"] = "eora") -> Pair:
    """Give A [r, C] and B [R, r], float64, whose product takes most off the output error of a weight error [R, C].

    hessian [C, C] = 2/N X^T X. Raises StageError where it is not finite.
    """
    E, H = error.double(), hessian.double()
    if not all_finite(H):
        raise StageError("the Hessian is not finite: an activation overflowed; check the calibration rows")
    R, C = E.shape
    if R <= C:
        weighed = E @ H if method == "eora" else E * H.diagonal()
        B = torch.linalg.eigh(weighed @ E.T).eigenvectors[:, -rank:].flip(1)  # the largest first
    else:  # the same space from the smaller side: M = E H^1/2, and M M^T is what is above
        values, vectors = torch.linalg.eigh(H)
        M = E @ (vectors * values.clamp(min=0).sqrt()) if method == "eora" else E * H.diagonal().sqrt()
        B = torch.linalg.qr(M @ torch.linalg.eigh(M.T @ M).eigenvectors[:, -rank:].flip(1)).Q
    return B.T @ E, B


def write_correction(checkpoint: Path, pairs: Mapping[str, Pair]) -> None:
    """Write the pairs of all layers, by full name, as a peft adapter in a folder of the checkpoint."""
    folder = checkpoint / FOLDER
    folder.mkdir()
    rank = len(next(iter(pairs.values()))[0])
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "inference_mode": True,
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in pairs.items():
        tensors |= {f"{_PREFIX}{name}.lora_A.weight": A.contiguous(), f"{_PREFIX}{name}.lora_B.weight": B.contiguous()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_text(folder / CONFIG, json.dumps(config, indent=1, sort_keys=True) + "\n")


def read_correction(checkpoint: Path) -> dict[str, Pair]:
    """Read what `write_correction` wrote; nothing where a checkpoint has none. Raises ArtifactError."""
    file = checkpoint / FOLDER / WEIGHTS
    if not (checkpoint / FOLDER).is_dir():
        return {}
    try:
        stored = load_file(file)
        names = [key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in stored if ".lora_A." in key]
        pairs = {name: tuple(stored.pop(f"{_PREFIX}{name}.lora_{part}.weight") for part in "AB") for name in names}
    except (OSError, SafetensorError, KeyError) as error:
        raise ArtifactError(f"{file} is damaged or missing ({str(error).splitlines()[0]}); make it again") from error
    if stored:
        raise ArtifactError(f"{file} holds {sorted(stored)[0]}, which belongs to no pair; make it again")
    return pairs  # type: ignore[return-value]


def corrected_weight(weight: Tensor, pair: Pair | None) -> Tensor:
    """Add B A to a dequantized weight [R, C]; the sum is in the weight's dtype."""
    if pair is None:
        return weight
    A, B = (part.to(weight) for part in pair)
    return torch.addmm(weight, B, A)
