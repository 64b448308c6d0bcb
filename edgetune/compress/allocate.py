"""Which group of layers gets how many bits: the least sum of divergences within a budget, found exactly.

Each group takes one of its choices, each with a size and a divergence that was measured of it alone: a multiple-choice
knapsack, solved as an integer program by HiGHS (scipy). That divergences of single groups add up is the only
approximation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from edgetune.compress.architectures import SHARED_INPUTS, linear_shapes
from edgetune.compress.scheme import Scheme
from edgetune.errors import UnsupportedError
from edgetune.recipe_quantize import Allocate

Choice = TypeVar("Choice", int, str)  # a number of bits, or a type
RANGE = 1e6  # what the largest divergence is scaled to: the solver's absolute tolerances are 1e-6


def linear_groups(model_config: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Give the layers that share an input, hence their bits, by the name of the first."""
    n_layers = int(model_config["num_hidden_layers"])
    grouped = [tuple(f"model.layers.{i}.{name}" for name in group) for i in range(n_layers) for group in SHARED_INPUTS]
    return {names[0]: names for names in grouped}


def stored_bits(model_config: dict[str, Any], group_size: int, bits: int) -> dict[str, int]:
    """Give the stored bits of each group of layers, scales and zero points counted."""
    shapes, scheme = linear_shapes(model_config), Scheme(bits, group_size)
    return {
        first: sum(round(shapes[n][0] * shapes[n][1] * scheme.bits_per_weight(shapes[n][1])) for n in names)
        for first, names in linear_groups(model_config).items()
    }


def check_budget(config: Allocate, group_size: int, model_config: dict[str, Any]) -> None:
    """Raise UnsupportedError where not even the fewest bits for all layers keep the budget."""
    n = sum(R * C for R, C in linear_shapes(model_config).values())
    least = math.ceil(1e4 * sum(stored_bits(model_config, group_size, config.choices[0]).values()) / n) / 1e4
    if least > config.budget:
        raise UnsupportedError(f"allocate.budget={config.budget:g}: {config.choices[0]} bits for all layers take "
                               f"{least:g} with group_size={group_size}; raise it, or group_size")  # fmt: skip


def layer_bits(
    config: Allocate, group_size: int, model_config: dict[str, Any], losses: Mapping[str, Mapping[int, float]]
) -> dict[str, int]:
    """Give the bits of every layer by what each group's choices lose, of the group's first layer."""
    n = sum(R * C for R, C in linear_shapes(model_config).values())
    stored: dict[int, dict[str, int]] = {bits: stored_bits(model_config, group_size, bits) for bits in config.choices}
    sizes = {first: {bits: of[first] for bits, of in stored.items()} for first in losses}
    chosen = allocate(losses, sizes, int(config.budget * n))
    return {name: chosen[first] for first, names in linear_groups(model_config).items() for name in names}


def allocate(
    losses: Mapping[str, Mapping[Choice, float]], sizes: Mapping[str, Mapping[Choice, int]], budget: int
) -> dict[str, Choice]:
    """Give each group its choice, so that the losses sum to the least and the sizes to `budget` at most.

    `losses` and `sizes` have the same groups, each with the same choices. Raises UnsupportedError where even the
    smallest choices are too large.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    smallest = sum(min(of.values()) for of in sizes.values())
    if smallest > budget:
        raise UnsupportedError(f"the smallest choices take {smallest} bits, the budget is {budget}; raise it")
    places = [(name, choice) for name, of in losses.items() for choice in of]
    cost = np.array([losses[name][choice] for name, choice in places], dtype=np.float64)
    unit = math.gcd(*(sizes[name][choice] for name, choice in places))  # small integers, far above any tolerance
    weight = np.array([sizes[name][choice] // unit for name, choice in places], dtype=np.float64)
    names = {name: row for row, name in enumerate(losses)}
    one = np.zeros((len(names), len(places)))
    one[[names[name] for name, _ in places], range(len(places))] = 1
    found = milp(
        cost * (RANGE / max(float(np.abs(cost).max()), 1e-300)),
        integrality=np.ones(len(places)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(weight[None], -np.inf, budget // unit)],
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message  # the smallest choices are a solution
    return {name: choice for (name, choice), taken in zip(places, found.x, strict=True) if taken > 0.5}
