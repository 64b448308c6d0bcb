"""The verbs that measure without a recipe: `bench`, `score`, `bench-http` and `history`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgetune.cli import Threads, app
from edgetune.terminal import console, quiet

HistoryFile = Annotated[
    Path | None,
    typer.Option("--history", help="SQLite file of past runs; edgetune/history.sqlite in your data folder if absent"),
]


@app.command()
def bench(
    paths: Annotated[list[Path], typer.Argument(help=".gguf files; folders of artifacts, ONNX, GPTQ, Hugging Face")],
    prompt_tokens: Annotated[list[int] | None, typer.Option(help="prompt length, may be repeated; 32 and 256")] = None,
    new_tokens: Annotated[list[int] | None, typer.Option(help="tokens to generate, may be repeated; 64")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="measured generations of each case in each run")] = 5,
    warmup: Annotated[int, typer.Option(min=1, help="generations of each case before them that do not count")] = 2,
    runs: Annotated[int, typer.Option(min=1, help="do it all so often in fresh processes; 1 tells no noise")] = 2,
    threads: Threads = 2,
    case_timeout_s: Annotated[float, typer.Option(help="seconds after which an engine is given up")] = 300.0,
    engine: Annotated[list[str] | None, typer.Option(help="engine for what it can run; may be repeated")] = None,
    sweep_threads: Annotated[list[int] | None, typer.Option(help="also with so many threads; may be repeated")] = None,
    sweep_rows: Annotated[list[int] | None, typer.Option(help="also so many rows at once; may be repeated")] = None,
    probe: Annotated[
        list[str] | None, typer.Option(help="also cold_start, memory, energy, frequency, roofline; may be repeated")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="write the raw evidence here")] = None,
    history: HistoryFile = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="do not remember this run")] = False,
) -> None:
    """Time files side by side, each in its own runtime, without a recipe; print them ranked and remember them."""
    quiet()
    from edgetune import bench as benching
    from edgetune.errors import UsageError
    from edgetune.recipe import Bench, parse_as
    from edgetune.runtime.engine import ENGINES
    from edgetune.runtime.history import default_place

    unknown = [name for name in engine or () if name not in ENGINES]
    if unknown:
        raise UsageError(f"unknown engine {unknown[0]!r}; known: {', '.join(ENGINES)}")
    raw = {
        "prompt_tokens": prompt_tokens or [32, 256], "new_tokens": new_tokens or [64], "repeats": repeats,
        "warmup": warmup, "threads": threads, "case_timeout_s": case_timeout_s, "runs": runs,
        "sweep_threads": sweep_threads or None,
        "sweep_rows": sweep_rows or None, "probes": probe or None,
    }  # fmt: skip
    ok = benching.bench(
        paths, parse_as(Bench, raw, "bench"), console(), engines=engine or (), json=json,
        history=None if no_history else history or default_place(),
    )  # fmt: skip
    raise typer.Exit(0 if ok else 1)


@app.command()
def score(
    path: Annotated[Path, typer.Argument(help=".gguf file; folder of an artifact, ONNX, GPTQ, Hugging Face")],
    reference: Annotated[
        Path, typer.Option(help="reference pack of a run: runs/NAME/reference, or a copy of that folder")
    ],
    rows: Annotated[
        Path | None, typer.Option(help="the pack's rows, JSON lines of ids and start, where they do not lie beside it")
    ] = None,
    threads: Threads = 2,
    engine: Annotated[str | None, typer.Option(help="engine that runs it; the one that ships it if absent")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="seconds without a word that end it")] = 600.0,
    json: Annotated[Path | None, typer.Option(help="write the raw evidence here, for report --merge")] = None,
) -> None:
    """Score any file against a run's reference pack, in its own runtime, without the 16-bit model."""
    quiet()
    from edgetune import score as scoring

    scoring.score(path, reference, console(), rows=rows, engine=engine, threads=threads, timeout_s=timeout_s, json=json)


@app.command(name="bench-http")
def bench_http(
    url: Annotated[str, typer.Argument(help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1")],
    model: Annotated[str | None, typer.Option(help="one of its models; its only one if absent")] = None,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="clients at once, may be repeated; 1")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="requests a second, may be repeated")] = None,
    requests: Annotated[int, typer.Option(min=1, help="requests of each case")] = 20,
    artifact: Annotated[
        Path | None, typer.Option(help="the file or folder that it serves: prompts are cut from the ids of bench")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="with --artifact: tokens of each prompt")] = 256,
    prompt_words: Annotated[int, typer.Option(min=1, help="without --artifact: words of each prompt")] = 150,
    new_tokens: Annotated[int, typer.Option(min=2, help="tokens to ask for")] = 64,
    ttft_slo: Annotated[float | None, typer.Option(help="objective for the first token, ms")] = None,
    tpot_slo: Annotated[float | None, typer.Option(help="objective for the mean wait of further tokens, ms")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds without a word that end a request")] = 120.0,
    key_file: Annotated[Path | None, typer.Option(help="file that holds the server's key")] = None,
    json: Annotated[Path | None, typer.Option(help="write the raw evidence here")] = None,
    history: HistoryFile = None,
    no_history: Annotated[bool, typer.Option("--no-history", help="do not remember this run")] = False,
) -> None:
    """Time a server as its clients see it: TTFT, waits, tokens a second, and goodput under objectives."""
    quiet()
    from edgetune import bench_http as benching
    from edgetune.runtime.history import default_place
    from edgetune.runtime.serving import Endpoint

    key = key_file.read_text(encoding="utf-8").strip() if key_file is not None else None
    endpoint = Endpoint.find(url, model, timeout_s=timeout, key=key)
    ok = benching.bench_http(
        endpoint, console(), concurrency=concurrency or ([] if rate else [1]), rates=rate or [], n_requests=requests,
        prompt_words=prompt_words, n_tokens=new_tokens, artifact=artifact, prompt_tokens=prompt_tokens,
        ttft_slo=ttft_slo, tpot_slo=tpot_slo, json=json, history=None if no_history else history or default_place(),
    )  # fmt: skip
    raise typer.Exit(0 if ok else 1)


@app.command()
def history(
    artifact: Annotated[str, typer.Argument(help="beginning of an artifact's digest; all if absent")] = "",
    machine: Annotated[str, typer.Option(help="beginning of a machine's key; all if absent")] = "",
    add: Annotated[Path | None, typer.Option(help="first take in a run's folder, report.json or bench --json")] = None,
    history: HistoryFile = None,
) -> None:
    """Show how fast everything was on each machine over time, and which changes are beyond the noise."""
    from edgetune import past
    from edgetune.runtime.history import default_place

    past.history(history or default_place(), console(), artifact=artifact, machine=machine, add=add)
