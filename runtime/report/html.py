"""One self-contained page: the view model through a template, with style, script and pictures inline."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from edgetune.runtime.report import plots
from edgetune.runtime.report.columns import DASH, number
from edgetune.runtime.report.ledger import Hop
from edgetune.runtime.report.measures import PERCENTILES
from edgetune.runtime.report.view import Row, View

FOLDER = Path(__file__).parent
GROUPS = {"summary": "Summary", "accuracy": "Accuracy", "latency": "Latency", "footprint": "Footprint", "all": "All"}
SECTIONS = {
    "candidates": "Candidates",
    "latency": "Latency",
    "seams": "Accuracy",
    "changes": "Answers",
    "forgetting": "Forgetting",
    "kept": "Fine-tune",
    "tasks": "Tasks",
    "run": "Run it",
    "machine": "Method",
    "sign": "Sign-off",
}
COSTS = {"size": "Size on disk", "itl_p95": "ITL p95", "memory": "Peak memory"}


def render_html(view: View, *, evidence: str = "report.json", digest: str = "") -> str:
    """Render the page. `evidence` is the name of the file beside it that holds the raw samples, `digest` its sha256.

    The page asks the network for nothing, and its policy lets only its own style and script run.
    """
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {"shown": shown, "slug": plots.slug, "number": number, "path": path}
    environment.globals |= {"gauge": plots.gauge, "dash": DASH}
    scatters = _scatters(view)
    return environment.get_template("page.html.jinja").render(
        view=view,
        sections=[(key, text) for key, text in SECTIONS.items() if _is_shown(view, key)],
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        evidence=evidence,
        digest=digest,
        groups=list(GROUPS.items()),
        scatters=scatters,
        percentiles=PERCENTILES,
        costs=[(key, COSTS[key]) for key in scatters],
        lengths=[(n, f"{n} tokens") for n in view.cases],
        distributions=_distributions(view),
        curve=plots.curve(view.training, view.heldout),
        curves=[(title, plots.curve(points, [], title)) for title, points in view.training_curves],
        hop_bars=_hop_bars(view),
        worst=[(key, list(rows)) for key, rows in groupby(view.worst_rows, lambda row: (row.task, row.subject))],
    )


def _is_shown(view: View, section: str) -> bool:
    held = {
        "latency": view.cases,
        "seams": view.hops,
        "changes": view.changes,
        "forgetting": view.forgetting,
        "kept": view.kept,
        "tasks": view.tasks,
        "run": view.commands,
    }
    return bool(held.get(section, True))


def shown(text: str) -> Markup:
    """Escape a text and spell out characters that do not show or that turn the line around (U+202E)."""
    spelled = (c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf"} else f"\\u{ord(c):04x}" for c in text)
    return escape("".join(spelled))


def path(source: str) -> Markup:
    """Let a long path break after its dots only."""
    return Markup("<wbr>").join(part for part in source.replace(".", ".\0").split("\0"))


def _policy(style: str, script: str) -> str:
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("style", style), ("script", script))
    }
    allowed = " ".join(f"{kind}-src 'sha256-{digest}';" for kind, digest in hashes.items())
    return f"default-src 'none'; {allowed} base-uri 'none'; form-action 'none'"


def _scatters(view: View) -> dict[str, Markup]:
    made = {}
    for key, title in COSTS.items():
        unit = next(c.unit for c in view.columns if c.key == key)
        points = [p for row in (*view.candidates, *view.yardsticks) if (p := _point(row, key)) is not None]
        if any(p.verdict for p in points):
            made[key] = plots.scatter(
                points, title=title, unit=unit, x_limit=view.bound(key), y_limit=view.bound("loss")
            )
    return made


def _point(row: Row, key: str) -> plots.Point | None:
    """Give a candidate's place, or the reference's at no loss; base is too far off to be drawn."""
    x, loss = row.cells[key].value, row.cells["loss"]
    if x is None or row.role == "base":
        return None
    if row.role == "reference":
        return plots.Point(row.name, "", x, 0.0, 0.0, 0.0)
    if loss.value is None:
        return None
    low, high = (loss.value if bound is None else bound for bound in (loss.low, loss.high))
    return plots.Point(row.name, row.verdict, x, loss.value, low, high)


def _distributions(view: View) -> dict[int, Markup]:
    limit = view.bound("itl_p95")
    verdicts = {row.name: row.verdict for row in view.candidates}
    return {
        n: plots.distributions([(c.name, verdicts.get(c.name, ""), c.waits) for c in cases], limit=limit)
        for n, cases in view.cases.items()
    }


def _hop_bars(view: View) -> list[Markup]:
    """Draw the ledger on the axis of its later hops: the first, an untrained base, would flatten the others."""
    if not view.hops:
        return []
    after = [hop.exact.value or 0.0 for hop in view.hops]
    ends = [_ends(hop) or (at, at) for hop, at in zip(view.hops, after, strict=True)]
    low, high = min(a for a, _ in ends[1:] or ends), max(b for _, b in ends)
    if after[0] > low - 3 * (high - low):
        low = min(low, after[0])
    margin = max(0.5, (high - low) * 0.08)
    axis = low - margin, min(100.0, high + margin)
    return [plots.hop_bar(hop.before, at, *axis, _ends(hop)) for hop, at in zip(view.hops, after, strict=True)]


def _ends(hop: Hop) -> tuple[float, float] | None:
    """Give the interval of a change as where the hop may have ended, percent."""
    if hop.before is None or hop.change.low is None or hop.change.high is None:
        return None
    return hop.before + hop.change.low, hop.before + hop.change.high
