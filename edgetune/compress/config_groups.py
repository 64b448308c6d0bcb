"""Schemes layer by layer in compressed-tensors' configuration: `config_groups`, each with its targets.

A target is a layer's name, a pattern (`re:`, matched at the beginning of a name), or a class of modules; of those that
match, names count before patterns, and patterns before classes. One group of all layers names their class. Several
have patterns, which also match the names under which vLLM fuses layers: vLLM looks for these before their parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.compress.architectures import SHARED_INPUTS
from edgetune.compress.dynamic import FUSED
from edgetune.compress.patterns import is_pattern, matches
from edgetune.compress.scheme import Scheme

PATTERN, ALL = "re:", "Linear"
READ_BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Group:
    """What a file says of a group of layers."""

    bits: int
    group_size: int  # -1 for the whole row


def written_groups(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """Give the groups of layers that have one scheme, most bits first.

    transformers 5.23, told to dequantize, takes the first group's bits for all layers. Words that are read as wider
    integers than they hold run out, and are refused; the other way they may be misread in silence.
    """
    found = sorted(set(schemes.values()), key=lambda one: (-one.bits, one.group_size))
    if len(found) == 1:
        return {"group_0": _group([ALL], found[0])}
    return {f"group_{place}": _group(_targets(schemes, one), one) for place, one in enumerate(found)}


def _group(targets: list[str], scheme: Scheme) -> dict[str, Any]:
    rows = scheme.group_size == -1
    weights = {
        "num_bits": scheme.bits, "type": "int", "symmetric": scheme.sym, "strategy": "channel" if rows else "group",
        "group_size": None if rows else scheme.group_size, "dynamic": False, "actorder": None,
    }  # fmt: skip
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _targets(schemes: Mapping[str, Scheme], wanted: Scheme) -> list[str]:
    """Give a pattern for each kind of layer, with the numbers of the blocks where it has the scheme."""
    targets = []
    for first in (group[0] for group in SHARED_INPUTS):
        named = [name for name, scheme in schemes.items() if scheme == wanted and name.endswith(f".{first}")]
        if named:
            blocks = "|".join(name.split(".")[2] for name in named)  # model.layers.N
            pattern = f"model.layers.({blocks}).{FUSED.get(first, first)}$".replace(".", r"\.")
            targets.append(f"{PATTERN}{pattern}")
    return targets


def read_groups(config: object, form: str) -> dict[str, Group] | None:
    """Give the group of each target of a file; None where one is of another kind than is read here."""
    found: dict[str, Group] = {}
    for given in config.values() if isinstance(config, dict) else ():
        group, targets = _read(given, form), given.get("targets", [ALL]) if isinstance(given, dict) else None
        if group is None or not isinstance(targets, list) or not all(map(_is_target, targets)):
            return None
        found |= dict.fromkeys(targets, group)
    return found or None


def _read(group: object, form: str) -> Group | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(weights, dict):
        return None
    columns = -1 if weights.get("strategy") == "channel" else weights.get("group_size")
    integers = weights.get("type") == "int" and weights.get("strategy") in ("group", "channel")
    plain = integers and not group.get("input_activations") and not weights.get("actorder")
    known = weights.get("num_bits") in READ_BITS and group.get("format") in (None, form)
    return Group(int(weights["num_bits"]), columns) if plain and known and isinstance(columns, int) else None


def _is_target(target: object) -> bool:
    return isinstance(target, str) and is_pattern(target.removeprefix(PATTERN))


def matched(name: str, groups: Mapping[str, Group]) -> Group | None:
    """Give the group of a linear layer by the targets of all groups; None where none has it.

    Raises UnsupportedError where a pattern takes too long.
    """
    patterns = sorted(target for target in groups if target.startswith(PATTERN))
    fitting = (target for target in patterns if matches(target.removeprefix(PATTERN), name))
    return groups.get(name) or groups.get(next(fitting, ALL))
