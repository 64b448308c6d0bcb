"""Metrics of one output against its target, and their sums over rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

Slot = tuple[str, str, str]  # intent, key, value in canonical JSON


class SlotCounts(NamedTuple):
    """Slots that are right, that the output has, and that the target has."""

    true_positives: int
    predicted: int
    gold: int


def parse_slots(text: str) -> Counter[Slot] | None:
    """Give the slots of a one-line JSON object as (intent, key, value), or None where it is not one.

    The intent is a slot of its own. Keys of nested objects are joined by dots; each element of a list is a slot.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return None
    intent = _canonical(value.get("intent"))
    return Counter((intent, key, _canonical(leaf)) for key, leaf in _leaves(value))


def slot_counts(predicted_text: str, gold_text: str) -> SlotCounts:
    """Count slots of an output and its target. An output that is no JSON object has none."""
    predicted, gold = parse_slots(predicted_text) or Counter(), parse_slots(gold_text) or Counter()
    return SlotCounts((predicted & gold).total(), predicted.total(), gold.total())


def slot_counts_by_key(predicted_text: str, gold_text: str) -> dict[str, SlotCounts]:
    """Count the same slots key by key; the intent counts under its own key."""
    predicted, gold = parse_slots(predicted_text) or Counter(), parse_slots(gold_text) or Counter()
    sides = (predicted & gold, predicted, gold)
    counts: dict[str, list[int]] = {}
    for i, side in enumerate(sides):
        for (_, key, _), n in side.items():
            counts.setdefault(key, [0, 0, 0])[i] += n
    return {key: SlotCounts(*found) for key, found in counts.items()}


def micro_f1(counts: Iterable[SlotCounts | tuple[int, int, int]]) -> float:
    """Give 2 TP / (predicted + gold) over all rows; 1 where neither has any slot."""
    rows = list(counts)
    right, predicted, gold = (sum(row[i] for row in rows) for i in range(3))
    return 2 * right / (predicted + gold) if predicted + gold else 1.0


def _leaves(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        for leaf in item if isinstance(item, list) else [item]:
            if isinstance(leaf, dict):
                yield from _leaves(leaf, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", leaf


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
