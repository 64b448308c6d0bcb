"""The data check as one page that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from edgetune.data.check.findings import DataReport, Lengths

FOLDER = Path(__file__).parent
WIDTH, HEIGHT = 480, 96  # of a histogram, in its own units
MAX_LABELS = 40


def render_page(report: DataReport) -> str:
    """Render the page; its policy lets only its own style through."""
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"histogram": histogram, "max_labels": MAX_LABELS}
    environment.filters |= {"percent": lambda share: f"{share:.1%}", "number": lambda value: f"{value:,.4g}"}
    return environment.get_template("page.html.jinja").render(
        report=report, style=Markup(style), policy=f"default-src 'none'; style-src 'sha256-{digest}'"
    )


def histogram(lengths: Lengths) -> Markup:
    """Bars of a distribution as inline SVG; the table beside it says the figures."""
    highest, n = max(lengths.counts), len(lengths.counts)
    bars = []
    for index, count in enumerate(lengths.counts):
        height = HEIGHT * count / highest
        title = f"{lengths.edges[index]:.0f} to {lengths.edges[index + 1]:.0f} {lengths.unit}: {count} rows"
        x, width = WIDTH * index / n, WIDTH / n - 1
        bars.append(
            f'<rect x="{x:.1f}" y="{HEIGHT - height:.1f}" width="{width:.1f}" height="{height:.1f}">'
            f"<title>{title}</title></rect>"
        )
    label = f"Histogram of {lengths.what.lower()}, {lengths.minimum} to {lengths.maximum} {lengths.unit}"
    return Markup(f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(bars)}</svg>')
