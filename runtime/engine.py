"""What every engine can do, and the one table of engines.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import EngineError, UsageError

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class TokenRow:
    """Token ids, and where the part that is scored begins: ids[start:] is scored, ids[:start] is given."""

    ids: tuple[int, ...]
    start: int

    def __post_init__(self) -> None:
        assert 0 < self.start < len(self.ids), "a row needs a token before and after its start"

    @property
    def target(self) -> tuple[int, ...]:
        return self.ids[self.start :]


class Engine(Protocol):
    """A runtime that holds one loaded artifact. Greedy by itself: it gives logits and never samples."""

    name: str

    @property
    def version(self) -> str: ...

    @property
    def n_vocab(self) -> int: ...

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Forget all context, read `ids`, and give the logits of the last position, [V]."""
        ...

    def decode(self, token: int) -> Logits:
        """Append one token to the context and give its logits, [V]."""
        ...

    def score(self, ids: Sequence[int]) -> Logits:
        """Give the logits of every position of one row, [T, V]."""
        ...

    def score_rows(self, rows: Sequence[TokenRow]) -> Iterator[Logits]:
        """Give, row by row in order, the logits that predict row.target, [len(row.target), V].

        An engine shares the prefix of the rows and batches them; the result does not depend on it
        beyond rounding. The array is the caller's until the next one is asked for.
        """
        ...

    def continue_rows(
        self, prompts: Sequence[Sequence[int]], stop: frozenset[int], max_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        """Continue each prompt greedily up to a stop token (kept) or its own limit."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Turn rendered text into ids with the artifact's own tokenizer: special tokens parsed, no BOS added."""
        ...

    def detokenize(self, ids: Sequence[int]) -> str:
        """Turn ids into text with the artifact's own tokenizer; special tokens are left out."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class RowsEngine(Protocol):
    """An engine that also decodes several rows at once, each token with the same weights read."""

    def prefill_rows(self, rows: Sequence[Sequence[int]]) -> Logits:
        """Forget all rows, read new ones of one length, and give the logits of each one's last position, [B, V]."""
        ...

    def decode_rows(self, tokens: Sequence[int]) -> Logits:
        """Append one token to each row and give its logits, [B, V]."""
        ...


@runtime_checkable
class Traffic(Protocol):
    """An engine that knows what one token reads from memory."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in memory, but for an input embedding that is no output head too."""
        ...

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of the cache that each token of context takes."""
        ...


# engine name -> module:class, loaded only when asked for. Each class has
# `load(path: Path, *, n_ctx: int, n_threads: int, **settings) -> Engine` as a classmethod.
ENGINES: dict[str, str] = {
    "torch": "edgetune.runtime.engines.torch_engine:TorchEngine",
    "llama.cpp": "edgetune.runtime.engines.llama_engine:LlamaEngine",
    "onnxruntime": "edgetune.runtime.engines.onnx_engine:OnnxEngine",
    "tensorrt": "edgetune.runtime.engines.tensorrt_engine:TensorrtEngine",
    "onnxruntime-genai": "edgetune.runtime.engines.genai_engine:GenaiEngine",
}

ON_GPU = ("tensorrt",)  # engines that run on an NVIDIA GPU only


def runs_on_gpu(engine: str, settings: Mapping[str, Any]) -> bool:
    """Tell whether an engine runs on a GPU: by itself, or by its settings."""
    return engine in ON_GPU or str(settings.get("device", "cpu")).startswith("cuda")


# artifact kind -> engine that ships it
ENGINE_OF_KIND: dict[str, str] = {
    "model": "torch",
    "gptq": "torch",
    "adapter": "torch",
    "gguf": "llama.cpp",
    "onnx": "onnxruntime",
    "tensorrt": "tensorrt",
}

# artifact kind -> engines that also run it, where they are asked for
ALSO_RUN_BY: dict[str, tuple[str, ...]] = {"onnx": ("onnxruntime-genai",)}


def why_not_run(kind: str) -> str | None:
    """Say why no engine on this machine can run an artifact of that kind; None where one can."""
    if kind != "tensorrt":
        return None
    import torch

    return None if torch.cuda.is_available() else "torch sees no NVIDIA GPU on this machine"


def load_engine(name: str, path: Path, *, n_ctx: int, n_threads: int, **settings: object) -> Engine:
    """Load an artifact folder (or bare file) in an engine.

    Raises UsageError for an unknown engine, MissingBackendError, and EngineError where the load fails.
    """
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}; known: {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute).load(
        path, n_ctx=n_ctx, n_threads=n_threads, **settings
    )
    return engine


def common_prefix(rows: Sequence[TokenRow]) -> int:
    """Give the number of tokens that all rows begin with and that predict no target of any."""
    low, high = min(row.ids for row in rows), max(row.ids for row in rows)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return min(same, min(row.start for row in rows) - 1)


def check_tokens(engine: str, ids: Sequence[int], total: int, n_ctx: int, n_vocab: int, place: Path) -> None:
    """Refuse tokens that make the context longer than `n_ctx` in all or that no vocabulary holds: EngineError."""
    if total > n_ctx:
        raise EngineError(f"{engine} was asked for {total} tokens of context, n_ctx is {n_ctx}; raise n_ctx")
    low, high = min(ids), max(ids)
    if low < 0 or high >= n_vocab:
        wrong = high if high >= n_vocab else low
        raise EngineError(f"token id {wrong} is not in the vocabulary of {n_vocab}; use the tokenizer of {place}")


def first_line(error: BaseException) -> str:
    """What a foreign library said, on one line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class OneByOne:
    """For engines that gain nothing from continuing several prompts at once."""

    def continue_rows(
        self: Engine, prompts: Sequence[Sequence[int]], stop: frozenset[int], max_new_tokens: Sequence[int]
    ) -> list[list[int]]:
        return [greedy(self, prompt, stop, n) for prompt, n in zip(prompts, max_new_tokens, strict=True)]


def greedy(engine: Engine, prompt: Sequence[int], stop: frozenset[int], max_new_tokens: int) -> list[int]:
    """Continue a prompt greedily up to a stop token (kept) or `max_new_tokens`."""
    logits = engine.prefill(prompt)
    new: list[int] = []
    while True:
        if not np.isfinite(logits.max()):
            raise EngineError(f"{engine.name} gave logits that are not finite after {len(new)} new tokens")
        new.append(int(logits.argmax()))
        if new[-1] in stop or len(new) == max_new_tokens:
            return new
        logits = engine.decode(new[-1])
