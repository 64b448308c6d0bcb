"""The TensorRT engine: a `tensorrt` artifact on an NVIDIA GPU, through TensorRT for RTX or TensorRT.

Both libraries have the calls used here. Device memory and the stream are torch's: edgetune depends on torch already,
and its allocator frees what an exception leaves behind; cuda-python would be one more package for the same three calls.
The cache stays on the device, in three sets of buffers (`growing_cache`); only ids go up and logits come down.
Shapes: T tokens, K key/value heads, D head size, P past tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgetune.backends import require
from edgetune.errors import EngineError
from edgetune.runtime.engine import Logits, OneByOne, TokenRow, check_tokens, first_line
from edgetune.runtime.engines.growing_cache import Slots
from edgetune.runtime.engines.kept_prefix import KeptPrefix

ENGINE, SETTINGS = "model.engine", "tensorrt.json"
PREFILL, DECODE = 0, 1  # optimization profiles
NEEDED = (
    "library",
    "version",
    "compute_capability",
    "max_length",
    "chunk",
    "n_layers",
    "n_kv_heads",
    "head_size",
    "n_vocab",
    "stop_ids",
)
Shape = tuple[int, ...]


class Device(Protocol):
    """What a runtime does for the engine; `TrtDevice` does it on a GPU, a fake in the tests."""

    def use_profile(self, number: int) -> None: ...

    def place_cache(self, name: str, slot: int, shape: Shape) -> None:
        """Let a cache input or output of that shape lie in that slot."""
        ...

    def run(self, inputs: dict[str, np.ndarray[Any, Any]], n_tokens: int, n_wanted: int) -> Logits:
        """Read `n_tokens` and give the logits of the last `n_wanted`, [n_wanted, V]."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineFiles:
    """What lies beside the engine: its settings and its tokenizer."""

    folder: Path
    settings: dict[str, Any]
    tokenizer: Any

    @classmethod
    def read(cls, folder: Path) -> EngineFiles:
        """Read them. Raises EngineError where one is missing or damaged."""
        from tokenizers import Tokenizer

        try:
            settings = json.loads((folder / SETTINGS).read_bytes())
            missing = [name for name in NEEDED if name not in settings]
            if missing:
                raise EngineError(f"{folder / SETTINGS} lacks {', '.join(missing)}; export again")
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except EngineError:
            raise
        except Exception as error:  # what tokenizers raises has no other base
            raise EngineError(f"{folder} cannot be read as a TensorRT artifact: {first_line(error)}") from error
        return cls(folder, settings, tokenizer)

    def tokenize(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False).ids]

    def chat_template(self) -> str:
        """Give the template that travels with the tokenizer, "" where none does."""
        template = self.folder / "chat_template.jinja"
        if template.is_file():
            return template.read_text(encoding="utf-8")
        return str(json.loads((self.folder / "tokenizer_config.json").read_bytes()).get("chat_template") or "")


class TensorrtEngine(KeptPrefix, OneByOne):
    """One execution context with a key/value cache of `n_ctx` positions."""

    name = "tensorrt"

    def __init__(self, files: EngineFiles, device: Device, *, n_ctx: int) -> None:
        longest = int(files.settings["max_length"])
        if n_ctx > longest:
            raise EngineError(f"n_ctx={n_ctx} is longer than the {longest} positions that {files.folder} was built "
                              "for; lower n_ctx or export with a larger max_length")  # fmt: skip
        self._files, self._device, self._n_ctx = files, device, n_ctx
        self._settings, self._slots = files.settings, Slots()
        self._profile: int | None = None
        self._n_past, self._reader = 0, None

    @classmethod
    def load(cls, path: Path, *, n_ctx: int, n_threads: int) -> TensorrtEngine:
        """Load a `tensorrt` artifact; `n_threads` is every engine's and means nothing to a GPU.

        Raises EngineError where there is no GPU or the library refuses the file, MissingBackendError without it.
        """
        files = EngineFiles.read(path)
        return cls(files, TrtDevice(files, min(n_ctx, int(files.settings["max_length"]))), n_ctx=n_ctx)

    @property
    def version(self) -> str:
        return f"{self._settings['library']} {self._settings['version']}"

    @property
    def n_vocab(self) -> int:
        return int(self._settings["n_vocab"])

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self._settings["stop_ids"])

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Forget all context, read `ids`, and give the logits of the last position, [V]."""
        self._forget(self)
        for part in self._read(ids, last_only=True):
            last = part[-1]
        return np.array(last)

    def decode(self, token: int) -> Logits:
        """Append one token to the context and give its logits, [V]."""
        assert self._reader is self, "decode needs a prefill before it"
        return np.array(self._run([token])[0])

    def score(self, ids: Sequence[int]) -> Logits:
        """Give the logits of every position of one row, [T, V]."""
        self._forget(None)
        return np.concatenate(list(self._read(ids)))

    def score_rows(self, rows: Sequence[TokenRow]) -> Iterator[Logits]:
        """Give, row by row in order, the logits that predict row.target. What all rows begin with is read once."""
        for row, n_shared in self._behind_prefix(rows):
            found = np.concatenate(list(self._read(row.ids[n_shared:-1])))
            yield found[row.start - 1 - n_shared :]

    def tokenize(self, text: str) -> list[int]:
        """Turn rendered text into ids: special tokens parsed, no BOS added."""
        return self._files.tokenize(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._files.tokenizer.decode(list(ids), skip_special_tokens=True))

    def close(self) -> None:
        self._device.close()

    @property
    def _kept(self) -> Slots:
        return self._slots

    def _skip(self, ids: Sequence[int]) -> None:
        for _ in self._read(ids, last_only=True):
            pass

    def _read(self, ids: Sequence[int], *, last_only: bool = False) -> Iterator[Logits]:
        """Append tokens chunk by chunk and give each chunk's logits, or its last token's: fewer bytes off the GPU."""
        if not ids:
            raise EngineError("tensorrt was asked to read an empty row; give at least one token")
        chunk = int(self._settings["chunk"])
        for start in range(0, len(ids), chunk):
            yield self._run(ids[start : start + chunk], last_only=last_only)

    def _run(self, ids: Sequence[int], *, last_only: bool = False) -> Logits:
        """Append up to a chunk of tokens and give their logits, [T, V], or those of the last, [1, V]."""
        past, total = self._n_past, self._n_past + len(ids)
        check_tokens(self.name, ids, total, self._n_ctx, self.n_vocab, self._files.folder)
        profile = DECODE if len(ids) == 1 and past else PREFILL
        if profile != self._profile:
            self._device.use_profile(profile)
            self._profile = profile
        written = self._slots.next
        read = written if self._slots.past is None else self._slots.past  # an empty past may lie anywhere
        K, D = int(self._settings["n_kv_heads"]), int(self._settings["head_size"])
        for i in range(int(self._settings["n_layers"])):
            for part in ("key", "value"):
                self._device.place_cache(f"past_key_values.{i}.{part}", read, (1, K, past, D))
                self._device.place_cache(f"present.{i}.{part}", written, (1, K, total, D))
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(past, total, dtype=np.int64)[None],
        }
        logits = self._device.run(inputs, len(ids), 1 if last_only else len(ids))
        self._n_past = total
        self._slots.advance()
        return logits


class TrtDevice:
    """An engine file on the GPU: buffers of torch, calls of TensorRT."""

    def __init__(self, files: EngineFiles, n_ctx: int) -> None:
        import torch

        settings = files.settings
        trt: Any = require(settings["library"].replace("-", "_"))
        if not torch.cuda.is_available():
            raise EngineError(
                f"{files.folder} is an engine for an NVIDIA GPU and torch sees none; run it on the target"
            )
        self._torch: Any = torch
        self._stream: Any = self._torch.cuda.Stream()
        self._logger = trt.Logger(trt.Logger.ERROR)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine((files.folder / ENGINE).read_bytes())
        if self._engine is None:
            capabilities = settings["compute_capability"] or ["another GPU"]
            built = f"{settings['library']} {settings['version']} for {', '.join(capabilities)}"
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot load {files.folder / ENGINE}, which {built} "
                              "made; export again with this machine's version and compute capability")  # fmt: skip
        self._context: Any = self._engine.create_execution_context()
        self._length = int(settings["n_kv_heads"]) * n_ctx * int(settings["head_size"])
        self._cache: dict[tuple[str, int], Any] = {}
        shape = (int(settings["chunk"]), int(settings["n_vocab"]))
        self._logits = torch.empty(shape, dtype=torch.float32, device="cuda")
        self._held: list[Any] = []

    def use_profile(self, number: int) -> None:
        self._context.set_optimization_profile_async(number, self._stream.cuda_stream)
        self._stream.synchronize()

    def place_cache(self, name: str, slot: int, shape: Shape) -> None:
        key = (name.replace("past_key_values.", "present.", 1), slot)
        if key not in self._cache:
            self._cache[key] = self._torch.empty(self._length, dtype=self._torch.float16, device="cuda")
        if name.startswith("past_key_values."):
            self._context.set_input_shape(name, shape)
        self._context.set_tensor_address(name, self._cache[key].data_ptr())

    def run(self, inputs: dict[str, np.ndarray[Any, Any]], n_tokens: int, n_wanted: int) -> Logits:
        self._held = [self._torch.from_numpy(array).cuda() for array in inputs.values()]
        self._torch.cuda.current_stream().synchronize()
        for name, held in zip(inputs, self._held, strict=True):
            self._context.set_input_shape(name, tuple(held.shape))
            self._context.set_tensor_address(name, held.data_ptr())
        self._context.set_tensor_address("logits", self._logits.data_ptr())
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise EngineError(f"TensorRT failed on {n_tokens} new tokens; its log is above")
        self._stream.synchronize()
        logits: Logits = self._logits[n_tokens - n_wanted : n_tokens].cpu().numpy()
        return logits

    def close(self) -> None:
        self._context = self._engine = self._runtime = None
        self._cache.clear()
        self._held = []
