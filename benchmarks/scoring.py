"""What does scoring cost beside the engine's own prefill of the same tokens? 500 rows of 100 tokens, interleaved.

    python benchmarks/scoring.py            # 500 rows of each set
    python benchmarks/scoring.py --quick    # 100 rows of each set

Ours is what a candidate's accuracy stage asks of its child: rows are read from their file, scored (exact match,
likelihood of the last 24 tokens, divergence from a reference pack) and written to a checkpoint; nothing is generated,
which would be decoding. Theirs is the prefill of the same rows by the bare library, with no scoring at all
(`bare_prefill.py`), in a process of its own with the same threads. Two sets: rows that share nothing, and rows whose
first 50 tokens are the same; both sides read those once. In each slice of 50 rows all sides run once, in an order that
is drawn anew. A ratio is the median over slices of ours / theirs within a slice.

llama.cpp's prefill computes logits of each row's last position only, scoring those of 24. Each slice is compared with
the reference pack of the first one: the work is the same, and the divergence means nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from harness import BASE, PACKAGES, SPIN, onnx_folder

from edgetune.artifact import write_text
from edgetune.data.general import general_text
from edgetune.found import find
from edgetune.runtime.accuracy import ScoredRow, workload_digest, write_rows
from edgetune.runtime.machine import LoadMeter, describe
from edgetune.runtime.reference import ReferencePack
from edgetune.runtime.worker import Job, Worker
from edgetune.sources import find as find_base

RESULT = Path(__file__).resolve().parent / "results" / "scoring.json"
N_TOKENS, N_TARGET, N_SHARED, SLICE = 100, 24, 50, 50
N_CTX = N_TOKENS + 1
TEXT_CHARACTERS = 250_000  # some 55,000 tokens
TIMEOUT_S = 600
ENGINES = {"llama": "llama.cpp", "onnx": "onnxruntime", "genai": "onnxruntime-genai"}
Took = dict[str, float]


@dataclass
class Pair:
    """An engine on both sides, and what each slice of a set took."""

    ours: Callable[[list[ScoredRow], Path, Path | None], Took]
    bare: Callable[[list[ScoredRow], int], Took]
    samples: dict[str, dict[str, list[Took]]] = field(default_factory=dict)  # set -> side -> slices

    def ratio(self, name: str, unit: str) -> float:
        """The median over slices of ours / bare."""
        sides = self.samples[name]
        return statistics.median(a[unit] / b[unit] for a, b in zip(sides["ours"], sides["bare"], strict=True))


def scored(worker: Worker, rows: list[ScoredRow], folder: Path, reference: Path | None) -> Took:
    """Score one slice in the child, as `accuracy.score` does, and give its time as the parent sees it."""
    process = psutil.Process(worker.pid)
    workload = workload_digest(rows)
    began, cpu = time.perf_counter(), sum(process.cpu_times()[:2])
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "text.jsonl", ())
    worker.call(
        "score", timeout_s=TIMEOUT_S, folder=str(folder), reference=str(reference) if reference else None,
        workload=workload, text_workload=workload_digest(()), stop_ids=[0], max_new_tokens=1, generate_rows=0,
        subject="0", build=reference is None,
    )  # fmt: skip
    return {"seconds": time.perf_counter() - began, "cpu_seconds": sum(process.cpu_times()[:2]) - cpu}


def bare(process: subprocess.Popen[str]) -> Callable[[list[ScoredRow], int], Took]:
    """Ask the peer for the prefill of one slice; it tells its own time."""

    def once(rows: list[ScoredRow], shared: int) -> Took:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"rows": [row.ids for row in rows], "shared": shared}) + "\n")
        process.stdin.flush()
        took: Took = json.loads(process.stdout.readline())
        return took

    return once


def make_rows(ids: Sequence[int], n_rows: int, n_shared: int) -> list[ScoredRow]:
    """Cut rows of N_TOKENS from a stream of ids, the first `n_shared` tokens of all the same."""
    n_own = N_TOKENS - n_shared
    stream = [ids[n % len(ids)] for n in range(n_shared, n_shared + n_rows * n_own)]
    own = [stream[at : at + n_own] for at in range(0, len(stream), n_own)]
    return [ScoredRow((*ids[:n_shared], *part), N_TOKENS - N_TARGET, "") for part in own]


def run_slice(
    pairs: dict[str, Pair], name: str, rows: list[ScoredRow], shared: int, packs: Path, rng: random.Random
) -> None:
    """Run every side of every engine once on one slice, in an order that is drawn."""
    order = [(pair, engine, side) for engine, pair in pairs.items() for side in ("ours", "bare")]
    for pair, engine, side in rng.sample(order, len(order)):
        if side == "bare":
            took = pair.bare(rows, shared)
        else:
            with tempfile.TemporaryDirectory() as folder:
                reference = packs / f"{engine}-{name}.npz"
                pack = ReferencePack.read(reference)
                replace(pack, workload=workload_digest(rows)).save(reference)
                took = pair.ours(rows, Path(folder), reference)
        pair.samples.setdefault(name, {"ours": [], "bare": []})[side].append(took)


def benchmark(file: Path, folder: Path, given: argparse.Namespace) -> None:
    """Run all slices of both sets and write each sample."""
    began = time.monotonic()
    n_rows = 2 * SLICE if given.quick else given.rows
    paths = {"llama": file, "onnx": folder, "genai": folder}
    kinds = {"llama": "gguf", "onnx": "onnx", "genai": "onnx"}
    sets = (("own", 0), ("shared", N_SHARED))
    meter = LoadMeter()
    with ExitStack() as stack:
        packs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pairs: dict[str, Pair] = {}
        jobs: dict[str, Job] = {}
        text = general_text(None, "measure")[:TEXT_CHARACTERS]
        ids: list[int] = []
        for engine in given.engine or list(ENGINES):
            path = paths[engine]
            job = find(path).job(kinds[engine], ENGINES[engine], n_threads=given.threads)
            worker = stack.enter_context(Worker(job))
            worker.load(n_ctx=N_CTX, timeout_s=TIMEOUT_S)
            command = [sys.executable, Path(__file__).with_name("bare_prefill.py"), engine, path, given.threads, N_CTX]
            peer = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.callback(peer.wait)
            stack.callback(peer.kill)
            pairs[engine], jobs[engine] = Pair(partial(scored, worker), bare(peer)), job
            ids = ids or worker.call("tokenize", timeout_s=TIMEOUT_S, text=text)["ids"]
            for name, shared in sets:  # warms up, and gives the packs
                rows = make_rows(ids, SLICE, shared)
                with tempfile.TemporaryDirectory() as out:
                    pairs[engine].ours(rows, Path(out), None)
                    (Path(out) / "chunk-00000.npz").rename(packs / f"{engine}-{name}.npz")
                pairs[engine].bare(rows, shared)
        rng = random.Random(given.seed)
        for name, shared in sets:
            rows = make_rows(ids, n_rows, shared)
            for at in range(0, n_rows, SLICE):
                run_slice(pairs, name, rows[at : at + SLICE], shared, packs, rng)
                print(f"{name}: {at + SLICE} of {n_rows} rows", file=sys.stderr, flush=True)
    totals: dict[str, float] = {}
    for engine, pair in pairs.items():
        totals[f"{engine}_ratio"] = pair.ratio("own", "seconds")
        totals[f"{engine}_shared_ratio"] = pair.ratio("shared", "seconds")
    found: dict[str, Any] = {
        "benchmark": "scoring",
        "totals": totals,
        "cpu_totals": {f"{e}_{n}": pair.ratio(n, "cpu_seconds") for e, pair in pairs.items() for n in pair.samples},
        "rows": n_rows,
        "tokens": N_TOKENS,
        "targets": N_TARGET,
        "shared_tokens": N_SHARED,
        "slice": SLICE,
        "seed": given.seed,
        "seconds": round(time.monotonic() - began, 1),
        "threads": given.threads,
        "artifacts": {engine: job.artifact_digest for engine, job in jobs.items()},
        "machine": describe().model_dump(mode="json"),
        "load": meter.stop().model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "samples": {engine: pair.samples for engine, pair in pairs.items()},
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(given.out, json.dumps(found, indent=1) + "\n")
    for engine, pair in pairs.items():
        for name, sides in pair.samples.items():
            shown = [sum(one["seconds"] for one in sides[side]) for side in ("ours", "bare")]
            print(
                f"{ENGINES[engine]:<18} {name:<7} scoring {shown[0]:7.1f} s, prefill {shown[1]:7.1f} s; "
                f"ratio {pair.ratio(name, 'seconds'):.3f}, of CPU time {pair.ratio(name, 'cpu_seconds'):.3f}"
            )
    print(" ".join(f"{key}={value:.4f}" for key, value in totals.items()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=500, help="a multiple of 50")
    parser.add_argument("--quick", action="store_true", help="100 rows")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="all three where absent")
    parser.add_argument("--gguf", type=Path, help="file to score; the base's own where absent")
    parser.add_argument("--onnx", type=Path, help="folder to score; the base in int4 where absent")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if given.rows % SLICE:
        parser.error(f"--rows {given.rows} is no multiple of {SLICE}")
    os.environ |= SPIN
    benchmark(given.gguf or find_base(BASE).path, given.onnx or onnx_folder(), given)


if __name__ == "__main__":
    main()
