"""Bits by sensitivity against the same bits everywhere: KL from 2.5 to 8 bits a weight, SmolLM2 off its grid.

    python benchmarks/allocation.py            # the whole curve
    python benchmarks/allocation.py --quick    # three budgets, fewer rows

Every model is a GPTQ checkpoint (groups of 64, asymmetric, weighted grid) of the same 16 x 512 calibration tokens, the
first half of Python's language reference. Layers are measured once, on other text of that half. KL to the float model,
nats a token over the whole vocabulary, is taken on the second half (in) and on the project's general questions and
answers (out). A uniform model of b bits is met by an allocation of its very bytes; other budgets are met by nobody, for
uniform bits have no size between. `kl_ratio_at_Nbit` is the allocation's KL over that of uniform N bits at the same
bytes on the text (in), `kl_ratio_out_at_Nbit` on the other.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from folded import folded
from gptq import GROUP_SIZE, PACKAGES, ROWS, SCORED_AT_ONCE, SETTINGS, TOKENS, make_rows

from edgetune.artifact import Artifact, Store, write_text
from edgetune.compress import quantize, sensitivity
from edgetune.compress.checkpoint import load_dequantized
from edgetune.compress.layerwise import load_model
from edgetune.compress.scheme import Scheme
from edgetune.data.calibration import CalibrationSet, make_apart
from edgetune.data.general import general_text
from edgetune.devices import compute_dtype
from edgetune.recipe import Gptq
from edgetune.recipe_export import Calibration
from edgetune.recipe_quantize import Allocate
from edgetune.runtime.machine import LoadMeter, describe
from edgetune.workload import token_ids

RESULT = Path(__file__).resolve().parent / "results" / "allocation.json"
BUDGETS = (2.5, 3, 3.5, 4, 4.5, 5, 6, 8)
CHOICES = (2, 3, 4, 8)
MET = (3, 4)  # uniform bits whose bytes an allocation meets: below and above there is nothing to trade
CALIBRATION = Calibration(n_samples=ROWS, n_tokens=TOKENS, general_share=1)
GRID: dict[str, Any] = {"group_size": GROUP_SIZE, "sym": False, **SETTINGS["ours"], "calibration": CALIBRATION}


def uniform_size(bits: int) -> float:
    """Give the bits a weight that uniform bits take, scales and zero points counted."""
    return Scheme(bits, GROUP_SIZE).bits_per_weight(GROUP_SIZE)


class Curve:
    """All models of one run, made once in the peers' cache, and what they lose."""

    def __init__(self, seed: int, quick: bool) -> None:
        from transformers import AutoTokenizer

        self.store, self.model = Store(peers.cache() / "store"), folded(seed)
        rows = make_rows(self.model.path)
        self.calibration = CalibrationSet(np.asarray(rows["calibration"], dtype=np.int64))
        self.rows = Calibration(n_samples=4 if quick else 16, n_tokens=128, general_share=1)
        tokenizer = AutoTokenizer.from_pretrained(self.model.path, local_files_only=True)
        text = token_ids(tokenizer, general_text(None, "calibrate"))
        self.apart = make_apart([], text, self.rows, taken=CALIBRATION, heldout=(), seed=seed)
        step = 4 if quick else 1
        self.texts = {name: torch.tensor(rows[name][::step]) for name in ("in", "out")}
        self.dtype = compute_dtype("cpu")
        self.float_model: Any = load_model(self.model).to(self.dtype)

    def sensitivity(self) -> Artifact:
        """Measure every group of layers at every number of bits."""
        config = self.allocated(8)
        made = sensitivity.planned_identity(config, self.model.identity, self.calibration.digest, self.apart.digest)
        return self.store.once(
            made,
            lambda out: sensitivity.run(
                config, self.model, out, measured=self.apart, calibration=self.calibration, progress=told
            ),
        )[0]

    def allocated(self, budget: float) -> Gptq:
        """Give the step of a budget."""
        return Gptq(**GRID, allocate=Allocate(budget=budget, choices=list(CHOICES), rows=self.rows))

    def made(self, config: Gptq, measured: Artifact | None = None) -> Artifact:
        """Quantize."""
        of = measured.identity if measured is not None else None
        identity = quantize.planned_identity(config, self.model.identity, self.calibration.digest, of)
        return self.store.once(
            identity,
            lambda out: quantize.run(config, self.model, out, calibration=self.calibration, sensitivity=measured),
        )[0]

    def losses(self, checkpoint: Artifact) -> dict[str, float]:
        """Give KL(float || checkpoint) a token on each text, over the whole vocabulary."""
        model: Any = load_dequantized(checkpoint.path, self.dtype)
        found = {}
        with torch.no_grad():
            for name, text in self.texts.items():
                total = 0.0
                for ids in text.split(SCORED_AT_ONCE):
                    for one in ids:
                        p, q = (m(one[None], use_cache=False).logits[0].float().log_softmax(-1) for m in
                                (self.float_model, model))  # fmt: skip
                        total += float((p.exp() * (p - q)).sum())
                found[name] = total / text.numel()
        return found


def told(done: int, total: int, what: str) -> None:
    """Say where a long measurement is."""
    print(f"measured {what} ({done} of {total})", flush=True)


def benchmark(seed: int, quick: bool, out: Path) -> None:
    """Quantize, score, and print the curve and its ratios."""
    began, meter, curve = time.monotonic(), LoadMeter(), Curve(seed, quick)
    measured = curve.sensitivity()
    lines: dict[str, dict[str, float]] = {}

    def add(name: str, checkpoint: Artifact) -> None:
        size = (checkpoint.manifest.scheme or {})["bits_per_weight"]
        lines[name] = {"bits_per_weight": size, **curve.losses(checkpoint)}
        print(f"{name:<16} {size:6.3f} bits  in {lines[name]['in']:.4f}  out {lines[name]['out']:.4f}", flush=True)

    for bits in MET if quick else CHOICES:
        add(f"uniform {bits}", curve.made(Gptq(**GRID, bits=bits)))
    for bits in MET:
        add(f"at uniform {bits}", curve.made(curve.allocated(uniform_size(bits)), measured))
    for budget in (5,) if quick else BUDGETS:
        add(f"budget {budget:g}", curve.made(curve.allocated(budget), measured))
    totals = {
        f"kl_ratio{other}_at_{bits}bit": lines[f"at uniform {bits}"][text] / lines[f"uniform {bits}"][text]
        for bits in MET
        for text, other in (("in", ""), ("out", "_out"))
    }
    load = meter.stop()
    found = {
        "benchmark": "allocation",
        "totals": totals,
        "settings": {"group_size": GROUP_SIZE, "seed": seed, "quick": quick, "choices": CHOICES,
                     "grid": SETTINGS["ours"],
                     "rows": {"measured": curve.apart.ids.shape, **{n: list(t.shape) for n, t in curve.texts.items()}}},
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe().model_dump(mode="json"),
        "load": load.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in (*PACKAGES, "scipy")},
        "models": lines,
        "sensitivity": sensitivity.read(measured),
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    if load.busy:
        print(f"the machine was busy: others used {load.others_during:.0%} of it")
    print(" ".join(f"{key}={value:.3f}" for key, value in totals.items()))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three budgets, fewer rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    benchmark(given.seed, given.quick, given.out)


if __name__ == "__main__":
    main()
