"""The seam ledger: the same rows after each hop, so that a loss has an address."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgetune.runtime.evidence import Report, Seam
from edgetune.runtime.report import measures
from edgetune.runtime.report.cells import EVIDENCE, Cell, figure_cell

# title's field of the evidence -> factor to its unit, digits, and what of each row it is made of
FIGURES = {
    "token_accuracy": (100.0, 2, "n_correct"),
    "nll_per_token": (1.0, 4, "nll"),
    "kl_per_token": (1.0, 4, "kl"),
}


@dataclass(frozen=True)
class Hop:
    name: str
    branch: str  # candidate, or empty on the trunk that all share
    engine: str
    n_rows: int
    exact: Cell  # percent
    before: float | None  # percent, of the hop that this one follows
    change: Cell  # points
    cells: list[Cell]  # token accuracy in percent, nll and kl per token in nats


def hops(report: Report, candidates: set[str]) -> Iterator[Hop]:
    """Follow the ledger. A hop named "candidate: step" leaves the trunk that all candidates share."""
    last: dict[str, Seam] = {}
    for i, seam in enumerate(report.seams):
        branch, _, step = seam.hop.partition(": ")
        if branch not in candidates:
            branch, step = "", seam.hop
        before = None if seam.aside else last.get(branch, last.get(""))
        if not seam.aside:
            last[branch] = seam
        place = f"seams[{i}].{'exact_match' if seam.exact_rows is None else 'exact_rows'}"
        share = measures.share_interval(round(seam.exact_match * seam.n_rows), seam.n_rows)
        change = Cell() if before is None else figure_cell(measures.change(seam, before), 1, signed=True, source=place)
        yield Hop(
            step, branch, seam.engine, seam.n_rows, figure_cell(share, 1, source=place),
            None if before is None else before.exact_match * 100, change, list(_figures(report, i, seam)),
        )  # fmt: skip


def _figures(report: Report, i: int, seam: Seam) -> Iterator[Cell]:
    """Give the figures of a hop. Their rows stand in the report where it has them, else in the store's evidence."""
    held = next((k for k, found in enumerate(report.accuracy) if found.subject.name == seam.subject), None)
    for name, (factor, digits, of_row) in FIGURES.items():
        source, file = f"seams[{i}].{name}", EVIDENCE
        if held is not None:
            source = f"accuracy[{held}].rows[].{of_row}, .n_tokens"
        elif seam.evidence is not None:
            source, file = f"rows[].{of_row}, .n_tokens", f"{seam.evidence} of the store"
        value = getattr(seam, name)
        yield figure_cell(measures.Figure(None if value is None else value * factor), digits, source=source, file=file)
