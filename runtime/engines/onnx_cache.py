"""The key/value cache of an ONNX Runtime session, bound to numpy buffers.

Shapes: K key/value heads, D head size, P past tokens, S = P + new tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgetune.runtime.engines.growing_cache import Slots

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
PAST, PRESENT = "past_key_values.", "present."


def bind(to: Any, name: str, array: Any) -> None:
    """Bind a numpy array as an input or output."""
    to(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)


def _bind_both(binding: Any, buffers: dict[str, Any]) -> None:
    """Bind each buffer as past and as present."""
    for name, buffer in buffers.items():
        bind(binding.bind_input, name, buffer)
        bind(binding.bind_output, name.replace(PAST, PRESENT, 1), buffer)


class SharedCache:
    """GroupQueryAttention writes into the buffer that holds the past: bound once, a step copies nothing."""

    def __init__(self, session: Any, binding: Any, head_size: int, n_ctx: int, *, n_rows: int = 1) -> None:
        self._buffers = {
            given.name: np.zeros([n_rows, int(given.shape[1]), n_ctx, head_size], DTYPES[given.type])
            for given in session.get_inputs()
            if given.name.startswith(PAST)
        }
        self.bytes_per_token = sum(buffer.nbytes for buffer in self._buffers.values()) // (n_rows * n_ctx)
        _bind_both(binding, self._buffers)

    def bind_row(self, binding: Any, row: int) -> None:
        """Bind the cache of one row alone."""
        _bind_both(binding, {name: buffer[row : row + 1] for name, buffer in self._buffers.items()})

    def clear(self) -> None:
        """Nothing to do: what lies behind the past is never read."""

    keep = rewind = clear

    def before(self, n_past: int, n_new: int) -> None:
        """Nothing to bind anew."""

    after = clear


class GrowingCache:
    """The standard Attention copies the past in front of what is new: from one of three sets of buffers to another."""

    def __init__(self, session: Any, binding: Any, head_size: int, n_ctx: int) -> None:
        self._binding, self._head_size, self._n_ctx = binding, head_size, n_ctx
        self._inputs = [given for given in session.get_inputs() if given.name.startswith(PAST)]
        self.bytes_per_token = sum(
            int(given.shape[1]) * head_size * np.dtype(DTYPES[given.type]).itemsize for given in self._inputs
        )
        self._slots = Slots()
        self._buffers: dict[int, list[Any]] = {}
        self.clear, self.keep, self.rewind = self._slots.clear, self._slots.keep, self._slots.rewind
        self.after = self._slots.advance

    def before(self, n_past: int, n_new: int) -> None:
        """Bind the past [1, K, P, D] and the place of past and new [1, K, S, D]."""
        written = self._slots.next
        past = written if self._slots.past is None else self._slots.past  # an empty past may lie anywhere
        for given, old, new in zip(self._inputs, self._of(past), self._of(written), strict=True):
            present = given.name.replace(PAST, PRESENT, 1)
            bind(self._binding.bind_input, given.name, self._view(given, old, n_past))
            bind(self._binding.bind_output, present, self._view(given, new, n_past + n_new))

    def _view(self, given: Any, buffer: Any, length: int) -> Any:
        K, D = int(given.shape[1]), self._head_size
        return buffer[: K * length * D].reshape(1, K, length, D)

    def _of(self, slot: int) -> list[Any]:
        if slot not in self._buffers:
            self._buffers[slot] = [
                np.zeros(int(given.shape[1]) * self._n_ctx * self._head_size, DTYPES[given.type])
                for given in self._inputs
            ]
        return self._buffers[slot]
