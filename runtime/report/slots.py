"""Which fields of the answers go wrong: F1 by slot, the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.runtime.evidence import Accuracy, Report
from edgetune.runtime.metrics import SlotCounts, micro_f1, slot_counts_by_key
from edgetune.runtime.report.cells import Cell, figure_cell
from edgetune.runtime.report.measures import Figure, slots_of

N_SLOTS = 8  # that the page shows


@dataclass(frozen=True)
class SlotLine:
    """One slot: how often the gold answers have it, and its F1 in percent by subject."""

    name: str
    n_gold: int
    cells: list[Cell]


@dataclass(frozen=True)
class SlotTable:
    """The slots with the lowest F1 of any candidate."""

    subjects: list[str]
    lines: list[SlotLine]
    n_slots: int  # in all
    n_rows: int


def slot_table(report: Report, names: Sequence[str]) -> SlotTable | None:
    """Count the slots of the rows whose answers were made, candidates first; None where no answer has any.

    An exact row's answer is its gold answer. A slot that no gold answer has counts in the total alone.
    """
    scores = {found.subject.name: (i, found) for i, found in enumerate(report.accuracy)}
    order = [name for name in dict.fromkeys([*names, report.reference]) if name in scores]
    counts = {name: _counts(report, scores[name][1]) for name in order}
    gold: dict[str, int] = {}
    for found in counts.values():
        gold |= {key: n for key, rows in found.items() if (n := sum(row.gold for row in rows))}
    if not gold:
        return None
    f1 = {name: {key: micro_f1(rows) for key, rows in found.items()} for name, found in counts.items()}
    judged = [name for name in order if name in names] or order

    def worst(key: str) -> float:
        return min(f1[name].get(key, 1.0) for name in judged)

    lines = [
        SlotLine(
            key, gold[key],
            [
                figure_cell(
                    Figure(100 * f1[name][key] if key in f1[name] else None), 1,
                    source=f"accuracy[{scores[name][0]}].rows[].output, texts[].gold",
                )
                for name in order
            ],
        )
        for key in sorted(gold, key=lambda key: (worst(key), key))[:N_SLOTS]
    ]  # fmt: skip
    n_rows = max(sum(slots_of(row) is not None for row in scores[name][1].rows) for name in order)
    return SlotTable(order, lines, len(gold), n_rows)


def _counts(report: Report, score: Accuracy) -> dict[str, list[SlotCounts]]:
    made: dict[str, list[SlotCounts]] = {}
    for row, text in zip(score.rows, report.texts, strict=False):
        if slots_of(row) is not None:
            answer = text.gold if row.exact else row.output or ""
            for key, found in slot_counts_by_key(answer, text.gold).items():
                made.setdefault(key, []).append(found)
    return made
