"""Writes an ONNX graph node by node, its weights beside it in data files of less than 2 GB, one in memory at a time."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require

ALIGN = 64  # bytes; readers map the file
FILE_LIMIT = 2**31 - 1  # some readers count bytes in 32 bits; a larger tensor has a file of its own
Array = NDArray[Any]


class OnnxFile:
    """A graph while it is written. Use it as a context manager; `save` writes the graph."""

    def __init__(self, path: Path, *, file_limit: int = FILE_LIMIT) -> None:
        self.path = path
        self._onnx: Any = require("onnx")
        self._limit = file_limit
        self._nodes: list[Any] = []
        self._stored: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._domains: set[str] = set()
        self._made: set[str] = set()
        self._n_files = 0
        self._data = self._next_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._data.close()

    def input(self, name: str, dtype: str, shape: list[str | int]) -> str:
        self._inputs.append(self._onnx.helper.make_tensor_value_info(name, self.type(dtype), shape))
        return name

    def optional(self, name: str, dtype: str, shape: list[str | int], default: Array) -> str:
        """Add an input that stands for `default`, a small array, where a run gives none."""
        self.constant(name, default)
        return self.input(name, dtype, shape)

    def output(self, name: str, dtype: str, shape: list[str | int]) -> str:
        self._outputs.append(self._onnx.helper.make_tensor_value_info(name, self.type(dtype), shape))
        return name

    def node(self, op: str, name: str, inputs: list[str], outputs: list[str] | None = None, /, *, domain: str = "",
             **attributes: Any) -> str:  # fmt: skip
        """Append an operator and give its first output, which is called after the node where no name is given."""
        made = outputs or [f"{name}/out"]
        self._nodes.append(self._onnx.helper.make_node(op, inputs, made, name, domain=domain, **attributes))
        self._domains.add(domain)
        self._made |= set(made)
        return made[0]

    def constant(self, name: str, value: Array) -> str:
        """Keep a small array inside the graph; the same name gives the same array."""
        if name not in self._stored:
            self._stored[name] = self._onnx.numpy_helper.from_array(np.asarray(value), name)
        return name

    def weight(self, name: str, array: Array, dtype: str = "", shape: list[int] | None = None) -> str:
        """Write an array to the data file. `dtype` and `shape` name what its bytes stand for, where numpy cannot."""
        assert name not in self._stored, name
        content = np.ascontiguousarray(array)
        if self._data.tell() and self._data.tell() + content.nbytes > self._limit:
            self._data.close()
            self._data = self._next_file()
        self._data.write(bytes(-self._data.tell() % ALIGN))
        kind = self.type(dtype) if dtype else self._onnx.helper.np_dtype_to_tensor_dtype(content.dtype)
        tensor = self._onnx.TensorProto(name=name, data_type=kind, dims=shape or list(content.shape))
        tensor.data_location = self._onnx.TensorProto.EXTERNAL
        entries = {"location": Path(self._data.name).name, "offset": self._data.tell(), "length": content.nbytes}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=str(value))
        self._data.write(content.data.cast("B") if content.nbytes else b"")
        self._stored[name] = tensor
        return name

    def stored(self, name: str) -> bool:
        """Tell whether a weight or constant of that name is there."""
        return name in self._stored

    def tensor(self, name: str) -> Any:
        """Give the entry of a stored weight or constant, as a graph holds it."""
        return self._stored[name]

    def made(self, name: str) -> bool:
        """Tell whether a node writes that name."""
        return name in self._made

    def save(self, opset: int) -> None:
        """Write the graph. Nodes stand in the order in which they were appended."""
        onnx = self._onnx
        graph = onnx.helper.make_graph(self._nodes, "decoder", self._inputs, self._outputs, [*self._stored.values()])
        versions = {"": opset} | dict.fromkeys(sorted(self._domains - {""}), 1)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in versions.items()]
        ir_version = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
        model = onnx.helper.make_model(graph, opset_imports=opsets, producer_name="edgetune", ir_version=ir_version)
        self._data.flush()
        self.path.write_bytes(model.SerializeToString(deterministic=True))

    def _next_file(self) -> Any:
        name = f"{self.path.name}.data" + (f".{self._n_files}" if self._n_files else "")
        self._n_files += 1
        return self.path.with_name(name).open("wb")

    def type(self, dtype: str) -> Any:
        """Give ONNX's number of a dtype."""
        return getattr(self._onnx.TensorProto, dtype)
