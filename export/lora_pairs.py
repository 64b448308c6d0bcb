"""The factors of a LoRA adapter as peft stores them, for exporters whose runtimes add B (A x) themselves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.errors import ArtifactError, UnsupportedError

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
Pairs = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass(frozen=True)
class Lora:
    """Module name -> A [r, C] and B [R, r] float32, and what their product is scaled by."""

    pairs: Pairs
    alpha: float  # of alpha / r; rsLoRA (arXiv:2312.03732) has alpha sqrt(r) here
    r: int

    @property
    def scale(self) -> float:
        return self.alpha / self.r


def read_lora(adapter: Artifact) -> Lora:
    """Read an adapter. Raises UnsupportedError where it is more than plain LoRA, ArtifactError where it is damaged."""
    try:
        settings = json.loads((adapter.path / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{adapter.path / 'adapter_config.json'} cannot be read: {error}") from error
    _refuse(adapter.path, settings)
    alpha, r = float(settings["lora_alpha"]), int(settings["r"])
    return Lora(_pairs(adapter.path), alpha * math.sqrt(r) if settings.get("use_rslora") else alpha, r)


def _refuse(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse what adapters of other runtimes cannot say."""
    found = settings.get("peft_type")
    if found != "LORA":
        raise UnsupportedError(f"{folder}: {found} cannot be exported as an adapter, LoRA can; merge it and export")
    kinds = {"use_dora": "DoRA", "alpha_pattern": "alpha_pattern", "rank_pattern": "rank_pattern",
             "modules_to_save": "modules_to_save"}  # fmt: skip
    for key, name in kinds.items():
        if settings.get(key):
            raise UnsupportedError(f"{folder}: {name} cannot be exported as an adapter; merge it and export")
    if settings.get("bias", "none") != "none":
        raise UnsupportedError(f"{folder}: trained biases cannot be exported as an adapter; merge it and export")


def _pairs(folder: Path) -> Pairs:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        stored = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{folder / WEIGHTS} cannot be read: {str(error).splitlines()[0]}") from error
    pairs: Pairs = {}
    for key, A in sorted(stored.items()):
        B = stored.get(key.replace(".lora_A.", ".lora_B."))
        if key.endswith(".lora_A.weight") and B is not None:
            module = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            pairs[module] = (np.ascontiguousarray(A, np.float32), np.ascontiguousarray(B, np.float32))
    unknown = [key for key in stored if not re.search(r"\.lora_[AB]\.weight$", key)]
    if unknown or len(stored) != 2 * len(pairs):
        raise UnsupportedError(f"{folder / WEIGHTS} holds {(unknown or ['half a pair'])[0]}, more than plain LoRA")
    return pairs


def peft_model(base: Path, adapter: Path) -> Any:
    """Load a base with an adapter on it, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True).float()
    return PeftModel.from_pretrained(model, str(adapter)).eval()
