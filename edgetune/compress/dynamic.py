"""Bits layer by layer in AutoGPTQ's configuration: `dynamic`, as GPTQModel, vLLM and the genai builder read it.

A pattern is matched at the beginning of a layer's name, and the first that matches counts. A group of layers has one
pattern that also matches the name under which vLLM fuses them (qkv_proj, gate_up_proj).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgetune.compress.architectures import SHARED_INPUTS
from edgetune.compress.patterns import is_pattern, matches
from edgetune.errors import UnsupportedError

PLUS = "+:"  # of a pattern that adds; "-:" leaves a layer unquantized
FUSED = {"self_attn.q_proj": "self_attn.(q|k|v|qkv)_proj", "mlp.gate_proj": "mlp.(gate|up|gate_up)_proj"}


def dynamic_bits(bits: Mapping[str, int], usual: int) -> dict[str, dict[str, int]]:
    """Give the patterns of layers whose bits are not the usual ones; those that share an input have the same."""
    found = {}
    for name, width in bits.items():
        block, first = ".".join(name.split(".")[:3]), ".".join(name.split(".")[3:])  # model.layers.N, self_attn.q_proj
        if width != usual and any(first == group[0] for group in SHARED_INPUTS):
            pattern = f"{block}.{FUSED.get(first, first)}".replace(".", r"\.")
            found[f"{PLUS}{pattern}"] = {"bits": width}
    return found


def read_bits(config: Mapping[str, Any], folder: str) -> Callable[[str], int]:
    """Give what tells the bits of a layer by its name.

    Raises UnsupportedError for more than bits, other bits, or what is no pattern; so does what is given, where a
    pattern takes too long.
    """
    dynamic: dict[str, dict[str, Any]] = config.get("dynamic") or {}
    known = isinstance(dynamic, dict) and all(
        isinstance(of, dict) and set(of) <= {"bits"} and not pattern.startswith("-:") for pattern, of in dynamic.items()
    )
    named = [config.get("bits"), *(of.get("bits") for of in dynamic.values())] if known else []
    if not named or any(bits not in (2, 3, 4, 8) for bits in named):
        raise UnsupportedError(f"{folder}: 2, 3, 4 or 8 bits can be read, for all layers or by `dynamic`, and nothing "
                               "else that differs between layers")  # fmt: skip
    patterns = [(pattern.removeprefix(PLUS), int(of["bits"])) for pattern, of in dynamic.items()]
    if wrong := [pattern for pattern, _ in patterns if not is_pattern(pattern)]:
        raise UnsupportedError(f"{folder}: `dynamic` has {wrong[0]!r}, no regular expression")

    def bits_of(name: str) -> int:
        return next((bits for pattern, bits in patterns if matches(pattern, name)), int(config["bits"]))

    return bits_of
