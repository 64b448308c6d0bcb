"""An ONNX folder as onnxruntime-genai lays it out: its settings, graph and tokenizer, for both engines that run it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.backends import require
from edgetune.errors import EngineError
from edgetune.runtime.engine import OneByOne, first_line

GENAI_CONFIG = "genai_config.json"

# Which fields of an ONNX protobuf message hold which messages, as far as a tensor or a node can hide in them.
_NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
INPUT, OUTPUT, OPERATOR = 1, 2, 4  # fields of a node
NAME, EXTERNAL, INLINE = 8, 13, (4, 5, 7, 9, 10, 11)  # of a tensor: INLINE hold values
LOOKUPS = {b"Gather", b"GatherBlockQuantized"}
_Fields = list[tuple[int, memoryview]]


@dataclass(frozen=True)
class OnnxFolder:
    """A folder whose graph was looked at before a runtime sees it."""

    path: Path
    genai: dict[str, Any]  # genai_config.json
    shares_cache: bool  # by input and output (GroupQueryAttention); else it grows by copying

    @classmethod
    def open(cls, path: Path, *, n_ctx: int) -> OnnxFolder:
        """Raises EngineError where the graph is cut, reads files outside its folder or takes fewer positions."""
        genai = read_genai_config(path)
        found = cls(path, genai, check_graph(path / _graph_name(genai)))
        longest = int(genai["model"].get("context_length", n_ctx))
        if n_ctx > longest:
            raise EngineError(f"n_ctx={n_ctx} is longer than the {longest} positions of {path}; lower n_ctx")
        return found

    @property
    def graph(self) -> Path:
        return self.path / _graph_name(self.genai)

    @property
    def decoder(self) -> dict[str, Any]:
        decoder: dict[str, Any] = self.genai["model"]["decoder"]
        return decoder

    @property
    def weight_bytes(self) -> int:
        """Bytes of the graph and its data files, which hold the weights, but for what tokens are only looked up in."""
        stored = sum(file.stat().st_size for file in self.path.glob(f"{self.graph.name}*"))
        return stored - looked_up_bytes(self.graph)

    @cached_property
    def tokenizer(self) -> Any:
        found = load_tokenizer(self.path)
        found.update_options(add_special_tokens="false")
        return found


class FolderEngine(OneByOne):
    """What the engines of an ONNX folder share."""

    _folder: OnnxFolder

    @property
    def weight_bytes(self) -> int:
        return self._folder.weight_bytes

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer, as `genai_config.json` names them."""
        return stop_ids(self._folder.genai)

    def tokenize(self, text: str) -> list[int]:
        """Turn rendered text into ids with onnxruntime-genai's tokenizer: special tokens parsed, no BOS added."""
        return [int(token) for token in self._folder.tokenizer.encode(text)]

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._folder.tokenizer.decode(np.array(ids, np.int32)))


def read_genai_config(folder: Path) -> dict[str, Any]:
    """Read `genai_config.json` of an artifact folder.

    Raises EngineError where it is missing, lacks what is read or names a graph in another folder.
    """
    try:
        genai: dict[str, Any] = json.loads((folder / GENAI_CONFIG).read_bytes())
        int(genai["model"]["decoder"]["head_size"])
        stop_ids(genai)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{folder / GENAI_CONFIG} cannot be read: {first_line(error)}; export again") from error
    name = _graph_name(genai)
    if name in ("", "..") or name != Path(name).name:
        raise EngineError(f"{folder / GENAI_CONFIG} names the graph {name!r}, which is no file beside it; export again")
    return genai


def _graph_name(genai: dict[str, Any]) -> str:
    return str(genai["model"]["decoder"].get("filename", "model.onnx"))


def stop_ids(genai: dict[str, Any]) -> frozenset[int]:
    """Give the end tokens of a `genai_config.json`, which names one or lists several."""
    found = genai["model"]["eos_token_id"]
    return frozenset(found) if isinstance(found, list) else frozenset([int(found)])


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer that onnxruntime-genai uses for a folder, without the model. Raises EngineError."""
    genai = require("onnxruntime_genai")
    try:
        return genai.Tokenizer(genai.Config(str(folder)))
    except Exception as error:  # what onnxruntime-genai raises shares no other base
        raise EngineError(f"onnxruntime-genai cannot load the tokenizer of {folder}: {first_line(error)}") from error


def check_graph(graph: Path) -> bool:
    """Refuse a graph that is cut, that reads outside its folder, or whose data file is too short.

    Gives whether its cache is shared by input and output (GroupQueryAttention) or grows by copying (Attention, or a
    Concat of past and new where attention is in single operators).
    Reads the protobuf itself: the onnx package would add its memory to what is measured. Raises EngineError.
    """
    operators: set[bytes] = set()
    joined = False  # whether past and new are put together by a node of its own
    folder = graph.parent.resolve()
    try:
        for kind, fields in _nodes_and_tensors(memoryview(graph.read_bytes()), "model"):
            if kind == "node":
                operators.add(operator := _field(fields, OPERATOR))
                joined |= operator == b"Concat" and _field(fields, OUTPUT).startswith(b"present.")
            entry = _external(fields) if kind == "tensor" else {}
            if not entry:
                continue
            location = entry.get(b"location", b"").decode()
            file = folder / location
            if not location or Path(location).is_absolute() or file.resolve().parent != folder:
                raise EngineError(f"{graph} reads the file {location!r}, which is not in its folder; export again")
            offset, length = int(entry.get(b"offset", b"0")), int(entry.get(b"length", b"0"))
            size = file.stat().st_size if file.is_file() else -1
            if offset < 0 or length < 0 or offset + length > size:
                raise EngineError(
                    f"{graph} reads {offset + length} bytes of {location}, which has {size}; export again"
                )
    except (OSError, ValueError, IndexError) as error:
        raise EngineError(f"{graph} is damaged: {first_line(error)}; export again") from error
    if not joined and not operators & {b"GroupQueryAttention", b"Attention"}:
        raise EngineError(f"{graph} has no GroupQueryAttention or Attention, so no known cache; export with edgetune")
    return b"GroupQueryAttention" in operators


def looked_up_bytes(graph: Path) -> int:
    """Give the bytes of tensors that nothing but a Gather reads: a token takes a row of them.

    An input embedding that is the output head too is read by another node.
    """
    sizes: dict[bytes, int] = {}
    readers: dict[bytes, set[bytes]] = {}
    for kind, fields in _nodes_and_tensors(memoryview(graph.read_bytes()), "model"):
        if kind == "node":
            for number, name in fields:
                if number == INPUT:
                    readers.setdefault(bytes(name), set()).add(_field(fields, OPERATOR))
        else:
            stored = int(_external(fields).get(b"length", b"0"))
            sizes[_field(fields, NAME)] = stored or sum(len(value) for number, value in fields if number in INLINE)
    return sum(size for name, size in sizes.items() if readers.get(name) and readers[name] <= LOOKUPS)


def _nodes_and_tensors(message: memoryview, kind: str) -> Iterator[tuple[str, _Fields]]:
    """Walk a protobuf message; give each node and each tensor in it, by their fields."""
    fields = list(_fields(message))
    if kind in ("node", "tensor"):
        yield kind, fields
    for number, value in fields:
        inner = _NESTED.get(kind, {}).get(number)
        if inner is not None:
            yield from _nodes_and_tensors(value, inner)


def _field(fields: _Fields, wanted: int) -> bytes:
    return next((bytes(value) for number, value in fields if number == wanted), b"")


def _external(tensor: _Fields) -> dict[bytes, bytes]:
    """Give a tensor's external_data entries."""
    pairs = [list(_fields(value)) for number, value in tensor if number == EXTERNAL]
    return {_field(pair, 1): _field(pair, 2) for pair in pairs}


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give number and bytes of each length-delimited field. Raises ValueError where the message is cut."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            _, at = _varint(message, at)
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"it holds the unknown wire type {wire}")
        size = {1: 8, 5: 4}.get(wire, 0)
        if wire == 2:
            size, at = _varint(message, at)
        if at + size > len(message):
            raise ValueError("it ends in the middle of a field")
        if wire == 2:
            yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]  # IndexError where the message is cut
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
