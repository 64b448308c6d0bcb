"""The arrays that llama.cpp reads a batch of tokens from."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Batch:
    """A llama_batch whose arrays are numpy's, filled by slices."""

    def __init__(self, struct: Any, size: int) -> None:
        self.token = np.zeros(size, np.int32)
        self.pos = np.zeros(size, np.int32)
        self.sequence = np.zeros(size, np.int32)
        self.want = np.zeros(size, np.int8)
        self._n_seq_id = np.ones(size, np.int32)
        self._seq_id = (self.sequence.ctypes.data + 4 * np.arange(size)).astype(np.uintp)  # one pointer a token
        kinds = {name: kind for name, kind, *_ in struct._fields_}

        def at(name: str, array: NDArray[Any]) -> Any:
            return ctypes.cast(array.ctypes.data, kinds[name])

        self.struct = struct(
            n_tokens=0, token=at("token", self.token), embd=None, pos=at("pos", self.pos),
            n_seq_id=at("n_seq_id", self._n_seq_id), seq_id=at("seq_id", self._seq_id), logits=at("logits", self.want),
        )  # fmt: skip

    def clear(self) -> None:
        self.struct.n_tokens = 0

    def add(self, ids: Sequence[int], position: int, sequence: int, wanted_from: int | None = None) -> int:
        """Append tokens of one sequence; give how many of them lie at or after `wanted_from` and want logits."""
        begin, end = self.struct.n_tokens, self.struct.n_tokens + len(ids)
        self.token[begin:end] = ids
        self.pos[begin:end] = positions = np.arange(position, position + len(ids))
        self.sequence[begin:end] = sequence
        wanted = positions >= wanted_from if wanted_from is not None else np.zeros(len(ids), bool)
        self.want[begin:end] = wanted
        self.struct.n_tokens = end
        return int(wanted.sum())

    def want_last(self) -> None:
        self.want[self.struct.n_tokens - 1] = 1


class OneToken(Batch):
    """A batch of one token that wants its logits: what does not change from token to token is set once."""

    def __init__(self, struct: Any) -> None:
        super().__init__(struct, 1)
        self.want[0] = 1
        self.struct.n_tokens = 1

    def set(self, token: int, position: int) -> None:
        self.token[0], self.pos[0] = token, position


class LastLogits:
    """The logits of the last position of a context, [V], copied: llama.cpp's next call overwrites them.

    The view that is copied is made once for each address: caches are cold after each token, so every call counts.
    """

    def __init__(self, lib: Any, n_vocab: int) -> None:
        ask = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._ask = ask(("llama_get_logits_ith", lib.llama_cpp._lib))
        self._kind = ctypes.c_float * n_vocab
        self._address: int | None = None
        self._view: NDArray[np.float32] | None = None

    def of(self, context: Any) -> NDArray[np.float32]:
        address = self._ask(context, -1)
        if address != self._address or self._view is None:
            self._address, self._view = address, np.ctypeslib.as_array(self._kind.from_address(address))
        return self._view.copy()
