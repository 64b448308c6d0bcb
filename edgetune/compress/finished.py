"""One quantized block on disk, so that a walk that was killed goes on after it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgetune.compress.architectures import SHARED_INPUTS
from edgetune.compress.correction import Pair, corrected_weight
from edgetune.compress.scheme import Quantized


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer. `relative_error` is tr(E H E^T) / tr(W H W^T); H is the identity without calibration.

    `pair` is what was fitted to E, if anything was, and E what is left. `tuned` is the relative error of the block's
    output before and after its scales were learned, which `relative_error` precedes.
    """

    quantized: Quantized
    relative_error: float
    fallbacks: tuple[str, ...]
    pair: Pair | None = None
    tuned: tuple[float, float] | None = None

    def weight(self) -> Tensor:
        """Give the weight [R, C] that the layer stands for, float32."""
        return corrected_weight(self.quantized.dequantize(), self.pair)


def write_block(file: Path, key: str, done: dict[str, LayerResult]) -> None:
    """Keep one finished block, whole or not at all."""
    tensors = {f"{n}.{part}": t.contiguous() for n, r in done.items() for part, t in vars(r.quantized).items()}
    for n, r in done.items():
        tensors |= {f"{n}.{part}": t.contiguous() for part, t in zip("AB", r.pair or (), strict=False)}
    layers = {
        n: {"relative_error": r.relative_error, "fallbacks": list(r.fallbacks), "tuned": r.tuned}
        for n, r in done.items()
    }
    beside = file.with_suffix(".part")
    save_file(tensors, beside, metadata={"edgetune": json.dumps({"key": key, "layers": layers})})
    with beside.open("rb") as stream:
        os.fsync(stream.fileno())
    beside.replace(file)


def read_block(file: Path, key: str, prefix: str) -> dict[str, LayerResult] | None:
    """Give a finished block again, or None where there is none of this walk."""
    try:
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("edgetune", "{}"))
            if about.get("key") != key:
                return None
            found = {name: _layer(stored, name, entry) for name, entry in about["layers"].items()}
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # cut by a kill, or never written: the block is done again and gives the same bytes
    expected = {f"{prefix}.{name}" for group in SHARED_INPUTS for name in group}
    return found if set(found) == expected else None


def _layer(stored: Any, name: str, entry: dict[str, Any]) -> LayerResult:
    quantized = Quantized(*(stored.get_tensor(f"{name}.{part}") for part in Quantized.__dataclass_fields__))
    paired = f"{name}.A" in stored.keys()  # noqa: SIM118
    pair = (stored.get_tensor(f"{name}.A"), stored.get_tensor(f"{name}.B")) if paired else None
    tuned = (entry["tuned"][0], entry["tuned"][1]) if entry["tuned"] else None
    return LayerResult(quantized, float(entry["relative_error"]), tuple(entry["fallbacks"]), pair, tuned)
