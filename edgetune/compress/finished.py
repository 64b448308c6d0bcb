"""Finished blocks on disk: a walk that was killed goes on after them, and none needs to be in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from edgetune.compress.architectures import SHARED_INPUTS
from edgetune.compress.correction import Pair, corrected_weight
from edgetune.compress.masks import Sparse
from edgetune.compress.scheme import Quantized

KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Quantized, Sparse)}  # what a solver may make
Made = TypeVar("Made", Quantized, Sparse)
T = TypeVar("T")


@dataclass(frozen=True)
class LayerResult(Generic[Made]):
    """One finished layer. `relative_error` is tr(E H E^T) / tr(W H W^T); H is the identity without calibration.

    `pair` is what was fitted to E, if anything was, and E what is left. `tuned` is the relative error of the block's
    output before and after its grids were learned, which `relative_error` precedes, and where they may move, how many
    zero points moved. `damping` is the one that was chosen.
    """

    quantized: Made
    relative_error: float
    fallbacks: tuple[str, ...]
    pair: Pair | None = None
    tuned: tuple[float, ...] | None = None
    damping: float | None = None

    def weight(self) -> Tensor:
        """Give the weight [R, C] that the layer stands for, float32."""
        return corrected_weight(self.quantized.dequantize(), self.pair)


class Lazily(Mapping[str, T]):
    """Values by name, each got anew whenever it is looked at, and kept by nobody."""

    def __init__(self, names: Iterable[str], get: Callable[[str], T]) -> None:
        self._names, self._get = dict.fromkeys(names), get

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_block(file: Path, key: str, done: dict[str, LayerResult[Made]]) -> None:
    """Keep one finished block, whole or not at all."""
    tensors = {f"{n}.{part}": t.contiguous() for n, r in done.items() for part, t in vars(r.quantized).items()}
    for n, r in done.items():
        tensors |= {f"{n}.{part}": t.contiguous() for part, t in zip("AB", r.pair or (), strict=False)}
    layers = {
        n: {
            "kind": type(r.quantized).__name__,
            "relative_error": r.relative_error,
            "fallbacks": list(r.fallbacks),
            "tuned": r.tuned,
            "damping": r.damping,
        }
        for n, r in done.items()
    }
    keep_tensors(file, tensors, {"key": key, "layers": layers})


def keep_tensors(file: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Keep some tensors, and what is to be known of them, whole or not at all."""
    beside = file.with_suffix(".part")
    save_file(tensors, beside, metadata={"edgetune": json.dumps(about)})
    with beside.open("rb") as stream:
        os.fsync(stream.fileno())
    beside.replace(file)


def read_block(file: Path, key: str, prefix: str) -> dict[str, LayerResult[Any]] | None:
    """Give a finished block again, or None where there is none of this walk."""
    try:
        with safe_open(file, framework="pt") as stored:
            about = json.loads((stored.metadata() or {}).get("edgetune", "{}"))
            if about.get("key") != key:
                return None
            found = {name: _layer(stored, name, about) for name in about["layers"]}
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # cut by a kill, or never written: the block is done again and gives the same bytes
    expected = {f"{prefix}.{name}" for group in SHARED_INPUTS for name in group}
    return found if set(found) == expected else None


def read_layer(file: Path, name: str) -> LayerResult[Any]:
    """Give one layer of a finished block; its codes are mapped."""
    with safe_open(file, framework="pt") as stored:
        return _layer(stored, name, json.loads(stored.metadata()["edgetune"]))


def _layer(stored: Any, name: str, about: dict[str, Any]) -> LayerResult[Any]:
    entry = about["layers"][name]
    kind = KINDS[entry["kind"]]
    made = kind(*(stored.get_tensor(f"{name}.{part}") for part in kind.__dataclass_fields__))
    paired = f"{name}.A" in stored.keys()  # noqa: SIM118
    pair = (stored.get_tensor(f"{name}.A"), stored.get_tensor(f"{name}.B")) if paired else None
    tuned = tuple(entry["tuned"]) if entry["tuned"] else None
    damping = entry.get("damping")  # blocks that were finished before there was a choice have no such entry
    return LayerResult(made, float(entry["relative_error"]), tuple(entry["fallbacks"]), pair, tuned, damping)
