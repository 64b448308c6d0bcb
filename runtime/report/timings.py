"""The latency of each subject at each prompt length: percentiles, rates, load and first run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune.runtime.evidence import Report
from edgetune.runtime.report import measures
from edgetune.runtime.report.cells import Cell, column_cells

# figure -> its title, and the key of its rate in tokens a second
FIGURES = {"ttft": ("TTFT", "prefill"), "itl": ("ITL", "decode"), "tpot": ("TPOT", "")}


@dataclass(frozen=True)
class Line:
    """One figure of one case, milliseconds."""

    title: str
    percentiles: list[Cell]
    rate: Cell  # tokens a second
    rate_of: str  # "prefill", "decode" or empty
    n_samples: int


@dataclass(frozen=True)
class Case:
    """One latency case of one subject; `waits` are the raw inter-token latencies, warm-up left out."""

    name: str
    prompt_tokens: int
    waits: list[float]
    cells: dict[str, Cell]
    lines: list[Line]
    source: str


def cases(
    report: Report, names: Sequence[str], timed: Sequence[Sequence[dict[str, measures.Figure]]]
) -> dict[int, list[Case]]:
    """Give the cases by prompt length, the longest first; `timed` are the figures of each case of each latency."""
    made: dict[int, list[Case]] = {}
    for i, latency in sorted(enumerate(report.latency), key=lambda pair: names.index(pair[1].subject.name)):
        starts = {"load": measures.Figure(latency.load_ms), "first_run": measures.Figure(latency.first_run_ms)}
        for j, case in enumerate(latency.cases):
            kept = [g for g in case.generations if not g.warmup]
            place = f"latency[{i}].cases[{j}]"
            cells = column_cells(starts, f"latency[{i}]") | column_cells(timed[i][j], place)
            waits = [x for g in kept for x in g.itl_ms]
            samples = {"ttft": len(kept), "itl": len(waits), "tpot": sum(bool(g.itl_ms) for g in kept)}
            lines = [
                Line(
                    title, [cells.get(f"{key}_p{q}", Cell()) for q in measures.PERCENTILES], cells.get(rate, Cell()),
                    rate, samples[key],
                )
                for key, (title, rate) in FIGURES.items()
            ]  # fmt: skip
            lengths = {c.new_tokens for c in latency.cases if c.prompt_tokens == case.prompt_tokens}
            name = f"{latency.subject.name}, {case.new_tokens} new" if len(lengths) > 1 else latency.subject.name
            made.setdefault(case.prompt_tokens, []).append(Case(name, case.prompt_tokens, waits, cells, lines, place))
    return dict(sorted(made.items(), reverse=True))
