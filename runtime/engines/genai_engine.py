"""The onnxruntime-genai engine: the same ONNX folder as `onnxruntime` runs, through the library that devices ship.

Its generator keeps the cache; here it is fed ids one call at a time and asked for logits, and it never samples.
Shapes: T tokens, N target positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.backends import require
from edgetune.backends import version as version_of
from edgetune.errors import EngineError
from edgetune.runtime.engine import Logits, TokenRow, check_tokens, common_prefix, first_line
from edgetune.runtime.engines.onnx_folder import FolderEngine, OnnxFolder


class GenaiEngine(FolderEngine):
    """One model, and the generator that holds its context."""

    name = "onnxruntime-genai"

    def __init__(self, model: Any, folder: OnnxFolder, *, n_ctx: int) -> None:
        self._lib = require("onnxruntime_genai")
        self._model, self._folder, self._n_ctx = model, folder, n_ctx
        self._n_vocab = int(folder.genai["model"]["vocab_size"])
        self._generator: Any = None
        self._n_past = 0
        self._reader: object = None  # whose prefix the generator holds

    @classmethod
    def load(cls, path: Path, *, n_ctx: int, n_threads: int) -> GenaiEngine:
        """Load an `onnx` artifact folder, or one that the onnxruntime-genai builder made.

        Raises EngineError where the graph is damaged or the library refuses it, and MissingBackendError without it.
        """
        lib = require("onnxruntime_genai")
        folder = OnnxFolder.open(path, n_ctx=n_ctx)
        threads = {"intra_op_num_threads": n_threads, "inter_op_num_threads": 1, "log_severity_level": 3}
        try:
            config = lib.Config(str(path))
            config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
            return cls(lib.Model(config), folder, n_ctx=n_ctx)
        except Exception as error:  # what onnxruntime-genai raises shares no other base
            raise EngineError(f"onnxruntime-genai cannot load {path}: {first_line(error)}") from error

    @property
    def version(self) -> str:
        return f"onnxruntime-genai {version_of('onnxruntime_genai')}"

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    @property
    def kv_bytes_per_token(self) -> float:
        decoder = self._folder.decoder
        values = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        return float(4 * values)  # float32 on the CPU

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Forget all context, read `ids`, and give the logits of the last position, [V]."""
        self._forget(None)
        return self._append(ids)

    def decode(self, token: int) -> Logits:
        """Append one token to the context and give its logits, [V]."""
        assert self._generator is not None, "decode needs a prefill before it"
        return self._append([token])

    def score(self, ids: Sequence[int]) -> Logits:
        """Give the logits of every position of one row, [T, V]."""
        self.prefill(ids)
        return np.array(self._every_logits(len(ids)), np.float32)

    def score_rows(self, rows: Sequence[TokenRow]) -> Iterator[Logits]:
        """Give, row by row in order, the logits that predict row.target, [N, V].

        What all rows begin with is read once and stays in the generator; it goes back to it before each row.
        """
        if not rows:
            return
        n_shared = common_prefix(rows)
        reader = object()
        for row in rows:
            own = row.ids[n_shared:-1]
            if self._reader is not reader:  # at first, and where the caller used the engine in between
                self._forget(reader)
                if n_shared:
                    self._append(row.ids[:n_shared])
            self._generator.rewind_to(n_shared)
            self._n_past = n_shared
            self._append(own)
            yield np.array(self._every_logits(len(own))[row.start - 1 - n_shared :], np.float32)

    def _forget(self, reader: object) -> None:
        """Go back to an empty context; the generator is made when first asked for."""
        if self._generator is None:
            params = self._lib.GeneratorParams(self._model)
            params.set_search_options(max_length=self._n_ctx, do_sample=False)
            self._generator = self._lib.Generator(self._model, params)
        self._generator.rewind_to(0)
        self._n_past, self._reader = 0, reader

    def _every_logits(self, n: int) -> Logits:
        """Give the logits of all positions that the last call read, [T, V], valid until the next."""
        logits: Logits = self._generator.get_output("logits")[0]
        if len(logits) != n:
            raise EngineError(f"onnxruntime-genai gave the logits of {len(logits)} positions for {n} tokens")
        return logits

    def close(self) -> None:
        self._generator = self._model = None

    def _append(self, ids: Sequence[int]) -> Logits:
        """Append tokens and give the logits of the last, [V]."""
        if not ids:
            raise EngineError("onnxruntime-genai was asked to read an empty row; give at least one token")
        total = self._n_past + len(ids)
        check_tokens(self.name, ids, total, self._n_ctx, self._n_vocab, self._folder.path)
        try:
            self._generator.append_tokens(np.array(ids, np.int32))
            logits = self._generator.get_logits()
        except Exception as error:  # what onnxruntime-genai raises shares no other base
            raise EngineError(f"onnxruntime-genai failed after {self._n_past} tokens: {first_line(error)}") from error
        self._n_past = total
        last: Logits = np.array(logits, np.float32).reshape(-1, self._n_vocab)[-1]
        return last
