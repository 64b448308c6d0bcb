"""A graph of the onnxruntime-genai builder, its data written anew: files under 2 GB, an embedding of its own in 8 bits.

The builder writes one file whatever its size, and rounds an embedding only where it is the output head too. Shapes: V
vocabulary, C hidden, G groups of n columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgetune.backends import require
from edgetune.export.decoder_layers import EMBEDDING, HEAD_BITS
from edgetune.export.onnx_file import FILE_LIMIT, OnnxFile

BLOCKS = (32, 16)  # columns that share a scale: the first that divides the hidden size


def settle(graph: Path, *, rounds: bool, file_limit: int = FILE_LIMIT) -> None:
    """Make a graph's bytes depend on its content only, round its embedding where `rounds`, keep files under a limit.

    The builder stamps the git commit of whatever repository its own installation happens to lie in, and notes shapes of
    values between, some of which are wrong: constants [1] as scalars, at which onnx's checker refuses the graph. A
    tensor that is larger than the limit has a file of its own.
    """
    model = require("onnx").load(str(graph), load_external_data=False)
    model.producer_version = model.producer_version.partition("+")[0]
    model.doc_string = ""
    del model.graph.value_info[:]
    lookup = _float_lookup(model) if rounds else None
    if lookup is not None or any(file.stat().st_size > file_limit for file in graph.parent.glob(f"{graph.name}.data*")):
        _repack(model, graph, lookup, file_limit)
    graph.write_bytes(model.SerializeToString(deterministic=True))


def _float_lookup(model: Any) -> Any:
    """Give the node that looks tokens up in an embedding of its own in floats; none where it is the head's."""
    stored = {tensor.name for tensor in model.graph.initializer}
    return next((n for n in model.graph.node if n.op_type == "Gather" and n.input[0] == EMBEDDING in stored), None)


def _repack(model: Any, graph: Path, lookup: Any, file_limit: int) -> None:
    """Write all data files anew, from those that are there, which are removed."""
    onnx = require("onnx")
    old = {}
    for file in sorted(graph.parent.glob(f"{graph.name}.data*")):
        old[file.name] = file.rename(file.with_name(f"old.{file.name}"))
    tensors = []
    with OnnxFile(graph, file_limit=file_limit) as new:
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                tensors.append(tensor)
                continue
            at = {entry.key: entry.value for entry in tensor.external_data}
            content = np.memmap(old[at["location"]], np.uint8, "r", int(at.get("offset", 0)), int(at["length"]))
            if lookup is not None and tensor.name == EMBEDDING:
                floats = content.view(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
                tensors += _round(new, floats.reshape(tuple(tensor.dims)), lookup)
            else:
                kind = onnx.TensorProto.DataType.Name(tensor.data_type)
                new.weight(tensor.name, content, kind, list(tensor.dims))
                tensors.append(new.tensor(tensor.name))
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)
    for file in old.values():
        file.unlink()


def _round(new: OnnxFile, table: Any, lookup: Any) -> list[Any]:
    """Write a table [V, C] as codes [V, C] and scales [V, G], and let the node look tokens up in them."""
    import torch

    from edgetune.compress.rtn import rtn_quantize
    from edgetune.compress.scheme import Scheme

    onnx = require("onnx")
    block = next(n for n in BLOCKS if table.shape[1] % n == 0)
    rounded = rtn_quantize(torch.from_numpy(np.array(table, np.float32)), Scheme(HEAD_BITS, block, sym=True))
    codes, scales = f"{EMBEDDING}.codes", f"{EMBEDDING}.scales"
    new.weight(codes, rounded.q.numpy())
    new.weight(scales, rounded.scales.float().numpy().astype(table.dtype))
    lookup.CopyFrom(onnx.helper.make_node(
        "GatherBlockQuantized", [codes, lookup.input[1], scales], [*lookup.output], lookup.name,
        domain="com.microsoft", bits=HEAD_BITS, block_size=block, gather_axis=0, quantize_axis=1,
    ))  # fmt: skip
    return [new.tensor(codes), new.tensor(scales)]
