"""The ONNX Runtime engine: a folder with a decoder graph, of the genai builder or our own, run by plain onnxruntime.

The cache is the caller's: shared by input and output where the graph has GroupQueryAttention, else copied as it grows.
Shapes: T tokens, N target positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.backends import version as version_of
from edgetune.errors import EngineError
from edgetune.runtime.engine import Logits, TokenRow, check_tokens, first_line
from edgetune.runtime.engines.kept_prefix import KeptPrefix
from edgetune.runtime.engines.onnx_cache import GrowingCache, SharedCache, bind
from edgetune.runtime.engines.onnx_folder import FolderEngine, OnnxFolder

CHUNK = 128  # tokens of one run: bounds the logits buffer; throughput is flat from 32 on


@dataclass
class _Rows:
    """Several rows that are read at once: their own binding and cache."""

    binding: Any
    cache: SharedCache
    n_rows: int
    n_past: int = 0


class OnnxEngine(KeptPrefix, FolderEngine):
    """One session with a key/value cache of `n_ctx` positions."""

    name = "onnxruntime"

    def __init__(self, session: Any, folder: OnnxFolder, *, n_ctx: int) -> None:
        self._session, self._folder, self._n_ctx = session, folder, n_ctx
        outputs = {o.name: o for o in session.get_outputs()}
        self._n_vocab = int(outputs["logits"].shape[-1])
        self._logits = np.empty((CHUNK, self._n_vocab), np.float32)
        self._mask = np.ones(n_ctx, np.int64)
        self._positions = np.arange(n_ctx, dtype=np.int64)
        self._has_positions = any(i.name == "position_ids" for i in session.get_inputs())
        self._n_past, self._reader = 0, None
        self._shared, self._head_size = folder.shares_cache, int(folder.decoder["head_size"])
        self._binding: Any = session.io_binding()
        kind: type[SharedCache | GrowingCache] = SharedCache if self._shared else GrowingCache
        self._cache: SharedCache | GrowingCache | None = kind(session, self._binding, self._head_size, n_ctx)
        self._rows: _Rows | None = None

    @classmethod
    def load(cls, path: Path, *, n_ctx: int, n_threads: int, spin: bool = False) -> OnnxEngine:
        """Load an `onnx` artifact folder; `spin` lets its threads wait busily between nodes.

        Raises EngineError before the runtime sees the graph where it is cut, reads files outside its folder or
        keeps no shared cache, and where the runtime refuses it. Raises MissingBackendError without onnxruntime.
        """
        ort = require("onnxruntime")
        folder = OnnxFolder.open(path, n_ctx=n_ctx)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = n_threads, 1
        options.log_severity_level = 3
        # On a busy two-core machine spinning took 31 ms of CPU a token instead of 19, and 76 ms of time instead of 48.
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        options.add_session_config_entry("session.force_spinning_stop", "1")  # never between runs
        try:
            session = ort.InferenceSession(str(folder.graph), options, providers=["CPUExecutionProvider"])
            return cls(session, folder, n_ctx=n_ctx)
        except Exception as error:  # what onnxruntime raises shares no other base
            raise EngineError(f"onnxruntime cannot load {folder.graph}: {first_line(error)}") from error

    @property
    def version(self) -> str:
        return f"onnxruntime {version_of('onnxruntime')}"

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    @property
    def kv_bytes_per_token(self) -> float:
        return float(self._kept.bytes_per_token)

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
            raise EngineError(f"{self._folder.path} copies its cache at each step and reads one row at a time")
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
        for row, n_shared in self._behind_prefix(rows):
            out = np.empty((len(row.target), self._n_vocab), np.float32)
            at = n_shared - (row.start - 1)  # the position start - 1 predicts the first target
            for part in self._read(row.ids[n_shared:-1]):
                wanted = part[max(0, -at) :]
                out[max(0, at) : max(0, at) + len(wanted)] = wanted
                at += len(part)
            yield out

    def close(self) -> None:
        self._binding = self._session = self._cache = self._rows = None

    @property
    def _kept(self) -> SharedCache | GrowingCache:
        assert self._cache is not None, "the engine is closed"
        return self._cache

    def _skip(self, ids: Sequence[int]) -> None:
        for _ in self._read(ids):
            pass

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
        check_tokens(self.name, tokens.ravel().tolist(), total, self._n_ctx, self._n_vocab, self._folder.path)
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
            raise EngineError(f"onnxruntime failed after {n_past} tokens: {first_line(error)}") from error
