"""Which ggml type each group of layers of a GGUF file gets: the least sum of measured divergences within a budget.

A type is offered to a group of layers where its blocks divide their rows; nothing falls back to another type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgetune.compress.allocate import allocate, linear_groups
from edgetune.compress.architectures import linear_shapes
from edgetune.errors import UnsupportedError
from edgetune.export.gguf_types import BLOCK
from edgetune.ggml_types import named
from edgetune.recipe_export import AllocateTypes, TokenTime

SMALL = 32  # columns of the smallest blocks
TICK_MS = 1e-4  # what times are counted in: integers for the solver, far below what is measured
Losses = Mapping[str, Mapping[str, float]]  # first layer of a group -> type -> nats a token


def check_types(config: AllocateTypes, model_config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError where a group is offered no type, or the smallest ones are over the budget."""
    sizes = _sizes(config, dict(model_config))
    shapes = linear_shapes(dict(model_config))
    for first, of in sizes.items():
        width = shapes[first][1]
        if not of and width % SMALL:
            raise UnsupportedError(f"{first} has rows of {width}, which no type packs; leave allocate out")
        if not of:
            raise UnsupportedError(
                f"allocate.choices: none packs rows of {width}, which {first} has; add one of Q4_0, Q4_1, Q5_0, Q5_1, "
                "Q8_0"
            )
    if isinstance(config.budget, TokenTime):  # nobody knows before it is measured
        return
    n = sum(R * C for R, C in shapes.values())
    least = math.ceil(1e4 * sum(min(of.values()) for of in sizes.values()) / n) / 1e4
    if least > config.budget:
        raise UnsupportedError(
            f"allocate.budget={config.budget:g}: the smallest choices take {least:g} bits a weight; raise it, or add "
            "smaller choices"
        )


def check_times(config: AllocateTypes, model_config: Mapping[str, Any], times: Mapping[str, float]) -> None:
    """Raise UnsupportedError where the fastest types are over a budget of time; `times` are ms a token by type."""
    sizes = _times(config, dict(model_config), times)
    least = sum(min(of.values()) for of in sizes.values()) * TICK_MS
    if config.ms_per_token is not None and least > config.ms_per_token:
        raise UnsupportedError(
            f"allocate.budget.ms_per_token={config.ms_per_token:g}: the fastest choices take {least:.3g} ms a token on "
            "this machine; raise it, or add faster choices"
        )


def layer_types(
    config: AllocateTypes, model_config: Mapping[str, Any], losses: Losses, times: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Give the type of every linear layer of the blocks, by its module name.

    `times` are ms a token by type, which a budget of time reads. Raises as `check_times`.
    """
    groups = linear_groups(dict(model_config))
    if isinstance(config.budget, TokenTime):
        assert times is not None, "a budget of time is measured"
        check_times(config, model_config, times)
        sizes, budget = _times(config, dict(model_config), times), int(config.budget.ms_per_token / TICK_MS)
    else:
        n = sum(R * C for R, C in linear_shapes(dict(model_config)).values())
        sizes, budget = _sizes(config, dict(model_config)), int(config.budget * n)
    chosen = allocate(losses, sizes, budget)
    return {name: chosen[first] for first, names in groups.items() for name in names}


def predicted_ms(model_config: Mapping[str, Any], types: Mapping[str, str], times: Mapping[str, float]) -> float:
    """Give ms a token of layers in these types: each takes its share of the weights of what all take in its type."""
    shapes = linear_shapes(dict(model_config))
    n = sum(R * C for R, C in shapes.values())
    return float(f"{sum(R * C / n * times[types[name]] for name, (R, C) in shapes.items()):.4g}")


def offered(kind: str, width: int) -> bool:
    """Whether a type's blocks divide rows of this width."""
    return width % BLOCK[kind] == 0


def _times(
    config: AllocateTypes, model_config: dict[str, Any], times: Mapping[str, float]
) -> dict[str, dict[str, int]]:
    """Give the ticks that a group of layers takes of a token in each type that it is offered, rounded up."""
    n, weights = sum(R * C for R, C in linear_shapes(model_config).values()), linear_shapes(model_config)
    share = {
        first: sum(weights[name][0] * weights[name][1] for name in names) / n
        for first, names in linear_groups(model_config).items()
    }
    return {
        first: {kind: math.ceil(share[first] * times[kind] / TICK_MS) for kind in of}
        for first, of in _sizes(config, model_config).items()
    }


def _sizes(config: AllocateTypes, model_config: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Give the bits that a group of layers takes in each type that it is offered."""
    shapes, found = linear_shapes(model_config), dict[str, dict[str, int]]()
    for first, names in linear_groups(model_config).items():
        n = sum(shapes[name][0] * shapes[name][1] for name in names)
        kinds = [kind for kind in config.choices if offered(kind, shapes[first][1])]
        found[first] = {kind: 8 * named(kind).row_bytes(n) for kind in kinds}
    return found
