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
from edgetune.recipe import Rtn
from edgetune.recipe_quantize import Grid

Label = int | str  # what evidence calls a choice: a number of bits, "4g32", or a type
Choice = TypeVar("Choice", bound=Label)
RANGE = 1e6  # what the largest divergence is scaled to: the solver's absolute tolerances are 1e-6


def linear_groups(model_config: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    """Give the layers that share an input, hence their bits, by the name of the first."""
    n_layers = int(model_config["num_hidden_layers"])
    grouped = [tuple(f"model.layers.{i}.{name}" for name in group) for i in range(n_layers) for group in SHARED_INPUTS]
    return {names[0]: names for names in grouped}


def schemes(config: Rtn) -> dict[Label, Scheme]:
    """Give the schemes that a layer may get, by what evidence calls them."""
    chosen = [config.bits] if config.allocate is None else config.allocate.choices
    return {
        str(one) if isinstance(one, Grid) else one: (
            Scheme(one.bits, one.group_size, config.sym)
            if isinstance(one, Grid)
            else Scheme(one, config.group_size, config.sym)
        )
        for one in chosen
    }


def stores_zero_points(config: Rtn) -> bool:
    """Whether a checkpoint holds zero points; compressed-tensors stores none that are all the same."""
    return config.checkpoint == "gptq" or not config.sym


def stored_bits(model_config: dict[str, Any], scheme: Scheme, *, zero_points: bool = True) -> dict[str, int]:
    """Give the stored bits of each group of layers, scales counted, and zero points where there are any."""
    shapes = linear_shapes(model_config)

    def of(name: str) -> int:
        R, C = shapes[name]
        return round(R * C * scheme.bits_per_weight(C, zero_points=zero_points))

    return {first: sum(map(of, names)) for first, names in linear_groups(model_config).items()}


def check_budget(config: Rtn, model_config: dict[str, Any]) -> None:
    """Raise UnsupportedError where not even the smallest choice for all layers keeps the budget of `allocate`."""
    assert config.allocate is not None, "only allocate has a budget"
    n, budget = sum(R * C for R, C in linear_shapes(model_config).values()), config.allocate.budget
    stored = {label: sum(of.values()) for label, of in _sizes(config, model_config).items()}
    smallest = min(stored, key=lambda label: stored[label])
    if (least := math.ceil(1e4 * stored[smallest] / n) / 1e4) > budget:
        scheme = schemes(config)[smallest]
        raise UnsupportedError(f"allocate.budget={budget:g}: {scheme.bits} bits for all layers take "
                               f"{least:g} with group_size={scheme.group_size}; raise it, or group_size")  # fmt: skip


def admissible(
    config: Rtn, model_config: dict[str, Any], kept: Mapping[str, Mapping[Label, float]]
) -> dict[str, list[Label]]:
    """Give the choices that keep enough of the update of each group of layers, by the shares that each keeps.

    Raises UnsupportedError where a group has none, or the smallest of all are over the budget.
    """
    asked = config.allocate
    assert asked is not None, "only allocate chooses"
    assert asked.keep_update is not None, "or all choices are"
    n, stored = sum(R * C for R, C in linear_shapes(model_config).values()), _sizes(config, model_config)
    found = {first: [label for label, share in of.items() if share >= asked.keep_update] for first, of in kept.items()}
    for first, labels in found.items():
        if not labels:
            raise UnsupportedError(
                f"allocate.keep_update={asked.keep_update:g}: of {first} no choice keeps more than "
                f"{max(kept[first].values()):g}; lower it, or add choices"
            )
    least = math.ceil(1e4 * sum(min(stored[label][first] for label in of) for first, of in found.items()) / n) / 1e4
    if least > asked.budget:
        raise UnsupportedError(
            f"allocate.budget={asked.budget:g}: the smallest choices that keep {asked.keep_update:g} of the update "
            f"take {least:g} bits a weight; raise it, or lower keep_update"
        )
    return found


def layer_schemes(
    config: Rtn,
    model_config: dict[str, Any],
    losses: Mapping[str, Mapping[Label, float]],
    kept: Mapping[str, Mapping[Label, float]] | None = None,
) -> dict[str, Scheme]:
    """Give the scheme of every layer by what each group's choices lose, of the group's first layer.

    `kept` are the shares of the update that each choice keeps, which `keep_update` reads. Raises as `admissible`.
    """
    assert config.allocate is not None, "only allocate chooses"
    n = sum(R * C for R, C in linear_shapes(model_config).values())
    of, stored = schemes(config), _sizes(config, model_config)
    offered = {first: list(stored) for first in losses} if kept is None else admissible(config, model_config, kept)
    losses = {first: {label: losses[first][label] for label in labels} for first, labels in offered.items()}
    sizes = {first: {label: stored[label][first] for label in labels} for first, labels in offered.items()}
    chosen = allocate(losses, sizes, int(config.allocate.budget * n))
    return {name: of[chosen[first]] for first, names in linear_groups(model_config).items() for name in names}


def _sizes(config: Rtn, model_config: dict[str, Any]) -> dict[Label, dict[str, int]]:
    """Give the stored bits of each group of layers for each choice."""
    zero_points = stores_zero_points(config)
    return {
        label: stored_bits(model_config, scheme, zero_points=zero_points) for label, scheme in schemes(config).items()
    }


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
