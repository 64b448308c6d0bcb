"""The data check as a terminal shows it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgetune.data.check.findings import DataReport

RARE = 0.001  # languages below this share are in the JSON only


def print_summary(report: DataReport, console: Console) -> None:
    """Print files, findings, lengths, labels and languages; places of rows are in the JSON and the page."""
    for file in report.files:
        formats = ", ".join(f"{form} {rows}" if len(file.formats) > 1 else form for form, rows in file.formats.items())
        kind = "held out" if file.heldout else "train"
        console.print(f"{file.path}: {file.rows} rows, {kind}, {formats or 'none'}", highlight=False, markup=False)
    table = Table("Finding", box=None, pad_edge=False)
    for head in ("Rows", "Share", "Limit"):
        table.add_column(head, justify="right")
    for finding in report.findings:
        limit = "" if finding.limit is None else f"{finding.limit:.1%}"
        title = Text(finding.title, style="red" if finding.over else "")
        table.add_row(title, str(finding.rows), f"{finding.share:.1%}", limit + (" over" if finding.over else ""))
    console.print(table)
    for kind, rows in report.personal.items():
        console.print(f"  {kind}: {rows} rows", highlight=False)
    for one in report.lengths:
        console.print(
            f"{one.what}, {one.unit}: {one.minimum} to {one.maximum}, median {one.p50:.0f}, "
            f"90 % up to {one.p90:.0f}, 99 % up to {one.p99:.0f}",
            highlight=False,
        )
    for labels in report.labels:
        names = list(labels.counts)
        console.print(
            f"Label {labels.label}: {len(names)} labels, {labels.counts[names[0]]} rows of {names[0]}, "
            f"{labels.counts[names[-1]]} of {names[-1]}, evenness {labels.evenness:.3f}"
            + (f", at least {labels.limit:g} is wanted" if labels.limit is not None else ""),
            highlight=False, markup=False, style="red" if labels.uneven else None,
        )  # fmt: skip
    total = sum(report.languages.values())
    shares = [f"{name} {rows / total:.1%}" for name, rows in report.languages.items() if rows / total >= RARE]
    console.print(f"Language of the questions: {', '.join(shares)}", highlight=False)
