"""How AutoGPTQ packs codes into int32 words: a stream of bits, lowest first, over 32 / gcd(bits, 32) values.

For 2, 4 and 8 bits that is 32 / bits values in a word; for 3 bits, 32 values in three words; compressed-tensors does
the same at 5 and 6 bits, of which AutoGPTQ has none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from edgetune.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


def values_in_unit(bits: int) -> int:
    """Give the number of values that fill whole words."""
    return math.lcm(bits, 32) // bits


def check_pack(name: str, out_features: int, in_features: int, bits: int) -> None:
    """Raise UnsupportedError where a layer does not fill whole words in both directions."""
    unit = values_in_unit(bits)
    for label, size in (("in_features", in_features), ("out_features", out_features)):
        if size % unit:
            raise UnsupportedError(
                f"bits={bits} packs {unit} values at a time, which does not divide {label}={size} of {name}; "
                + ("use bits=4 or 8" if bits in (2, 3) and size % 8 == 0 else "the GPTQ format cannot hold this layer")
            )


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack values [K, n] below 2^bits along their first axis; returns int32 [K * bits / 32, n]."""
    import torch

    unit = values_in_unit(bits)
    K, n = values.shape
    assert K % unit == 0, (K, unit)
    units = values.reshape(K // unit, unit, n).to(torch.int64)
    words = torch.zeros(K // unit, unit * bits // 32 + 1, n, dtype=torch.int64, device=values.device)
    for k in range(unit):
        word, offset = divmod(k * bits, 32)
        words[:, word] |= (units[:, k] << offset) & 0xFFFFFFFF
        words[:, word + 1] |= units[:, k] >> (32 - offset)  # what spills over; nothing but at 3, 5, 6 bits
    return _signed(words[:, :-1]).reshape(K * bits // 32, n)


def unpack(words: Tensor, bits: int) -> Tensor:
    """Undo `pack`: int32 [W, n] to int32 values [W * 32 / bits, n]."""
    import torch

    unit = values_in_unit(bits)
    n_words = unit * bits // 32
    W, n = words.shape
    units = words.to(torch.int64).reshape(W // n_words, n_words, n) & 0xFFFFFFFF
    values = torch.empty(W // n_words, unit, n, dtype=torch.int32, device=words.device)
    for k in range(unit):
        word, offset = divmod(k * bits, 32)
        stream = units[:, word] >> offset
        if offset + bits > 32:
            stream = stream | (units[:, word + 1] << (32 - offset))
        values[:, k] = (stream & (2**bits - 1)).int()
    return values.reshape(-1, n)


def _signed(words: Tensor) -> Tensor:
    import torch

    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
