"""The figures behind a ranking, for a terminal of 100 columns: percentiles with their intervals, and rates."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from rich.table import Table
from rich.text import Text

from edgetune.runtime import serving
from edgetune.runtime.evidence import CaseFigures, Failure, Latency, ServedCase
from edgetune.runtime.report.columns import interval_text, number
from edgetune.runtime.report.measures import PERCENTILES, case_figures
from edgetune.runtime.statistics import Interval

WITH_INTERVAL = (50, 95)
RATES = {"ttft": "prefill", "itl": "decode"}


def figures(results: Sequence[Latency | Failure]) -> list[CaseFigures]:
    """Compute the figures of every case that was timed, as the report does."""
    return [
        CaseFigures(
            subject=one.subject.name, prompt_tokens=case.prompt_tokens, new_tokens=case.new_tokens,
            figures={key: (f.value, f.low, f.high) for key, f in case_figures(case).items() if f.value is not None},
        )
        for one in results if isinstance(one, Latency) for case in one.cases
    ]  # fmt: skip


def details(results: Sequence[Latency | Failure], found: Sequence[CaseFigures]) -> Iterator[Table]:
    """Give a table for each that was timed: TTFT, ITL and TPOT of each case, prefill and decode tokens a second."""
    for one in (one for one in results if isinstance(one, Latency)):
        name = one.subject.name
        table = _table(f"{name}: load {one.load_ms:.0f} ms, first run {one.first_run_ms:.0f} ms", "prompt", "new")
        table.add_column("tokens/s", justify="right")
        for case in (case for case in found if case.subject == name):
            lengths = [str(case.prompt_tokens), str(case.new_tokens)]
            for figure in ("ttft", "itl", "tpot"):
                if f"{figure}_p50" not in case.figures:
                    continue
                cells = _percentiles(lambda q, f=figure, c=case: c.figures[f"{f}_p{q}"])  # type: ignore[misc]
                rate = case.figures.get(RATES.get(figure, ""))
                said = f"{rate[0]:.1f} {RATES[figure]}" if rate is not None else ""
                table.add_row(*lengths, figure.upper(), *cells, said)
                lengths = ["", ""]
        yield table


def served_detail(cases: Sequence[ServedCase]) -> Table:
    """Give the same of a server's cases, by the clients that asked at once or the requests a second."""
    table = _table("in detail", "clients")
    for case in cases:
        who = str(case.concurrency) if case.concurrency is not None else f"{case.rate:g}/s"
        good = [one for one in case.requests if one.error is None]
        for figure in ("ttft", "itl", "tpot"):
            if good and (figure == "ttft" or any(one.itl_ms for one in good)):
                cells = _percentiles(lambda q, f=figure, c=case: serving.figure(c, f"{f}_ms", q))  # type: ignore[misc]
                table.add_row(who, figure.upper(), *cells)
                who = ""
    return table


def _table(title: str, *heads: str) -> Table:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for head in (*heads, "ms"):
        table.add_column(head, justify="left" if head == "ms" else "right", no_wrap=True)
    for q in PERCENTILES:
        table.add_column(f"p{q} (95 %)" if q in WITH_INTERVAL else f"p{q}", justify="right", no_wrap=True)
    return table


def _percentiles(found: Callable[[int], Interval | tuple[float, float | None, float | None]]) -> Iterator[str]:
    for q in PERCENTILES:
        value, *ends = found(q)
        low, high = (None if end is None or math.isinf(end) else end for end in ends)
        interval = interval_text(low, high, _digits(value))
        said = number(value, _digits(value)) + (f" ({interval})" if interval and q in WITH_INTERVAL else "")
        yield said.replace(",", "")  # for want of columns


def _digits(value: float) -> int:
    return 2 if value < 10 else 1 if value < 1000 else 0
