"""What zeros cost: magnitude, Wanda and SparseGPT at half of the weights, anywhere and 2:4, SmolLM2 off its grid.

    python benchmarks/masks.py
    python benchmarks/masks.py --quick    # half of the measured rows

Rows are those of `gptq.py`: 16 rows of 512 tokens calibrate; others measure inside their domain and outside of it.
Quality only: no runtime of the project is faster for zeros, so none is timed. Nothing is trained afterwards. `*_in` and
`*_out` are perplexities over those of the dense model.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from gptq import PACKAGES, ROOT, TOKENS, make_rows

from edgetune.artifact import Artifact, write_text
from edgetune.recipe_sparsify import Sparsify
from edgetune.runtime.machine import LoadMeter, describe

RESULT = ROOT / "benchmarks" / "results" / "masks.json"
CASES = [(method, pattern) for method in ("sparsegpt", "wanda", "magnitude") for pattern in ("unstructured", "2:4")]


def perplexities(folder: Path, texts: dict[str, list[list[int]]]) -> dict[str, float]:
    """Give a model's perplexity on each text."""
    import torch

    from edgetune.compress.layerwise import load_model
    from edgetune.devices import compute_dtype

    model: Any = load_model(Artifact.open(folder)).to(compute_dtype("cpu"))
    found = {}
    with torch.no_grad():
        for name, text in texts.items():
            losses = []
            for ids in torch.tensor(text):
                logits = model(ids[None], use_cache=False).logits[0, :-1].float()
                losses.append(float(torch.nn.functional.cross_entropy(logits, ids[1:])))
            found[name] = math.exp(sum(losses) / len(losses))  # rows are equally long
    return found


def benchmark(quick: bool, seed: int, out: Path) -> None:
    """Make each sparse model, measure it, and print its perplexities over the dense model's."""
    import numpy as np
    from folded import folded

    from edgetune.compress.sparsify import run
    from edgetune.data.calibration import CalibrationSet

    began, meter, source = time.monotonic(), LoadMeter(), folded(seed)
    rows = make_rows(source.path)
    texts = {name: text[::2] if quick else text for name, text in rows.items() if name != "calibration"}
    calibration = CalibrationSet(np.asarray(rows["calibration"], dtype=np.int64))
    made: dict[str, dict[str, float]] = {}
    perplexity = {"dense": perplexities(source.path, texts)}
    with tempfile.TemporaryDirectory() as scratch:
        for method, pattern in CASES:
            case, started = f"{method} {pattern}", time.process_time()
            config = Sparsify.model_validate({"method": method, "pattern": pattern})
            sparse = run(config, source, Path(scratch) / case, calibration=calibration)
            made[case] = {key: sparse.manifest.notes[key] for key in ("mean_sparsity", "mean_relative_error")}
            made[case]["cpu_s"] = time.process_time() - started
            perplexity[case] = perplexities(sparse.path, texts)
            shutil.rmtree(sparse.path)
            print(f"{case:<24} in {perplexity[case]['in']:9.3f}  out {perplexity[case]['out']:9.3f}", flush=True)
    load, dense = meter.stop(), perplexity["dense"]
    totals = {
        f"{case.replace(' ', '_').replace(':', 'of')}_{text}": perplexity[case][text] / dense[text]
        for case in made
        for text in dense
    }
    found: dict[str, Any] = {
        "benchmark": "masks",
        "totals": totals,
        "settings": {"sparsity": 0.5, "seed": seed,
                     "rows": {name: [len(text), TOKENS] for name, text in (rows | texts).items()}},
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe().model_dump(mode="json"),
        "load": load.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "perplexity": perplexity,
        "made": made,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    print(f"dense in {dense['in']:.3f} out {dense['out']:.3f}")
    print(" ".join(f"{key}={value:.3f}" for key, value in totals.items()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half of the measured rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    benchmark(given.quick, given.seed, given.out)


if __name__ == "__main__":
    main()
