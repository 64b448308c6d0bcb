"""The verb `bench-http`: a server timed as its clients see it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgetune import __version__
from edgetune.artifact import write_text
from edgetune.bench_detail import served_detail
from edgetune.data.general import general_text
from edgetune.progress import reporting
from edgetune.runtime import serving
from edgetune.runtime.evidence import Timings
from edgetune.runtime.machine import describe
from edgetune.runtime.serving import Endpoint


def bench_http(
    endpoint: Endpoint,
    console: Console,
    *,
    concurrency: Sequence[int],
    rates: Sequence[float],
    n_requests: int,
    prompt_words: int,
    n_tokens: int,
    ttft_slo: float | None = None,
    tpot_slo: float | None = None,
    json: Path | None = None,
) -> bool:
    """Time a server and print a row for each case; gives whether every request was answered."""
    words = general_text(None, "measure").split()
    n_prompts = (len(concurrency) + len(rates)) * n_requests + 1
    places = [n * prompt_words % (len(words) - prompt_words) for n in range(n_prompts)]
    prompts = [" ".join(words[place : place + prompt_words]) for place in places]
    with reporting(console, "bench-http") as progress:
        served = serving.measure(
            endpoint, prompts, n_tokens=n_tokens, concurrency=concurrency, rates=rates, n_requests=n_requests,
            progress=lambda done, total: progress(done, total, "requests"),
        )  # fmt: skip
    if json is not None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        timings = Timings(edgetune=__version__, time=time, machine=describe(), results=[], served=[served])
        write_text(json, timings.model_dump_json(indent=1) + "\n")
    table = Table(title=f"{endpoint.model}, ms: p50 / p95", title_justify="left", box=None, pad_edge=False)
    for head in ("clients", "TTFT", "ITL", "tokens/s", "goodput/s", "failed"):
        table.add_column(head, justify="right")
    for case in served.cases:
        failed = [one.error for one in case.requests if one.error is not None]
        who = str(case.concurrency) if case.concurrency is not None else f"{case.rate:g}/s"
        good = f"{serving.goodput(case, ttft_ms=ttft_slo, tpot_ms=tpot_slo):.2f}"
        if len(failed) == len(case.requests):
            table.add_row(who, "failed", "", "", good, str(len(failed)))
            continue
        waits = [
            "/".join(f"{serving.figure(case, name, q).value:.1f}" for q in (50, 95)) for name in ("ttft_ms", "itl_ms")
        ]
        table.add_row(who, *waits, f"{serving.throughput(case):.1f}", good, str(len(failed)))
    console.print(table)
    console.print(served_detail(served.cases))
    errors = dict.fromkeys(one.error for case in served.cases for one in case.requests if one.error is not None)
    for error in errors:
        console.print(f"note: {error}", highlight=False, markup=False)
    return not errors
