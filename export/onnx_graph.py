"""What stands in an ONNX graph of the onnxruntime-genai builder: its packed weights, read back and compared.

MatMulNBits packs a weight [R, C] as uint8 [R, G, n * bits / 8], low bits first; scales [R * G]; zero points as bits of
rows, each row padded to a whole byte, absent where they are the middle. Shapes: R out-features, C in-features,
G groups of n columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.errors import ContractError

if TYPE_CHECKING:
    from edgetune.compress.scheme import Quantized

_NODE = re.compile(r"/model/layers\.(\d+)/(attn|mlp)/([a-z_]+)/MatMulNBits")
# What the builder fuses into one node, in the order of its rows.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Packed:
    """The weight of one MatMulNBits node, unpacked."""

    node: str
    bits: int
    block_size: int
    q: NDArray[np.uint8]  # [R, C]
    scales: NDArray[np.float32]  # [R, G]
    zero_point: NDArray[np.uint8]  # [R, G]
    output: str

    def dequantize(self) -> NDArray[np.float32]:
        """Give the weight [R, C]."""
        centred = self.q.astype(np.float32) - np.repeat(self.zero_point, self.block_size, 1)[:, : self.q.shape[1]]
        weight: NDArray[np.float32] = centred * np.repeat(self.scales, self.block_size, 1)[:, : self.q.shape[1]]
        return weight


def read_packed(graph: Path) -> dict[str, Packed]:
    """Read every MatMulNBits node of a graph, by its name. Raises ContractError for one that reorders columns."""
    onnx = require("onnx")
    model = onnx.load(str(graph), load_external_data=False)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def array(name: str) -> NDArray[Any]:
        found: NDArray[Any] = onnx.numpy_helper.to_array(stored[name], base_dir=str(graph.parent))
        return found

    packed = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        inputs = [*node.input, "", "", ""]
        if inputs[4]:
            raise ContractError(f"{node.name} reorders its columns by g_idx; the runtime has no fast kernel for that")
        at = {a.name: a.i for a in node.attribute}
        bits, block, R, C = at["bits"], at["block_size"], at["N"], at["K"]
        G = -(-C // block)
        zero = np.full((R, G), 2 ** (bits - 1), np.uint8)
        if inputs[3]:
            zero = _unpack(array(inputs[3]).reshape(R, -1), bits)[:, :G]
        packed[node.name] = Packed(
            node.name, bits, block, _unpack(array(inputs[1]).reshape(R, -1), bits)[:, :C],
            array(inputs[2]).astype(np.float32).reshape(R, G), zero, node.output[0],
        )  # fmt: skip
    return packed


def prove_integers(packed: Mapping[str, Packed], layers: Mapping[str, Quantized]) -> int:
    """Hold every packed layer to the checkpoint: codes, scales and zero points bit for bit; give their number.

    Raises ContractError naming the first layer that differs, is missing or is not of the checkpoint.
    """
    left = dict(layers)
    for node in packed.values():
        match = _NODE.fullmatch(node.node)
        if match is None:
            if not _is_head(node):
                raise ContractError(f"{node.node} quantizes a layer that the checkpoint does not")
            continue
        number, room, name = match.groups()
        row = 0
        inside = f"model.layers.{number}.{'self_attn' if room == 'attn' else room}"
        for part in (name,) if f"{inside}.{name}" in left else _FUSED.get(name, (name,)):
            layer = f"{inside}.{part}"
            if layer not in left:
                raise ContractError(f"{node.node} quantizes {layer}, which the checkpoint does not")
            ours = left.pop(layer)
            _same(layer, node, ours, slice(row, row := row + len(ours.q)))
        if row != len(node.q):
            raise ContractError(f"{node.node} has {len(node.q)} rows, the checkpoint {row}")
    if left:
        raise ContractError(f"layer {min(left)} of the checkpoint is not in the graph as integers")
    return len(layers)


def head_of(packed: Mapping[str, Packed]) -> Packed:
    """Give the output head's node. Raises ContractError where it is not quantized."""
    for node in packed.values():
        if _is_head(node):
            return node
    raise ContractError("the output head is not quantized, so the graph is not the one that was asked for")


def with_float_activations(graph: Path, out: Path) -> None:
    """Write a copy that computes with float activations (accuracy_level 0), over the same data file."""
    model = _load(graph)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 0
    _save(model, out)


def operators_of(graph: Path) -> dict[str, Any]:
    """Give how many of each operator a graph has, and the versions of their sets."""
    model = _load(graph)
    operators = Counter(node.op_type for node in model.graph.node)
    return {"operators": dict(sorted(operators.items())), "opset": {o.domain: o.version for o in model.opset_import}}


def _is_head(node: Packed) -> bool:
    """Tell the output head, whether or not its logits are scaled and capped by nodes after it."""
    return node.output == "logits" or node.node.startswith("/lm_head/")


def _same(layer: str, node: Packed, ours: Quantized, rows: slice) -> None:
    pairs = (
        ("codes", node.q[rows], ours.q.numpy()),
        ("scales", node.scales[rows], ours.scales.float().numpy()),
        ("zero points", node.zero_point[rows], ours.zero_point.numpy()),
    )
    for what, found, wanted in pairs:
        if found.shape != wanted.shape:
            raise ContractError(f"{what} of {layer}: the graph has {found.shape}, the checkpoint {wanted.shape}")
        wrong = int((found != wanted).sum())
        if wrong:
            raise ContractError(f"{what} of {layer}: {wrong} of {wanted.size} differ from the checkpoint")


def _unpack(words: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Unpack the bytes of each row [R, W] to values [R, W * 8 / bits], low bits first."""
    if bits == 8:
        return words
    assert bits == 4, bits
    return np.stack([words & 15, words >> 4], -1).reshape(len(words), -1)


def _load(graph: Path) -> Any:
    return require("onnx").load(str(graph), load_external_data=False)


def _save(model: Any, out: Path) -> None:
    out.write_bytes(model.SerializeToString(deterministic=True))
