"""The `pack-quantized` format of compressed-tensors, which vLLM and transformers read.

    NAME.weight_packed int32 [R, C * bits / 32]    NAME.weight_scale float16 [R, G]
    NAME.weight_shape  int64 [2]                   NAME.weight_zero_point int32 [R * bits / 32, G], asymmetric only

Codes and zero points are packed as AutoGPTQ packs them (`packing`), but codes along C, and a last word may be filled in
part. 2 to 8 bits; `config_groups` tells which layers have which. Shapes: R out-features, C in-features, G groups of
neighbouring columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from edgetune.compress.config_groups import matched, read_groups, written_groups
from edgetune.compress.packing import pack, unpack, values_in_unit
from edgetune.compress.scheme import Quantized, Scheme, plain_groups
from edgetune.errors import ArtifactError, UnsupportedError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def quantization_config(schemes: Mapping[str, Scheme], method: str) -> dict[str, Any]:
    """Give what goes under `quantization_config` in config.json, from the scheme of each layer."""
    return {
        "quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": written_groups(schemes), "meta": {"quantizer": ["edgetune"], "method": method},
    }  # fmt: skip


def packed(name: str, layer: Quantized, bits: int, *, sym: bool) -> dict[str, Tensor]:
    """Give the tensors of a layer. Raises UnsupportedError where its columns have left their groups."""
    C, G = layer.q.shape[1], layer.scales.shape[1]
    if not torch.equal(layer.g_idx, torch.arange(C, dtype=layer.g_idx.dtype) // (C // G)):
        raise UnsupportedError(f"{name}: compressed-tensors keeps columns in their groups; set static_groups: true")
    parts = {
        "weight_packed": _pack(layer.q.T, bits).T.contiguous(),
        "weight_scale": layer.scales.contiguous(),
        "weight_shape": torch.tensor(layer.q.shape),
    }
    return parts if sym else parts | {"weight_zero_point": _pack(layer.zero_point, bits)}


def read_schemes(config: dict[str, Any], folder: str) -> Callable[[str], tuple[int, int]]:
    """Give what tells the bits and the group size (-1: the whole row) of a layer by its name.

    Raises UnsupportedError for another kind than is read here; what is given raises ArtifactError for a layer of no
    group.
    """
    groups = read_groups(config.get("config_groups"), FORMAT)
    if config.get("format") != FORMAT or groups is None:
        raise UnsupportedError(
            f"{folder}: of compressed-tensors, {FORMAT} can be read: integers of 2, 3, 4, 5, 6 or 8 bits, activations "
            "as they are, no actorder, targets that are names, patterns or Linear"
        )

    def of(name: str) -> tuple[int, int]:
        if (group := matched(name, groups)) is None:
            raise ArtifactError(f"{folder}: layer {name} is in no group of config_groups; make it again")
        return group.bits, group.group_size

    return of


def unpacked(parts: dict[str, Tensor], bits: int, group_size: int | None) -> Quantized:
    """Undo `packed`. Raises KeyError, RuntimeError, TypeError or ValueError where tensors are missing or do not fit."""
    R, C = (int(size) for size in parts["weight_shape"].tolist())
    q = _unpack(parts["weight_packed"].T, bits).T[:, :C].contiguous().to(torch.uint8)
    scales = parts["weight_scale"].contiguous()
    G = scales.shape[1]
    if "weight_zero_point" in parts:
        zero_point = _unpack(parts["weight_zero_point"], bits)[:R].contiguous()
    else:
        zero_point = torch.full((R, G), 2 ** (bits - 1), dtype=torch.int32)
    return Quantized(q, scales, zero_point, plain_groups(C, group_size, G))


def _pack(values: Tensor, bits: int) -> Tensor:
    """Pack values [K, n] along K into ceil(K * bits / 32) words."""
    K = len(values)
    filled = torch.nn.functional.pad(values, (0, 0, 0, -K % values_in_unit(bits)))
    return pack(filled, bits)[: -(-K * bits // 32)].contiguous()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Undo `_pack`; what stands beyond K are zeros."""
    in_unit = values_in_unit(bits) * bits // 32
    return unpack(torch.nn.functional.pad(words, (0, 0, 0, -len(words) % in_unit)), bits)
