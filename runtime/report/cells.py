"""One figure as the report shows it: its text, its interval, and where its raw samples stand."""

from __future__ import annotations

from dataclasses import dataclass

from edgetune.runtime.report.columns import BY_KEY, DASH, interval_text, number
from edgetune.runtime.report.measures import Figure

EVIDENCE = "report.json"


@dataclass(frozen=True)
class Cell:
    """One figure: its text, the number to sort by, its interval, and the place of its samples in a file."""

    text: str = DASH
    value: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    source: str = ""
    file: str = EVIDENCE


def figure_cell(figure: Figure, digits: int, *, signed: bool = False, source: str, file: str = EVIDENCE) -> Cell:
    """Write a figure, and below it its interval and the rows that it is of, where it has them."""
    if figure.value is None:
        return Cell()
    said = []
    if interval := interval_text(figure.low, figure.high, digits, signed=signed):
        said.append(interval)
    if figure.n_rows is not None:
        said.append(f"{figure.n_rows:,} rows")
    text = number(figure.value, digits, signed=signed)
    return Cell(text, figure.value, figure.low, figure.high, ", ".join(said), source, file)


def column_cell(key: str, figure: Figure, place: str) -> Cell:
    """Write a figure as its column has it; `place` is where the subject stands in report.json."""
    column = BY_KEY[key]
    stored = column.source
    for head in ("accuracy[]", "latency[].cases[]" if ".cases[" in place else "latency[]", "artifacts.*"):
        stored = stored.replace(head, place)
    return figure_cell(figure, column.digits, signed=key == "loss", source=stored)


def column_cells(figures: dict[str, Figure], place: str) -> dict[str, Cell]:
    return {key: column_cell(key, figure, place) for key, figure in figures.items()}
