"""The ONNX Runtime engine: a folder with a decoder graph, of the genai builder or our own, run by plain onnxruntime.

The cache is the caller's: shared by input and output where the graph has GroupQueryAttention, else copied as it grows.
Shapes: T tokens, N target positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.backends import version as version_of
from edgetune.errors import EngineError
from edgetune.runtime.engine import Logits, OneByOne, TokenRow, common_prefix
from edgetune.runtime.engines.onnx_cache import GrowingCache, SharedCache, bind

CHUNK = 128  # tokens of one run: bounds the logits buffer; throughput is flat from 32 on
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


@dataclass
class _Rows:
    """Several rows that are read at once: their own binding and cache."""

    binding: Any
    cache: SharedCache
    n_rows: int
    n_past: int = 0


class OnnxEngine(OneByOne):
    """One session with a key/value cache of `n_ctx` positions."""

    name = "onnxruntime"

    def __init__(self, session: Any, folder: Path, genai: dict[str, Any], *, n_ctx: int, shared: bool) -> None:
        self._session, self._folder, self._genai, self._n_ctx = session, folder, genai, n_ctx
        outputs = {o.name: o for o in session.get_outputs()}
        self._n_vocab = int(outputs["logits"].shape[-1])
        self._logits = np.empty((CHUNK, self._n_vocab), np.float32)
        self._mask = np.ones(n_ctx, np.int64)
        self._positions = np.arange(n_ctx, dtype=np.int64)
        self._has_positions = any(i.name == "position_ids" for i in session.get_inputs())
        self._n_past = 0
        self._reader: object = None  # whose tokens the cache holds
        self._tokenizer: Any = None
        self._shared, self._head_size = shared, int(genai["model"]["decoder"]["head_size"])
        self._binding: Any = session.io_binding()
        kind: type[SharedCache | GrowingCache] = SharedCache if shared else GrowingCache
        self._cache: SharedCache | GrowingCache | None = kind(session, self._binding, self._head_size, n_ctx)
        self._rows: _Rows | None = None

    @classmethod
    def load(cls, path: Path, *, n_ctx: int, n_threads: int, spin: bool = False) -> OnnxEngine:
        """Load an `onnx` artifact folder; `spin` lets its threads wait busily between nodes.

        Raises EngineError before the runtime sees the graph where it is cut, reads files outside its folder or
        keeps no shared cache, and where the runtime refuses it. Raises MissingBackendError without onnxruntime.
        """
        ort = require("onnxruntime")
        genai = read_genai_config(path)
        graph = path / str(genai["model"]["decoder"].get("filename", "model.onnx"))
        shared = check_graph(graph)
        longest = int(genai["model"].get("context_length", n_ctx))
        if n_ctx > longest:
            raise EngineError(f"n_ctx={n_ctx} is longer than the {longest} positions of {path}; lower n_ctx")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.log_severity_level = 3
        # On a busy two-core machine spinning took 31 ms of CPU a token instead of 19, and 76 ms of time instead of 48.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")  # never between runs
        try:
            session = ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
            return cls(session, path, genai, n_ctx=n_ctx, shared=shared)
        except Exception as error:  # what onnxruntime raises shares no other base
            raise EngineError(f"onnxruntime cannot load {graph}: {_first_line(error)}") from error

    @property
    def version(self) -> str:
        return f"onnxruntime {version_of('onnxruntime')}"

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    @property
    def weight_bytes(self) -> int:
        return graph_bytes(self._folder, self._genai)

    @property
    def kv_bytes_per_token(self) -> float:
        return float(self._kept.bytes_per_token)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer, as `genai_config.json` names them."""
        return stop_ids(self._genai)

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Forget all context, read `ids`, and give the logits of the last position, [V]."""
        self._forget(self)
        for part in self._read(ids):
            last = part
        return np.array(last[-1])

    def decode(self, token: int) -> Logits:
        """Append one token to the context and give its logits, [V]."""
        assert self._reader is self, "decode needs a prefill before it"
        return np.array(self._run([token])[0])

    def prefill_rows(self, rows: Sequence[Sequence[int]]) -> Logits:
        """Forget all rows, read new ones of one length, and give the logits of each one's last position, [B, V].

        Raises EngineError for a graph whose cache is not shared.
        """
        if not self._shared:
            raise EngineError(f"{self._folder} copies its cache at each step and reads one row at a time")
        if self._rows is None or self._rows.n_rows != len(rows):
            binding = self._session.io_binding()
            cache = SharedCache(self._session, binding, self._head_size, self._n_ctx, n_rows=len(rows))
            self._rows = _Rows(binding, cache, len(rows))
        last = np.empty((len(rows), self._n_vocab), np.float32)
        for row, ids in enumerate(rows):  # the operator takes a prompt behind others of one row only
            own = self._session.io_binding()
            self._rows.cache.bind_row(own, row)
            for start in range(0, len(ids), CHUNK):
                part = np.array([ids[start : start + CHUNK]], np.int64)
                logits = self._logits[: part.shape[1]]
                self._step(own, part, start, logits[None])
            last[row] = logits[-1]
        self._rows.n_past = len(rows[0])
        return last

    def decode_rows(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row and give its logits, [B, V]."""
        assert self._rows is not None, "decode_rows needs a prefill_rows before it"
        step = np.array([[token] for token in tokens], np.int64)
        logits = np.empty((len(tokens), 1, self._n_vocab), np.float32)
        self._step(self._rows.binding, step, self._rows.n_past, logits)
        self._rows.n_past += 1
        last: Logits = logits[:, 0]
        return last

    def score(self, ids: Sequence[int]) -> Logits:
        """Give the logits of every position of one row, [T, V]."""
        self._forget(None)
        return np.concatenate([np.array(part) for part in self._read(ids)])

    def score_rows(self, rows: Sequence[TokenRow]) -> Iterator[Logits]:
        """Give, row by row in order, the logits that predict row.target, [N, V].

        What all rows begin with is read once and stays in the cache; each row is then written over the one before.
        Rows are not batched: the runtime reads 32 tokens as fast, each, as 256.
        """
        if not rows:
            return
        n_shared = common_prefix(rows)
        reader = object()
        for row in rows:
            if self._reader is not reader:  # at first, and where the caller used the engine in between
                self._forget(reader)
                for _ in self._read(row.ids[:n_shared]):
                    pass
                self._kept.keep()
            self._n_past = n_shared
            self._kept.rewind()
            out = np.empty((len(row.target), self._n_vocab), np.float32)
            at = n_shared - (row.start - 1)  # the position start - 1 predicts the first target
            for part in self._read(row.ids[n_shared:-1]):
                wanted = part[max(0, -at) :]
                out[max(0, at) : max(0, at) + len(wanted)] = wanted
                at += len(part)
            yield out

    def tokenize(self, text: str) -> list[int]:
        """Turn rendered text into ids with onnxruntime-genai's tokenizer: special tokens parsed, no BOS added."""
        return [int(token) for token in self._own_tokenizer().encode(text)]

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._own_tokenizer().decode(np.array(ids, np.int32)))

    def _own_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
            self._tokenizer.update_options(add_special_tokens="false")
        return self._tokenizer

    def close(self) -> None:
        self._binding = self._session = self._tokenizer = self._cache = self._rows = None

    @property
    def _kept(self) -> SharedCache | GrowingCache:
        assert self._cache is not None, "the engine is closed"
        return self._cache

    def _forget(self, reader: object) -> None:
        self._n_past, self._reader = 0, reader
        self._kept.clear()

    def _read(self, ids: Sequence[int]) -> Iterator[Logits]:
        """Append tokens chunk by chunk; each chunk's logits are valid until the next."""
        if not ids:
            if self._n_past == 0 and self._reader in (None, self):
                raise EngineError("onnxruntime was asked to read an empty row; give at least one token")
            return
        for start in range(0, len(ids), CHUNK):
            yield self._run(ids[start : start + CHUNK])

    def _run(self, ids: Sequence[int]) -> Logits:
        """Append up to CHUNK tokens and give a view of their logits, [T, V]."""
        tokens = np.array([ids], np.int64)
        logits = self._logits[: len(ids)]
        self._kept.before(self._n_past, len(ids))
        self._step(self._binding, tokens, self._n_past, logits[None])
        self._n_past += len(ids)
        self._kept.after()
        return logits

    def _step(self, binding: Any, tokens: NDArray[np.int64], n_past: int, logits: Logits) -> None:
        """Run the graph on tokens [B, T] after `n_past` others, into `logits` [B, T, V]."""
        B, total = len(tokens), n_past + tokens.shape[1]
        if total > self._n_ctx:
            raise EngineError(
                f"onnxruntime was asked for {total} tokens of context, n_ctx is {self._n_ctx}; raise n_ctx"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if high >= self._n_vocab or low < 0:
            wrong = high if high >= self._n_vocab else low
            raise EngineError(
                f"token id {wrong} is not in the vocabulary of {self._n_vocab}; use the tokenizer of {self._folder}"
            )
        mask, positions = self._mask[None, :total], self._positions[None, n_past:total]
        if B > 1:
            mask, positions = (np.ascontiguousarray(np.broadcast_to(a, (B, a.shape[1]))) for a in (mask, positions))
        bind(binding.bind_input, "input_ids", tokens)
        bind(binding.bind_input, "attention_mask", mask)
        if self._has_positions:
            bind(binding.bind_input, "position_ids", positions)
        bind(binding.bind_output, "logits", logits)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # what onnxruntime raises shares no other base
            raise EngineError(f"onnxruntime failed after {n_past} tokens: {_first_line(error)}") from error


def read_genai_config(folder: Path) -> dict[str, Any]:
    """Read `genai_config.json` of an artifact folder. Raises EngineError where it is missing or lacks what is read."""
    try:
        genai: dict[str, Any] = json.loads((folder / GENAI_CONFIG).read_bytes())
        int(genai["model"]["decoder"]["head_size"])
        stop_ids(genai)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(f"{folder / GENAI_CONFIG} cannot be read: {_first_line(error)}; export again") from error
    return genai


def graph_bytes(folder: Path, genai: dict[str, Any]) -> int:
    """Give the bytes of a folder's graph and its data files, which hold the weights."""
    graph = folder / str(genai["model"]["decoder"].get("filename", "model.onnx"))
    return sum(file.stat().st_size for file in folder.glob(f"{graph.name}*"))


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
        raise EngineError(f"onnxruntime-genai cannot load the tokenizer of {folder}: {_first_line(error)}") from error


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
        raise EngineError(f"{graph} is damaged: {_first_line(error)}; export again") from error
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


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
