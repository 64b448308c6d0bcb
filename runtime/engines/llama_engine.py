"""llama.cpp through its C interface: no Python class between a token and its logits.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgetune.backends import require
from edgetune.errors import EngineError, UsageError
from edgetune.runtime.engine import Logits, OneByOne, TokenRow, common_prefix
from edgetune.runtime.engines.llama_batch import Batch, LastLogits, OneToken

N_BATCH = 512  # tokens of one decode call, and of one physical batch
N_ROWS = 31  # rows of one batch of score_rows; sequence 0 holds what they share
_LOG_WARN = 3  # ggml_log_level
_FLASH = {None: -1, False: 0, True: 1}  # llama_flash_attn_type: auto, off, on


class _KvType(NamedTuple):
    number: int  # ggml_type
    bytes: float  # of one value, scales counted


KV_TYPES = {
    "f32": _KvType(0, 4), "f16": _KvType(1, 2), "bf16": _KvType(30, 2), "q8_0": _KvType(8, 34 / 32),
    "q5_1": _KvType(7, 24 / 32), "q5_0": _KvType(6, 22 / 32), "q4_1": _KvType(3, 20 / 32), "q4_0": _KvType(2, 18 / 32),
}  # fmt: skip


class LlamaEngine(OneByOne):
    """One GGUF file in llama.cpp, with a small context for generation and, once asked for, one for scoring."""

    name = "llama.cpp"

    def __init__(
        self, model: Any, *, n_ctx: int, n_threads: int, flash_attention: bool | None, kv_type: str, n_ubatch: int
    ) -> None:
        self._lib = require("llama_cpp")
        self._model = model
        self._vocab = self._lib.llama_model_get_vocab(model)
        self._n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))
        # A position beyond what the model was trained for gives logits, and wrong ones.
        self.n_ctx = min(n_ctx, int(self._lib.llama_model_n_ctx_train(model)))
        self._n_threads, self._flash, self._kv_type, self._n_ubatch = n_threads, flash_attention, kv_type, n_ubatch
        self._batch, self._one = Batch(self._lib.llama_batch, N_BATCH), OneToken(self._lib.llama_batch)
        self._last = LastLogits(self._lib, self._n_vocab)
        self._adapter: Any = None  # goes with the model
        self._ctx: Any = None
        self._score_ctx: Any = None
        self._rows_ctx: Any = None
        self._n_rows = 0  # what _rows_ctx was made for
        self._row_past: list[int] = []
        self._n_past = 0
        self._readings = 0  # how often the scoring context was begun anew

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        n_ctx: int,
        n_threads: int,
        flash_attention: bool | None = None,
        mmap: bool = True,
        kv_type: str = "f16",
        n_ubatch: int = N_BATCH,
        adapter: str | None = None,
    ) -> LlamaEngine:
        """Load a .gguf file, or an artifact folder that holds exactly one.

        `n_ctx` is what one row or generation may hold, and is cut to what the model was trained for. `kv_type` is
        the type of the cache, one of KV_TYPES; `n_ubatch` the tokens that are computed at once; `adapter` the GGUF file
        of a LoRA adapter.
        Raises UsageError for an unknown cache type and EngineError with llama.cpp's own last words; a hostile file
        may also kill the process.
        """
        lib = require("llama_cpp")
        if kv_type not in KV_TYPES:
            raise UsageError(f"unknown kv_type {kv_type!r} for llama.cpp; known: {', '.join(KV_TYPES)}")
        file = gguf_file(path)
        _listen(lib)
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = lib.LLAMA_LOAD_MODE_MMAP if mmap else lib.LLAMA_LOAD_MODE_NONE
        model = lib.llama_model_load_from_file(str(file).encode(), params)
        if not model:
            raise EngineError(f"llama.cpp cannot load {file}: {_last_words()}")
        engine = cls(
            model, n_ctx=n_ctx, n_threads=n_threads, flash_attention=flash_attention, kv_type=kv_type,
            n_ubatch=n_ubatch,
        )  # fmt: skip
        if adapter is not None:
            engine._adapter = lib.llama_adapter_lora_init(model, adapter.encode())
            if not engine._adapter:
                engine.close()
                raise EngineError(f"llama.cpp cannot load the adapter {adapter}: {_last_words()}")
        engine._ctx = engine._context(engine.n_ctx, n_rows=1, n_outputs=1)
        return engine

    @property
    def version(self) -> str:
        flags = self._lib.llama_print_system_info().decode().replace("CPU :", "").split("|")
        found = [flag.split("=")[0].strip() for flag in flags if flag.strip().endswith("= 1")]
        return (
            f"llama-cpp-python {metadata.version('llama-cpp-python')} "
            f"(llama.cpp {self._lib.llama_version().decode()}; {' '.join(found)})"
        )

    @property
    def n_vocab(self) -> int:
        return self._n_vocab

    @property
    def weight_bytes(self) -> int:
        return int(self._lib.llama_model_size(self._model))

    @property
    def kv_bytes_per_token(self) -> float:
        lib, model = self._lib, self._model
        width = lib.llama_model_n_embd(model) // lib.llama_model_n_head(model)  # of a head, unless the file names it
        arch = self._fact("general.architecture")
        widths = sum(int(self._fact(f"{arch}.attention.{part}_length") or width) for part in ("key", "value"))
        values = lib.llama_model_n_layer(model) * lib.llama_model_n_head_kv(model) * widths
        return float(values * KV_TYPES[self._kv_type].bytes)

    def _fact(self, key: str) -> str:
        """Give a metadata value of the file as text; nothing where it has none."""
        out = ctypes.create_string_buffer(128)
        n = int(self._lib.llama_model_meta_val_str(self._model, key.encode(), out, len(out)))
        return out.value.decode(errors="replace") if n > 0 else ""

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Every token that llama.cpp takes for the end of a generation."""
        is_end = self._lib.llama_vocab_is_eog
        return frozenset(token for token in range(self._n_vocab) if is_end(self._vocab, token))

    @property
    def bos_id(self) -> int | None:
        token = int(self._lib.llama_vocab_bos(self._vocab))
        return token if token >= 0 else None

    @property
    def eos_id(self) -> int | None:
        token = int(self._lib.llama_vocab_eos(self._vocab))
        return token if token >= 0 else None

    @property
    def add_bos(self) -> bool:
        return bool(self._lib.llama_vocab_get_add_bos(self._vocab))

    @property
    def chat_template(self) -> str:
        found: bytes | None = self._lib.llama_model_chat_template(self._model, None)
        return (found or b"").decode()

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of the tokens that chat templates name."""
        text_of, ids = self._lib.llama_vocab_get_text, {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return {name: text_of(self._vocab, token).decode() for name, token in ids.items() if token is not None}

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        out = (ctypes.c_int32 * room)()
        n = int(self._lib.llama_tokenize(self._vocab, data, len(data), out, room, False, True))
        if n < 0:
            raise EngineError(f"llama.cpp cannot tokenize {text[:40]!r} ({n})")
        return list(out[:n])

    def detokenize(self, ids: Sequence[int]) -> str:
        given = (ctypes.c_int32 * len(ids))(*ids)
        room = 16 * len(ids) + 16
        return self._detokenize_into(given, room).decode("utf-8", errors="replace")

    def _detokenize_into(self, given: Any, room: int) -> bytes:
        out = ctypes.create_string_buffer(room)
        n = int(self._lib.llama_detokenize(self._vocab, given, len(given), out, room, True, False))
        return self._detokenize_into(given, -n) if n < 0 else out.raw[:n]

    def prefill(self, ids: Sequence[int]) -> Logits:
        self._check(len(ids), ids)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), False)
        self._n_past = 0
        for begin in range(0, len(ids), N_BATCH):
            part = ids[begin : begin + N_BATCH]
            self._batch.clear()
            self._batch.add(part, self._n_past, 0)
            if begin + len(part) == len(ids):
                self._batch.want_last()
            self._decode(self._ctx)
            self._n_past += len(part)
        return self._last.of(self._ctx)

    def decode(self, token: int) -> Logits:
        if self._model is None or self._n_past >= self.n_ctx or not 0 <= token < self._n_vocab:
            self._check(self._n_past + 1, (token,))
        self._one.set(token, self._n_past)
        self._decode(self._ctx, self._one)
        self._n_past += 1
        return self._last.of(self._ctx)

    def prefill_rows(self, rows: Sequence[Sequence[int]]) -> Logits:
        for ids in rows:
            self._check(len(ids), ids)
        if len(rows) != self._n_rows:
            freed, self._rows_ctx, self._n_rows = self._rows_ctx, None, 0  # nothing stale where the new one fails
            if freed:
                self._lib.llama_free(freed)
            self._rows_ctx = self._context(len(rows) * self.n_ctx, n_rows=len(rows), n_outputs=len(rows))
            self._n_rows = len(rows)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._rows_ctx), False)
        out = np.empty((len(rows), self._n_vocab), dtype=np.float32)
        for sequence, ids in enumerate(rows):
            self._read(self._rows_ctx, ids, 0, sequence, len(ids) - 1, out[sequence : sequence + 1])
        self._row_past = [len(ids) for ids in rows]
        return out

    def decode_rows(self, tokens: Sequence[int]) -> Logits:
        assert self._n_rows == len(tokens), "decode_rows needs as many tokens as rows were read"
        self._check(max(self._row_past) + 1, tokens)
        self._batch.clear()
        for sequence, token in enumerate(tokens):
            self._batch.add((token,), self._row_past[sequence], sequence, 0)
            self._row_past[sequence] += 1
        self._decode(self._rows_ctx)
        pointer = self._lib.llama_get_logits(self._rows_ctx)
        return np.array(np.ctypeslib.as_array(pointer, (len(tokens), self._n_vocab)))

    def score(self, ids: Sequence[int]) -> Logits:
        self._check(len(ids), ids)
        context = self._begin_scoring()
        out = np.empty((len(ids), self._n_vocab), dtype=np.float32)
        self._read(context, ids, 0, 0, 0, out)
        return out

    def score_rows(self, rows: Sequence[TokenRow]) -> Iterator[Logits]:
        if not rows:
            return
        for row in rows:
            self._check(len(row.ids), row.ids)
        context = self._begin_scoring()
        mine = self._readings
        memory = self._lib.llama_get_memory(context)
        n_shared = common_prefix(rows)
        if n_shared:
            self._read(context, rows[0].ids[:n_shared], 0, 0, n_shared, None)
            for sequence in range(1, N_ROWS + 1):
                self._lib.llama_memory_seq_cp(memory, 0, sequence, 0, n_shared)
        for pack in _packs(rows, n_shared):
            if len(pack) == 1:  # maybe longer than a batch
                row = pack[0]
                out = np.empty((len(row.target), self._n_vocab), dtype=np.float32)
                self._read(context, row.ids[n_shared:-1], n_shared, 1, row.start - 1, out)
                yield out
            else:
                self._batch.clear()
                for sequence, row in enumerate(pack, start=1):
                    # The last token predicts nothing that is scored.
                    self._batch.add(row.ids[n_shared:-1], n_shared, sequence, row.start - 1)
                self._decode(context)
                pointer = self._lib.llama_get_logits(context)
                n_targets = sum(len(row.target) for row in pack)
                logits = np.ctypeslib.as_array(pointer, (n_targets, self._n_vocab))  # in the order of the batch
                begin = 0
                for row in pack:
                    self._still(mine)
                    yield logits[begin : begin + len(row.target)].copy()
                    begin += len(row.target)
            self._still(mine)
            for sequence in range(1, len(pack) + 1):
                self._lib.llama_memory_seq_rm(memory, sequence, n_shared, -1)

    def close(self) -> None:
        for context in (self._ctx, self._score_ctx, self._rows_ctx):
            if context:
                self._lib.llama_free(context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._ctx = self._score_ctx = self._rows_ctx = self._model = None

    def _begin_scoring(self) -> Any:
        """The empty context that scores: made when first asked for, so that a latency run never pays for it."""
        if self._score_ctx is None:
            self._score_ctx = self._context(self.n_ctx + N_BATCH, n_rows=N_ROWS + 1, n_outputs=N_BATCH)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._score_ctx), False)
        self._readings += 1
        return self._score_ctx

    def _still(self, mine: int) -> None:
        if self._readings != mine or self._model is None:
            raise EngineError("score_rows was cut short by another call that scores; take all of its rows first")

    def _context(self, n_cells: int, *, n_rows: int, n_outputs: int) -> Any:
        params = self._lib.llama_context_default_params()
        params.n_ctx = n_cells
        params.n_batch, params.n_ubatch = N_BATCH, min(self._n_ubatch, N_BATCH)
        params.n_seq_max = n_rows
        params.kv_unified = True  # rows share the cells of their prefix
        params.n_outputs_max = n_outputs
        params.n_threads = params.n_threads_batch = self._n_threads
        params.flash_attn_type = _FLASH[self._flash]
        params.no_perf = True
        params.type_k = params.type_v = KV_TYPES[self._kv_type].number
        context = self._lib.llama_init_from_model(self._model, params)
        if not context:
            raise EngineError(f"llama.cpp cannot make a context of {n_cells} tokens: {_last_words()}")
        if self._adapter is not None:
            adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            self._lib.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        return context

    def _check(self, n_tokens: int, ids: Sequence[int]) -> None:
        if self._model is None:
            raise EngineError("this engine is closed")
        if not 0 < n_tokens <= self.n_ctx:
            raise EngineError(f"{n_tokens} tokens do not fit a context of n_ctx={self.n_ctx}")
        if min(ids) < 0 or max(ids) >= self._n_vocab:
            raise EngineError(f"token ids lie between {min(ids)} and {max(ids)}, the vocabulary has {self._n_vocab}")

    def _read(
        self, context: Any, ids: Sequence[int], position: int, sequence: int, wanted_from: int, out: Logits | None
    ) -> None:
        """Read one row, in as many batches as it takes, and fill `out` with logits from position `wanted_from` on."""
        filled = 0
        for begin in range(0, len(ids), N_BATCH):
            part = ids[begin : begin + N_BATCH]
            self._batch.clear()
            n_wanted = self._batch.add(part, position + begin, sequence, wanted_from)
            self._decode(context)
            if out is not None and n_wanted:
                pointer = self._lib.llama_get_logits(context)
                out[filled : filled + n_wanted] = np.ctypeslib.as_array(pointer, (n_wanted, self._n_vocab))
                filled += n_wanted

    def _decode(self, context: Any, batch: Batch | None = None) -> None:
        struct = (batch or self._batch).struct
        status = self._lib.llama_decode(context, struct)
        if status != 0:
            raise EngineError(f"llama_decode gave {status} on {struct.n_tokens} tokens: {_last_words()}")


def gguf_file(path: Path) -> Path:
    """Give the one .gguf file that a path means. Raises EngineError."""
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise EngineError(f"{path} holds {len(found)} .gguf files; one is needed")
        return found[0]
    if not path.is_file():
        raise EngineError(f"{path} is no file")
    return path


def _packs(rows: Sequence[TokenRow], n_shared: int) -> Iterator[list[TokenRow]]:
    """Cut rows, in order, into batches. A row that does not fit one is alone."""
    pack: list[TokenRow] = []
    n_tokens = 0
    for row in rows:
        n_row = len(row.ids) - n_shared - 1
        if pack and (n_tokens + n_row > N_BATCH or len(pack) == N_ROWS):
            yield pack
            pack, n_tokens = [], 0
        pack.append(row)
        n_tokens += n_row
    yield pack


# llama.cpp has one log callback for the process; its last warnings explain the next error.
_lines: deque[str] = deque(maxlen=20)
_callbacks: list[Any] = []


def _listen(lib: Any) -> None:
    def keep(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace")
        if level >= _LOG_WARN and len(line.strip()) > 1:
            _lines.append(line.strip())

    callback = lib.llama_log_callback(keep)
    _callbacks[:] = [*_callbacks[-1:], callback]  # the one that is replaced may still be running
    _lines.clear()
    lib.llama_log_set(callback, ctypes.c_void_p(0))


def _last_words() -> str:
    return "; ".join(list(_lines)[-2:]) or "it gave no reason"
