"""Pictures as inline SVG. Colours are classes that page.css fills; every text passes through escaping.

A picture is drawn once for wide and once for narrow screens, so that its letters keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from edgetune.runtime.report.columns import number

Floats = NDArray[np.float64]
WIDE, NARROW = 900, 340
MARKS = {"ship": "circle", "inconclusive": "triangle", "do not ship": "square", "": "diamond"}


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """Write one element. Attribute names lose a trailing underscore and turn inner ones into hyphens."""
    given = {k.rstrip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    given = {"viewBox" if k == "viewbox" else k: f"{v:.2f}" if isinstance(v, float) else v for k, v in given.items()}
    head = Markup("").join(Markup(' {}="{}"').format(k, v) for k, v in given.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), head, Markup("").join(escape(c) for c in children))


def picture(drawn: dict[str, Markup]) -> Markup:
    """Join a wide and a narrow drawing; the style sheet shows one."""
    return Markup("").join(tag("div", svg, class_=f"plot {size}") for size, svg in drawn.items())


def ticks(low: float, high: float, n: int) -> list[float]:
    """Give round numbers from low to high, about n of them."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, n)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _digits(marks: Sequence[float]) -> int:
    gap = min((b - a for a, b in pairwise(marks)), default=1)
    return max(0, -math.floor(math.log10(gap) + 1e-9))


@dataclass(frozen=True)
class Scale:
    """A linear map from data to drawing units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / ((self.high - self.low) or 1) * (self.end - self.start)


@dataclass(frozen=True)
class Point:
    """A candidate in the picture of cost against loss. `verdict` is empty for the reference."""

    name: str
    verdict: str
    x: float
    y: float
    low: float
    high: float


def front(points: Sequence[Point]) -> list[Point]:
    """Give the Pareto front: the points that no other one beats in both x and y, by rising x."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, p.y)):
        if not kept or point.y < kept[-1].y:
            kept.append(point)
    return kept


def scatter(points: Sequence[Point], *, title: str, unit: str, x_limit: float | None, y_limit: float | None) -> Markup:
    """Draw loss (points of the score, up is worse) against a cost; budgets are dashed, the front is a line."""
    label = f"Loss against {title}, {unit}: each candidate and the reference"
    return picture({s: _scatter(points, w, title, unit, x_limit, y_limit, label) for s, w in
                    (("wide", WIDE), ("narrow", NARROW))})  # fmt: skip


def _said(p: Point, title: str, unit: str) -> str:
    loss = f"loss {number(p.y, 2, signed=True)} points"
    interval = f", interval {number(p.low, 2)} to {number(p.high, 2)}" if p.high > p.low else ""
    verdict = f", {p.verdict}" if p.verdict else ""
    return f"{p.name}{verdict}: {title} {number(p.x, 1)} {unit}, {loss}{interval}."


def _scatter(
    points: Sequence[Point], width: int, title: str, unit: str, x_limit: float | None, y_limit: float | None, label: str
) -> Markup:
    height = 380 if width == WIDE else 340
    xs = [p.x for p in points] + ([x_limit] if x_limit else [])
    ys = [0.0, *(p.low for p in points), *(p.high for p in points), *([y_limit] if y_limit else [])]
    pad = (max(ys) - min(ys)) * 0.08 or 1
    x = Scale(0, max(xs) * 1.12, 46, width - 14)
    y = Scale(min(ys) - pad, max(ys) + pad, height - 46, 16)
    parts = [*_axes(x, y, height, 4 if width == NARROW else 8)]
    parts.append(tag("text", f"{title}, {unit}", x=x.end, y=height - 8, class_="axis end"))
    parts.append(tag("text", "loss, points", x=8, y=12, class_="axis"))
    if y_limit is not None:
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y(y_limit), y2=y(y_limit), class_="limit"))
        parts.append(tag("text", "loss budget", x=x.end, y=y(y_limit) - 5, class_="limit-text end"))
    if x_limit is not None:
        parts.append(tag("line", x1=x(x_limit), x2=x(x_limit), y1=y.start, y2=y.end, class_="limit"))
        parts.append(tag("text", f"{title} budget", x=x(x_limit) + 5, y=y.end + 8, class_="limit-text"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y(0), y2=y(0), class_="zero"))
    best = front([p for p in points if p.verdict])
    if len(best) > 1:
        path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in best)
        parts.append(tag("polyline", points=path, class_="front"))
    marks = [_mark(p, x(p.x), y, _said(p, title, unit)) for p in points]
    return tag("svg", _unread(parts), *marks, _unread(_labels(points, x, y, y_limit)), viewbox=f"0 0 {width} {height}",
               role="group", aria_label=label)  # fmt: skip


def _unread(parts: Sequence[Markup]) -> Markup:
    """Keep axes and labels from a screen reader, which reads the marks of a group one by one."""
    return tag("g", *parts, aria_hidden="true")


def _mark(p: Point, cx: float, y: Scale, said: str) -> Markup:
    whisker = tag("line", x1=cx, x2=cx, y1=y(p.low), y2=y(p.high), class_="whisker") if p.high > p.low else Markup("")
    cy = y(p.y)
    shapes = {
        "circle": tag("circle", cx=cx, cy=cy, r=6),
        "triangle": tag("path", d=f"M{cx:.1f} {cy - 7.5:.1f}l7.2 13h-14.4z"),
        "square": tag("rect", x=cx - 5.5, y=cy - 5.5, width=11, height=11),
        "diamond": tag("path", d=f"M{cx:.1f} {cy - 7:.1f}l7 7l-7 7l-7 -7z"),
    }
    shape = shapes[MARKS.get(p.verdict, "square")]
    near = tag("circle", cx=cx, cy=cy, r=16, class_="near")
    return tag("g", whisker, shape, near, class_=f"mark {slug(p.verdict)}", tabindex="0", data_tip=said, role="img",
               aria_label=said)  # fmt: skip


def _labels(points: Sequence[Point], x: Scale, y: Scale, y_limit: float | None) -> list[Markup]:
    """Name the points; a label that would run out of the picture or over another one or the budget's moves."""
    taken = [(x(p.x) - 8, x(p.x) + 8, y(p.y)) for p in points]
    if y_limit is not None:
        taken.append((x.end - 72, x.end, y(y_limit) - 9))
    for p in points:  # whiskers
        taken += [(x(p.x) - 3, x(p.x) + 3, float(at)) for at in np.arange(y(p.high), y(p.low), 8)]
    made = []
    for p in sorted(points, key=lambda p: -p.x):
        wide = 8.4 * len(p.name)
        right = x(p.x) + 12
        options = [(right, "start", dy) for dy in (4, -10, 18)] + [(x(p.x) - 12, "end", dy) for dy in (4, -10, 18)]
        options += [(x(p.x), "middle", dy) for dy in (-14, 24)]
        fits = []
        for left, anchor, dy in options:
            a = left - wide * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
            b = a + wide
            crowd = sum(not (b < t[0] or a > t[1]) and abs(y(p.y) + dy - 4 - t[2]) < 13 for t in taken)
            fits.append((crowd + 10 * (a < x.start or b > x.end + 8), a, b, left, anchor, dy))
        _, a, b, left, anchor, dy = min(fits, key=lambda f: f[0])
        taken.append((a, b, y(p.y) + dy - 4))
        made.append(tag("text", p.name, x=left, y=y(p.y) + dy, text_anchor=anchor, class_="name"))
    return made


def _axes(x: Scale, y: Scale, height: float, n: int) -> list[Markup]:
    up, along = ticks(y.low, y.high, 6), ticks(x.low, x.high, n)
    grid = [tag("line", x1=x.start, x2=x.end, y1=y(v), y2=y(v), class_="grid") for v in up]
    left = [tag("text", number(v, _digits(up)), x=x.start - 8, y=y(v) + 4, class_="tick end") for v in up]
    below = [tag("text", number(v, _digits(along)), x=x(v), y=height - 28, class_="tick middle") for v in along]
    return [*grid, *left, *below]


def distributions(rows: Sequence[tuple[str, str, Sequence[float]]], *, limit: float | None) -> Markup:
    """Draw one histogram for each (name, verdict, milliseconds) on a common axis, p50 and p95 marked."""
    rows = [row for row in rows if row[2]]
    if not rows:
        return Markup("")
    label = "Inter-token latency, milliseconds: the distribution of each subject"
    return picture({s: _distributions(rows, w, limit, label) for s, w in (("wide", WIDE), ("narrow", NARROW))})


def _distributions(
    rows: Sequence[tuple[str, str, Sequence[float]]], width: int, limit: float | None, label: str
) -> Markup:
    wide = width == WIDE
    left, step, bar = (140, 54, 40) if wide else (10, 66, 36)
    height = step * len(rows) + 46
    top = max(float(np.quantile(s, 0.99)) for _, _, s in rows) * 1.06
    x = Scale(0, max(top, (limit or 0) * 1.08), left, width - 14)
    marks = ticks(0, x.high, 10 if wide else 5)
    floor = height - 40
    parts = [tag("line", x1=x(v), x2=x(v), y1=8, y2=floor, class_="grid") for v in marks]
    parts += [tag("text", number(v, _digits(marks)), x=x(v), y=floor + 16, class_="tick middle") for v in marks]
    parts.append(tag("text", "milliseconds for each further token", x=x.end, y=height - 6, class_="axis end"))
    if limit is not None:
        parts.append(tag("line", x1=x(limit), x2=x(limit), y1=0, y2=floor, class_="limit"))
        parts.append(tag("text", "p95 budget", x=x(limit) - 5, y=10, class_="limit-text end"))
    hills = []
    for i, (name, verdict, samples) in enumerate(rows):
        base = step * (i + 1) + 2
        at = {"x": left - 12, "y": base - 14} if wide else {"x": x.end, "y": base - bar - 3}
        label_of = tag("text", name, **at, class_="name end")
        hills.append(_hill(name, verdict, np.asarray(samples), x, base, bar, label_of))
    return tag("svg", _unread(parts), *hills, viewbox=f"0 0 {width} {height}", role="group", aria_label=label)


def _hill(name: str, verdict: str, samples: Floats, x: Scale, base: float, tall: float, label: Markup) -> Markup:
    """Draw one histogram of height `tall` that stands on `base`."""
    edges = np.linspace(0, x.high, 141)
    counts = np.histogram(np.clip(samples, 0, x.high), edges)[0]
    filled = np.flatnonzero(counts)
    span = slice(int(filled[0]), int(filled[-1]) + 1)
    outline = "".join(
        f"L{x(a):.1f} {base - h:.1f}L{x(b):.1f} {base - h:.1f}"
        for a, b, h in zip(edges[:-1][span], edges[1:][span], (counts / counts.max() * tall)[span], strict=True)
    )
    middle, p95 = float(np.median(samples)), float(np.quantile(samples, 0.95))
    beyond = int((samples > x.high).sum())
    said = f"{name}: p50 {number(middle, 2)} ms, p95 {number(p95, 2)} ms, {len(samples):,} tokens"
    said += f", {beyond} beyond the picture" if beyond else ""
    first, last = x(float(edges[span.start])), x(float(edges[span.stop]))
    return tag(
        "g",
        tag("line", x1=x.start, x2=x.end, y1=base, y2=base, class_="zero"),
        tag("path", d=f"M{first:.1f} {base}{outline}L{last:.1f} {base}Z", class_="bars"),
        tag("line", x1=x(middle), x2=x(middle), y1=base - tall, y2=base + 5, class_="median"),
        tag("line", x1=x(p95), x2=x(p95), y1=base - tall, y2=base + 5, class_="p95"),
        tag("rect", x=x.start, y=base - tall, width=x.end - x.start, height=tall, class_="near"),
        label,
        class_=f"mark {slug(verdict)}", tabindex="0", data_tip=said, role="img", aria_label=said,
    )  # fmt: skip


def curve(train: Sequence[tuple[float, float]], heldout: Sequence[tuple[float, float]], what: str = "Loss") -> Markup:
    """Draw a figure over optimizer steps: a line of training's, and dots of the rows set aside."""
    if len(train) + len(heldout) < 2:
        return Markup("")
    label = f"{what} over optimizer steps."
    for where, points in (("In training", train), ("On rows set aside", heldout)):
        if points:
            label += f" {where} it goes from {points[0][1]:.3g} to {points[-1][1]:.3g}."
    return picture({s: _curve(train, heldout, w, label) for s, w in (("wide", WIDE), ("narrow", NARROW))})


def _curve(
    train: Sequence[tuple[float, float]], heldout: Sequence[tuple[float, float]], width: int, label: str
) -> Markup:
    height = 260
    points = [*train, *heldout]
    x = Scale(0, max(p[0] for p in points), 46, width - 14)
    low, high = min(0.0, *(p[1] for p in points)), max(p[1] for p in points)
    y = Scale(low * 1.05, max(high, 0.0) * 1.05, height - 46, 14)
    parts = [*_axes(x, y, height, 6), tag("text", "optimizer steps", x=x.end, y=height - 8, class_="axis end")]
    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in train)
    parts.append(tag("polyline", points=line, class_="train"))
    parts.append(tag("polyline", points=" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in heldout), class_="heldout"))
    for step, loss in heldout:
        said = f"step {step:,.0f}: held-out loss {number(loss, 4)}"
        parts.append(tag("circle", cx=x(step), cy=y(loss), r=4.5, class_="dot", data_tip=said))
    return tag("svg", *parts, viewbox=f"0 0 {width} {height}", role="img", aria_label=label)


def hop_bar(
    before: float | None, after: float, low: float, high: float, interval: tuple[float, float] | None = None
) -> Markup:
    """Draw one step of the ledger: a bar from the hop before to this one on a common axis, percent.

    The thin line is where the hop may have ended by the interval of its change.
    """
    x = Scale(low, high, 4, 156)
    start = after if before is None else before
    a, b = sorted((max(low, start), max(low, after)))
    way = "flat" if abs(after - start) < 1e-9 else "gain" if after > start else "fall"
    parts = [tag("line", x1=4, x2=156, y1=11, y2=11, class_="zero")]
    parts.append(tag("rect", x=x(a), y=5, width=max(0.0, x(b) - x(a)), height=12, class_=f"step {way}"))
    if after < low:
        parts.append(tag("path", d="M10 5l-6 6l6 6z", class_="cut"))
    else:
        parts.append(tag("line", x1=x(after), x2=x(after), y1=1, y2=21, class_="at"))
    if interval is not None:
        inside = [x(min(high, max(low, end))) for end in interval]
        parts.append(tag("line", x1=inside[0], x2=inside[1], y1=11, y2=11, class_="whisker"))
    return tag("svg", *parts, viewbox="0 0 160 22", width=160, height=22, aria_hidden="true", class_="hop")


def gauge(value: float | None, low: float | None, high: float | None, limit: float, verdict: str) -> Markup:
    """Draw a value against its limit: a bar from zero, its interval as a thin line, the limit as an upright one."""
    if value is None or limit <= 0:
        return Markup("")
    below = min(value, low if low is not None else value) < 0
    x = Scale(-limit * 0.75 if below else 0.0, limit * 1.5, 1, 119)

    def at(figure: float) -> float:
        return x(min(x.high, max(x.low, figure)))

    a, b = sorted((at(0), at(value)))
    parts = [tag("rect", x=1, y=4, width=118, height=6, rx=3, class_="track")]
    parts.append(tag("rect", x=a, y=4, width=max(2.0, b - a), height=6, class_="fill"))
    if below:
        parts.append(tag("line", x1=x(0), x2=x(0), y1=3, y2=11, class_="zero"))
    if low is not None and high is not None:
        parts.append(tag("line", x1=at(low), x2=at(high), y1=7, y2=7, class_="whisker"))
    parts.append(tag("line", x1=x(limit), x2=x(limit), y1=0, y2=14, class_="limit-mark"))
    return tag("svg", *parts, viewbox="0 0 120 14", width=120, height=14, aria_hidden="true",
               class_=f"gauge {slug(verdict)}")  # fmt: skip


def slug(verdict: str) -> str:
    """Give the class name of a verdict."""
    return "v-" + (verdict.replace(",", "").replace(" ", "-") or "none")
