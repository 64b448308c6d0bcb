"""Which insides of a student are compared with which of its teacher, from their `config.json` alone. No torch here."""

from __future__ import annotations

from math import gcd
from typing import Any

from edgetune.compress.architectures import linear_shapes
from edgetune.errors import UnsupportedError
from edgetune.recipe_distill import Distill

PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # of a block's `self_attn`


def check(config: Distill, student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Refuse blocks that the student does not have, and relation heads that fit not both. Raises UnsupportedError."""
    if config.hidden_weight:
        paired_blocks(config, student, teacher)
    if config.relation_weight:
        relation_heads(config, student, teacher)


def paired_blocks(config: Distill, student: dict[str, Any], teacher: dict[str, Any]) -> list[tuple[int, int]]:
    """Give the blocks whose outputs are compared, as (student's, teacher's) from 0, in rising order.

    The student's block that ends its first i/n of the depth meets the teacher's that does, the later one of two as near
    (TinyBERT's uniform mapping, arXiv:1909.10351). Raises UnsupportedError where the student has no such block.
    """
    ours, theirs = int(student["num_hidden_layers"]), int(teacher["num_hidden_layers"])
    named = config.hidden_layers
    blocks = sorted(named) if isinstance(named, list) else range(ours) if named == "all" else [ours - 1]
    if blocks[-1] >= ours:
        raise UnsupportedError(f"distill.hidden_layers names block {blocks[-1]}, the student's are 0 to {ours - 1}")
    return [(block, max((2 * (block + 1) * theirs + ours) // (2 * ours), 1) - 1) for block in blocks]


def relation_heads(config: Distill, student: dict[str, Any], teacher: dict[str, Any]) -> int:
    """Give the number of heads that the queries, keys and values of both split into evenly.

    Raises UnsupportedError where the number that the recipe names does not.
    """
    widths = sorted({*_widths(student), *_widths(teacher)})
    common = gcd(*widths)
    if config.relation_heads is None:
        most = int(teacher["num_attention_heads"])
        return next(n for n in range(min(most, common), 0, -1) if common % n == 0)
    if common % config.relation_heads:
        said = ", ".join(map(str, widths))
        raise UnsupportedError(
            f"distill.relation_heads={config.relation_heads} does not divide queries, keys and values of {said}; "
            f"choose a divisor of {common}"
        )
    return config.relation_heads


def _widths(config: dict[str, Any]) -> list[int]:
    """Widths of a block's queries, keys and values."""
    shapes = linear_shapes(config)
    return [shapes[f"model.layers.0.self_attn.{name}"][0] for name in PROJECTIONS]
