"""The report in short: Markdown for a pull request, and the verdict table for a terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from edgetune.runtime.evidence import Report
from edgetune.runtime.report.cells import Cell
from edgetune.runtime.report.view import Row, View, build_view

if TYPE_CHECKING:
    from rich.table import Table

ICONS = {"ship": "✅ ship", "inconclusive": "❔ inconclusive", "do not ship": "❌ do not ship", "failed": "⚠️ failed",
         "built, not run": "❔ built, not run"}  # fmt: skip
STYLES = {"ship": "green", "inconclusive": "yellow", "do not ship": "red", "failed": "magenta",
          "built, not run": "yellow"}  # fmt: skip
SHORT = ("exact", "loss", "ttft_p95", "itl_p95", "decode", "size", "memory")


def render_markdown(view: View) -> str:
    """Write headline, verdict table, reasons, notes, seam ledger and machine as GitHub's Markdown."""
    columns = [c for c in view.columns if c.key in SHORT]
    lines = [f"## {_plain(view.headline)}", "", _plain(view.lead), ""]
    lines += _table(
        ["Candidate", "Verdict", *(f"{c.title} ({c.unit})" for c in columns)],
        [_row(row, [c.key for c in columns]) for row in (*view.candidates, *view.yardsticks)],
        right_from=2,
    )
    lines += ["", "**Reasons**", ""]
    lines += [f"- {ICONS[d.verdict]} **{_plain(d.candidate)}**: {_plain(d.reason)}" for d in view.decisions]
    if view.notes:
        lines += ["", "**Before you sign**", ""]
        lines += [f"- **{_plain(subject)}** {_plain(text)}" if subject else f"- {_plain(text)}" for subject, text in
                  view.notes]  # fmt: skip
    if view.hops:
        heads = ["Hop", "Engine", "Exact match (%)", "Change (points)", "Token accuracy (%)", "Loss per token (nats)",
                 "KL per token (nats)"]  # fmt: skip
        rows = [
            [_plain(f"{hop.branch}: {hop.name}" if hop.branch else hop.name), _plain(hop.engine), hop.exact.text,
             _with_interval(hop.change), *(cell.text for cell in hop.cells)]
            for hop in view.hops
        ]  # fmt: skip
        lines += ["", "**Where the accuracy went**", "", *_table(heads, rows, right_from=2)]
    if view.forgetting:
        heads = ["Measure", "Over", "Base", "Trained", "Change", "Interval", "Answers"]
        rows = [
            [line.measure, line.over, line.before, line.after, line.change, line.interval, line.flips]
            for line in view.forgetting
        ]
        lines += ["", "**What was forgotten**", "", *_table(heads, rows, right_from=2)]
    if view.kept:
        heads = ["Candidate", "KL to it (nats)", "KL to the base (nats)", "Left", "Update below half a step", "Most in"]
        rows = [
            [_plain(line.candidate), line.away, line.base_away, line.left, line.small, _plain(line.worst)]
            for line in view.kept
        ]
        lines += ["", "**What of the fine-tune is left**", "", *_table(heads, rows, right_from=1)]
    if view.tasks:
        heads = ["Task", "Rows", "Metric", "Subject", "Figure", "Loss", "Bounds"]
        rows = [
            [
                _plain(line.task),
                str(line.n_rows),
                line.metric,
                _plain(line.subject),
                line.figure,
                line.loss,
                line.bounds,
            ]
            for line in view.tasks
        ]
        lines += ["", "**Tasks**", "", *_table(heads, rows, right_from=4)]
    if view.beside:
        lines += ["", "**Measured beside**", ""]
        lines += [f"- **{_plain(line.subject)}** {_plain(line.text)}" for line in view.beside]
    machine = "; ".join(f"{key}: {_plain(value)}" for key, value in view.machine)
    lines += ["", f"Measured on {machine}.", "", "Raw samples: `report.json`. Every figure explained: `report.html`."]
    return "\n".join(lines) + "\n"


def console_table(report: Report) -> Table:
    """Give the verdict table for a terminal."""
    from rich.table import Table
    from rich.text import Text

    view = build_view(report)
    table = Table(title=Text(view.headline), caption=Text(view.lead), title_style="bold", title_justify="left",
                  caption_justify="left", box=None, pad_edge=False)  # fmt: skip
    table.add_column("Candidate", no_wrap=True)
    table.add_column("Verdict", no_wrap=True)
    columns = [c for c in view.columns if c.key in SHORT]
    for column in columns:
        table.add_column(f"{column.title}\n{column.unit}", justify="right")
    for row in (*view.candidates, *view.yardsticks):
        cells = [row.cells[c.key].text for c in columns]
        verdict = Text(row.verdict or row.role, style=STYLES.get(row.verdict, "dim"))
        table.add_row(Text(row.name), verdict, *(Text(cell) for cell in cells))
    return table


def _row(row: Row, keys: list[str]) -> list[str]:
    cells = [row.cells[key] for key in keys]
    figures = [_with_interval(cell) if key == "loss" else cell.text for key, cell in zip(keys, cells, strict=True)]
    return [_plain(row.name), ICONS.get(row.verdict, f"*{row.role}*"), *figures]


def _with_interval(cell: Cell) -> str:
    return f"{cell.text} ({cell.note})" if cell.note else cell.text


def _table(heads: list[str], rows: list[list[str]], *, right_from: int) -> list[str]:
    rule = ["---:" if i >= right_from else "---" for i in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)]


def _plain(text: str) -> str:
    """Keep a text from being read as Markdown or HTML, on one line."""
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~@>])", r"\\\1", one_line)
