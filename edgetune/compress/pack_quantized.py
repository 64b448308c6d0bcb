"""The `pack-quantized` format of compressed-tensors, which vLLM and transformers read.

    NAME.weight_packed int32 [R, C * bits / 32]    NAME.weight_scale float16 [R, G]
    NAME.weight_shape  int64 [2]                   NAME.weight_zero_point int32 [R * bits / 32, G], asymmetric only

Codes and zero points are packed as AutoGPTQ packs them (`packing`), but codes along C, and a last word may be filled in
part. 2 to 8 bits. Shapes: R out-features, C in-features, G groups of neighbouring columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgetune.compress.packing import pack, unpack, values_in_unit
from edgetune.compress.scheme import Quantized, Scheme, plain_groups
from edgetune.errors import UnsupportedError

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def quantization_config(scheme: Scheme, method: str) -> dict[str, Any]:
    """Give what goes under `quantization_config` in config.json."""
    rows = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.sym, "strategy": "channel" if rows else "group",
        "group_size": None if rows else scheme.group_size, "dynamic": False, "actorder": None,
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": METHOD, "format": FORMAT, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "meta": {"quantizer": ["edgetune"], "method": method},
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


def read_scheme(config: dict[str, Any], folder: str) -> tuple[int, int]:
    """Give the bits and the group size (-1: the whole row) of a `quantization_config`.

    Raises UnsupportedError for another kind than is read here.
    """
    groups = config.get("config_groups")
    (group,) = groups.values() if isinstance(groups, dict) and len(groups) == 1 else ({},)
    weights = group.get("weights") if isinstance(group, dict) else None
    weights = weights if isinstance(weights, dict) else {}
    columns: Any = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
    integers = weights.get("type") == "int" and weights.get("strategy") in ("group", "channel")
    plain = integers and isinstance(columns, int) and not group.get("input_activations") and not weights.get("actorder")
    if config.get("format") != FORMAT or not plain or weights.get("num_bits") not in (2, 3, 4, 5, 6, 8):
        raise UnsupportedError(
            f"{folder}: of compressed-tensors, {FORMAT} with one group of layers can be read: integers of 2, 3, 4, "
            "5, 6 or 8 bits, activations as they are, no actorder"
        )
    return int(weights["num_bits"]), int(columns)


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
