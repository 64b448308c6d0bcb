"""What is known of an ONNX graph before it runs: onnx's checker on its file, and the shapes of its outputs, inferred.

onnx knows no operator of com.microsoft. In our own graph the only one is MatMulNBits, which has the shapes of a product
with [C, R]; in a graph of the genai builder ONNX Runtime's own inference takes over, which knows both. Shapes: C
in-features, R out-features.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgetune.backends import require
from edgetune.errors import ContractError
from edgetune.export.decoder_source import Sizes

CONTRIB = "com.microsoft"
SMALL = 4096  # bytes of a tensor that inference may want the values of: shapes, axes
Shape = list[int | str | None]  # a number, a name, or unknown


@dataclass(frozen=True)
class Promise:
    """What a decoder's outputs are to be."""

    n_layers: int
    n_kv_heads: int
    head_size: int
    n_vocab: int

    @classmethod
    def of_sizes(cls, sizes: Sizes) -> Promise:
        return cls(sizes.n_layers, sizes.n_kv_heads, sizes.head_size, sizes.n_vocab)

    @classmethod
    def of_folder(cls, folder: Path) -> Promise:
        """Read what a folder's `genai_config.json` tells its runtime."""
        model = json.loads((folder / "genai_config.json").read_bytes())["model"]
        decoder = model["decoder"]
        return cls(int(decoder["num_hidden_layers"]), int(decoder["num_key_value_heads"]), int(decoder["head_size"]),
                   int(model["vocab_size"]))  # fmt: skip

    def outputs(self, ids: Shape) -> dict[str, Shape]:
        """Give the shape of each output for `input_ids` of a shape; None is how much a cache holds."""
        cache: Shape = [ids[0], self.n_kv_heads, None, self.head_size]
        caches = [f"present.{i}.{part}" for i in range(self.n_layers) for part in ("key", "value")]
        return {"logits": [*ids, self.n_vocab], **dict.fromkeys(caches, cache)}


def check_shapes(graph: Path, promise: Promise) -> dict[str, Any]:
    """Check a graph's file with `onnx.checker`, infer all shapes, and hold its outputs to what is promised.

    What outputs and values between declare is set aside before: their shapes come from inputs, weights and operators
    alone. Gives the manifest's entry. Raises ContractError for a graph that checker or inference refuses, and where an
    output is missing, has no inferred shape or another one.
    """
    onnx = require("onnx")
    model = onnx.load(str(graph), load_external_data=False)
    foreign = sorted({node.op_type for node in model.graph.node if not _known(onnx, model, node)})
    _check_file(onnx, graph, foreign)
    declared = {output.name: _shape(output) for output in model.graph.output}
    _set_aside(onnx, model, graph.parent, promise)
    ours = set(foreign) <= {"MatMulNBits"}
    inferred = _by_onnx(onnx, model, graph) if ours else _by_runtime(model, graph)
    ids = next(_shape(given) for given in model.graph.input if given.name == "input_ids")
    for name, wanted in promise.outputs(ids or []).items():
        found, said = inferred.get(name), declared.get(name)
        if found is None or said is None or not _fits(wanted, found) or _contradicts(said, found):
            raise ContractError(f"{graph.name}: {name} is to have the shape {wanted}; inferred is {found}, "
                                f"declared {said}")  # fmt: skip
    without = [out for node in model.graph.node for out in node.output if out and inferred.get(out) is None]
    return {
        "checker": f"onnx {onnx.__version__}", "inference": "onnx" if ours else "onnxruntime", "outputs": len(declared),
        "logits": inferred["logits"], "cache": inferred["present.0.key"], "values_without_shape": len(without),
        "operators_without_schema": foreign,
    }  # fmt: skip


def _known(onnx: Any, model: Any, node: Any) -> bool:
    versions = {imported.domain: imported.version for imported in model.opset_import}
    try:
        onnx.defs.get_schema(node.op_type, versions.get(node.domain, 0), node.domain)
    except onnx.defs.SchemaError:
        return False
    return True


def _check_file(onnx: Any, graph: Path, foreign: list[str]) -> None:
    """Run the checker on the file: wiring, operators, types, external data. Raises ContractError."""
    with _sorted_out(onnx, graph, foreign) as path:
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ContractError(f"{graph.name} is not valid ONNX: {_line(error)}") from error


@contextmanager
def _sorted_out(onnx: Any, graph: Path, foreign: list[str]) -> Iterator[Path]:
    """Give a file in which each operator that onnx does not know stands in a domain of its own, as it should.

    The builder writes SimplifiedLayerNormalization as if it were one of onnx's, and ONNX Runtime takes it.
    """
    model = onnx.load(str(graph), load_external_data=False)
    lost = [node for node in model.graph.node if node.op_type in foreign and node.domain != CONTRIB]
    if not lost:
        yield graph
        return
    for node in lost:
        node.domain = CONTRIB
    if all(imported.domain != CONTRIB for imported in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
    copy = graph.with_name(f"check.{graph.name}")  # beside its data
    try:
        copy.write_bytes(model.SerializeToString())
        yield copy
    finally:
        copy.unlink(missing_ok=True)


def _set_aside(onnx: Any, model: Any, folder: Path, promise: Promise) -> None:
    """Leave inputs, operators and weights alone to tell the shapes.

    What is declared of outputs and values between goes; the caches that go in are what is promised of them, which the
    genai builder leaves open. Small tensors come inside, for their values; large ones are told by their shapes.
    """
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    for given in model.graph.input:
        if given.name.startswith("past_key_values."):
            dims = given.type.tensor_type.shape.dim
            for at, size in ((1, promise.n_kv_heads), (3, promise.head_size)):
                if dims[at].dim_param:
                    dims[at].dim_value = size
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in tensors:
        length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), SMALL + 1)
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            model.graph.initializer.append(tensor)
        elif length <= SMALL:
            array = onnx.numpy_helper.to_array(tensor, base_dir=str(folder))
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, tensor.name))
        else:
            dims = list(tensor.dims)
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, dims))


def _by_onnx(onnx: Any, model: Any, graph: Path) -> dict[str, Shape | None]:
    """Infer with onnx alone, which needs help with two operators."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            copy.graph.node.append(_product(onnx, node, copy.graph))
        elif node.op_type == "Attention" and node.output[1:]:
            copy.graph.node.extend(_attention(onnx, node, copy.graph))
        else:
            copy.graph.node.append(node)
    try:
        made = onnx.shape_inference.infer_shapes(copy, check_type=True, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ContractError(f"shapes of {graph.name} contradict: {_line(error)}") from error
    return {value.name: _shape(value) for value in (*made.graph.value_info, *made.graph.output)}


def _product(onnx: Any, node: Any, graph: Any) -> Any:
    """Give what has the shapes of MatMulNBits: a product with a matrix [C, R]."""
    at = {attribute.name: attribute.i for attribute in node.attribute}
    weight = f"{node.name}/stand-in"
    graph.input.append(onnx.helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, [at["K"], at["N"]]))
    return onnx.helper.make_node("MatMul", [node.input[0], weight], [*node.output], node.name)


def _attention(onnx: Any, node: Any, graph: Any) -> list[Any]:
    """Give Attention, whose caches onnx leaves without a shape, and by itself what it makes: past and new joined."""
    heads = next(attribute.i for attribute in node.attribute if attribute.name == "kv_num_heads")
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.output[1:]
    shape = f"{node.name}/stand-in"
    graph.initializer.append(onnx.helper.make_tensor(shape, onnx.TensorProto.INT64, [4], [0, 0, heads, -1]))
    made = [alone]
    for new, past, present in zip(node.input[1:3], node.input[4:6], node.output[1:3], strict=True):
        split, first = f"{present}/split", f"{present}/heads first"
        made += [
            onnx.helper.make_node("Reshape", [new, shape], [split]),
            onnx.helper.make_node("Transpose", [split], [first], perm=[0, 2, 1, 3]),
            onnx.helper.make_node("Concat", [past, first], [present], axis=2),
        ]
    return made


def _by_runtime(model: Any, graph: Path) -> dict[str, Shape | None]:
    """Infer with ONNX Runtime. Its public door writes a file into the current folder where it fails."""
    from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

    for node in model.graph.node:
        if node.op_type == "GatherBlockQuantized":
            _lookup(model.graph, node)
    inference = SymbolicShapeInference(2**31 - 1, auto_merge=False, guess_output_rank=False, verbose=0)
    try:
        inference._preprocess(model)
        whole = False
        while inference.run_:
            whole = inference._infer_impl()
    except Exception as error:  # what it raises shares no other base
        raise ContractError(f"shapes of {graph.name} contradict: {_line(error)}") from error
    if not whole:
        raise ContractError(f"shapes of {graph.name} cannot be inferred to the end")
    return {name: _shape(value) for name, value in inference.known_vi_.items()}


def _lookup(graph: Any, node: Any) -> None:
    """Make it a look-up in floats, which has its shapes: two codes of 4 bits lie in a byte, and are taken for one.

    The table is a weight, or the head's weight in another shape, where the two are tied.
    """
    onnx = require("onnx")
    kinds = {value.name: value.type.tensor_type for value in graph.input}
    kinds |= {tensor.name: onnx.helper.make_tensor_type_proto(tensor.data_type, tensor.dims).tensor_type
              for tensor in graph.initializer}  # fmt: skip
    source = {n.output[0]: n.input[0] for n in graph.node if n.op_type == "Reshape"}.get(node.input[0], node.input[0])
    table = kinds[source]
    at = {attribute.name: attribute.i for attribute in node.attribute}
    rows, columns = table.shape.dim[0].dim_value, prod(dim.dim_value for dim in table.shape.dim[1:])
    if table.elem_type == onnx.TensorProto.UINT8:
        columns = columns * 8 // at.get("bits", 4)
    stand_in = f"{node.name}/stand-in"
    graph.input.append(onnx.helper.make_tensor_value_info(stand_in, onnx.TensorProto.FLOAT, [rows, columns]))
    made = onnx.helper.make_node("Gather", [stand_in, node.input[1]], [*node.output], node.name, axis=0)
    node.CopyFrom(made)


def _line(error: Exception) -> str:
    """Give the first line that says something."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _shape(value: Any) -> Shape | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    dims: Shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in tensor.shape.dim]
    return [None if str(dim).startswith("unk__") else dim for dim in dims]  # what onnx calls one that it cannot tell


def _fits(wanted: Shape, found: Shape) -> bool:
    """Tell whether an inferred shape is the promised one: numbers as they are, names the same or not told."""
    return len(found) == len(wanted) and all(
        is_ == to_be if isinstance(to_be, int) else to_be is None or is_ in (to_be, None)
        for is_, to_be in zip(found, wanted, strict=True)
    )


def _contradicts(declared: Shape, found: Shape) -> bool:
    """Tell whether a graph declares numbers other than those inferred; names may stand for any length."""
    return len(found) != len(declared) or any(
        isinstance(said, int) and is_ != said for is_, said in zip(found, declared, strict=True)
    )
