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
        """Bytes of the graph and its data files, which hold the weights."""
        return sum(file.stat().st_size for file in self.path.glob(f"{self.graph.name}*"))

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
    """Read `genai_config.json` of an artifact folder. Raises EngineError where it is missing or lacks what is read."""
    try:
        genai: dict[str, Any] = json.loads((folder / GENAI_CONFIG).read_bytes())
        int(genai["model"]["decoder"]["head_size"])
        stop_ids(genai)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{folder / GENAI_CONFIG} cannot be read: {first_line(error)}; export again") from error
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

    Gives whether its cache is shared by input and output (GroupQueryAttention) or grows by copying (Attention).
    Reads the protobuf itself: the onnx package would add its memory to what is measured. Raises EngineError.
    """
    operators: set[bytes] = set()
    folder = graph.parent.resolve()
    try:
        for entry in _external_data(memoryview(graph.read_bytes()), "model", operators):
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
    if not operators & {b"GroupQueryAttention", b"Attention"}:
        raise EngineError(f"{graph} has no GroupQueryAttention or Attention, so no known cache; export with edgetune")
    return b"GroupQueryAttention" in operators


def _external_data(message: memoryview, kind: str, operators: set[bytes]) -> Iterator[dict[bytes, bytes]]:
    """Walk a protobuf message; give each tensor's external_data entries and collect node operators."""
    entries: dict[bytes, bytes] = {}
    for number, value in _fields(message):
        inner = _NESTED.get(kind, {}).get(number)
        if inner is not None:
            yield from _external_data(value, inner, operators)
        elif kind == "node" and number == 4:
            operators.add(bytes(value))
        elif kind == "tensor" and number == 13:
            pair = {n: bytes(v) for n, v in _fields(value)}
            entries[pair[1]] = pair.get(2, b"")
    if entries:
        yield entries


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
