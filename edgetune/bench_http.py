"""The verb `bench-http`: a server timed as its clients see it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from edgetune import __version__, found
from edgetune.artifact import write_text
from edgetune.bench import prompt_text
from edgetune.bench_detail import served_detail
from edgetune.progress import reporting
from edgetune.runtime import history as past
from edgetune.runtime import serving
from edgetune.runtime.evidence import Timings
from edgetune.runtime.machine import describe
from edgetune.runtime.serving import Endpoint
from edgetune.runtime.worker import Job, Worker

LOAD_TIMEOUT_S = 300.0
T = TypeVar("T")


def bench_http(
    endpoint: Endpoint,
    console: Console,
    *,
    concurrency: Sequence[int],
    rates: Sequence[float],
    n_requests: int,
    prompt_words: int,
    n_tokens: int,
    artifact: Path | None = None,
    prompt_tokens: int = 256,
    ttft_slo: float | None = None,
    tpot_slo: float | None = None,
    json: Path | None = None,
    history: Path | None = None,
) -> bool:
    """Time a server and print a row for each case; gives whether every request was answered.

    Prompts are consecutive parts of the text that `bench` cuts its own from. `artifact` is what the server serves:
    then they are parts of the same token ids, `prompt_tokens` long, and the evidence holds its digest.
    """
    n_prompts = (len(concurrency) + len(rates)) * n_requests + 1
    if artifact is not None:
        (job,) = found.jobs([artifact], [], n_threads=1)
        prompts = token_prompts(job, n_prompts, prompt_tokens)
        known: dict[str, object] = {"artifact_digest": job.artifact_digest, "prompt_tokens": prompt_tokens}
    else:
        words, known = prompt_text().split(), {}
        prompts = [" ".join(part) for part in _parts(words, n_prompts, prompt_words)]
    with reporting(console, "bench-http") as progress:
        served = serving.measure(
            endpoint, prompts, n_tokens=n_tokens, concurrency=concurrency, rates=rates, n_requests=n_requests,
            progress=lambda done, total: progress(done, total, "requests"),
        ).model_copy(update=known)  # fmt: skip
    time = datetime.now(UTC).isoformat(timespec="seconds")
    timings = Timings(edgetune=__version__, time=time, machine=describe(), results=[], served=[served])
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
            "/".join(f"{serving.figure(case, name, q).value:.1f}" for q in (50, 95)) if seen else "–"
            for name, seen in (("ttft_ms", True), ("itl_ms", serving.has_waits(case)))
        ]
        table.add_row(who, *waits, f"{serving.throughput(case):.1f}", good, str(len(failed)))
    console.print(table)
    console.print(served_detail(served.cases))
    errors = dict.fromkeys(one.error for case in served.cases for one in case.requests if one.error is not None)
    for error in errors:
        console.print(f"note: {error}", highlight=False, markup=False)
    if json is not None:
        write_text(json, timings.model_dump_json(indent=1) + "\n")
    if history is not None:
        past.record(history, timings)
    return not errors


def token_prompts(job: Job, n_prompts: int, n_tokens: int) -> list[str]:
    """Give the text of consecutive parts of the token ids that `bench` would time a job with; the first is its own."""
    with Worker(job) as worker:
        worker.load(n_ctx=1, timeout_s=LOAD_TIMEOUT_S)
        ids: list[int] = worker.call("tokenize", timeout_s=LOAD_TIMEOUT_S, text=prompt_text())["ids"]
        parts = list(_parts(ids, n_prompts, n_tokens))
        texts: list[str] = worker.call("detokenize", timeout_s=LOAD_TIMEOUT_S, rows=parts)["texts"]
    return texts


def _parts(items: Sequence[T], n: int, length: int) -> Iterator[list[T]]:
    """Cut parts of one length, one after the other, going round where the items are too few."""
    for place in range(0, n * length, length):
        yield [items[at % len(items)] for at in range(place, place + length)]
