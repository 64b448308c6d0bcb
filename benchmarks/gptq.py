"""Our GPTQ, round to nearest, and gptqmodel: int4, groups of 64, the same calibration rows, SmolLM2 off its grid.

    python benchmarks/gptq.py            # 3 rounds
    python benchmarks/gptq.py --quick    # 1 round, symmetric only, half of the measured rows
    python benchmarks/gptq.py --sides ours damped zeros    # of our settings these alone

Rows of 512 tokens: 16 of the first half of Python's language reference calibrate; 16 of its second half measure inside
the domain, and the project's general questions and answers outside of it. Each quantization is a process of its own, in
an order that is drawn anew in each round; its CPU-seconds, imports included, and its peak memory are the kernel's.
Perplexities are torch's, of the dequantized checkpoints, in one process. gptqmodel runs with its own defaults in the
environment that `peers.py` makes, on the same torch. `ours` is what `SETTINGS` says; `corrected` adds GPTAQ; `awq`
scales the model first, in the same process; `damped` chooses each layer's damping by rows held out; `tuned` learns the
scales of each block, and `zeros`, asymmetric alone, its zero points as well. Four sides, run once, leave out one part
of `ours`: the order of columns, the weighted grid, five percent of damping (one instead), products in bfloat16. Ratios
are ours over gptqmodel's, the worse of the symmetric and the asymmetric case; `*_to_rtn` over round to nearest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import peers

from edgetune.artifact import Artifact, write_text
from edgetune.recipe import Awq, Gptq, Rtn
from edgetune.runtime.machine import LoadMeter, describe

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gptq.json"
BITS, GROUP_SIZE = 4, 64
ROWS, TOKENS, SCORED_AT_ONCE = 16, 512, 4
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {"grid": "weighted", "damp_percent": 0.05, "hessian": "bfloat16"},
    "corrected": {"grid": "weighted", "damp_percent": 0.05, "hessian": "bfloat16", "correction": 0.5},
    "awq": {"grid": "weighted", "damp_percent": 0.05, "hessian": "bfloat16"},
    "damped": {"grid": "weighted", "damping": "held-out", "hessian": "bfloat16"},
    "tuned": {"grid": "weighted", "damp_percent": 0.05, "hessian": "bfloat16", "tune": {}},
    "zeros": {"grid": "weighted", "damp_percent": 0.05, "hessian": "bfloat16", "tune": {"zeros": True}},
}
SETTINGS |= {  # `ours` without one of its parts
    "unordered": SETTINGS["ours"] | {"desc_act": False},
    "plain": SETTINGS["ours"] | {"grid": "plain"},
    "undamped": SETTINGS["ours"] | {"damp_percent": 0.01},
    "float": SETTINGS["ours"] | {"hessian": "float32"},
}
ONCE = ("unordered", "plain", "undamped", "float")  # run in the first round alone: their quality is what they tell
ASYMMETRIC = ("zeros",)  # sides that have no symmetric case
PEER = {"GPTQMODEL_CPU_WORKERS": "2", "GPTQMODEL_DISABLE_PACK_EXT": "1"}  # its advice for two cores; no long compile
SPIN = {"GOMP_SPINCOUNT": "20000"}  # as the command line sets it
PACKAGES = ("edgetune", "torch", "transformers")


def make_rows(model: Path) -> dict[str, list[list[int]]]:
    """Give the token rows that calibrate and that measure."""
    import numpy as np
    from transformers import AutoTokenizer

    from edgetune.data.general import general_text

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def spaced(text: str) -> list[list[int]]:
        ids = tokenizer(text)["input_ids"]
        starts = np.linspace(0, len(ids) - TOKENS, min(ROWS, len(ids) // TOKENS)).astype(int)
        return [ids[start : start + TOKENS] for start in starts]

    outside = ROOT / "calib_data" / "general" / "general.jsonl"
    whole = "\n\n".join(
        "\n".join(message["content"] for message in json.loads(line)["messages"])
        for line in outside.read_text(encoding="utf-8").splitlines()
    )
    return {
        "calibration": spaced(general_text(None, "calibrate")),
        "in": spaced(general_text(None, "measure")),
        "out": spaced(whole),
    }


def quantize(side: str, model: Path, rows: Path, out: Path, sym: bool) -> None:
    """Be one of our sides: quantize a model as its stage does."""
    import numpy as np

    from edgetune.compress import scale
    from edgetune.compress.quantize import run
    from edgetune.data.calibration import CalibrationSet

    base = {"bits": BITS, "group_size": GROUP_SIZE, "sym": sym}
    config = Rtn(**base) if side == "rtn" else Gptq(**base, **SETTINGS[side])
    ids = np.asarray(json.loads(rows.read_text(encoding="utf-8")), dtype=np.int64)
    source, calibration = Artifact.open(model), CalibrationSet(ids)
    if side == "awq":
        source = scale.run(Awq(**base), source, out.with_name(f"{out.name} scaled"), calibration=calibration)
    run(config, source, out, calibration=calibration)


def score(folder: Path, rows: Path) -> None:
    """Print the perplexity of a model or checkpoint on each of the texts."""
    import torch

    from edgetune.compress.checkpoint import load_dequantized, read_config
    from edgetune.compress.layerwise import load_model
    from edgetune.devices import compute_dtype

    dtype = compute_dtype("cpu")
    quantized = "quantization_config" in read_config(folder)
    model: Any = load_dequantized(folder, dtype) if quantized else load_model(Artifact.open(folder)).to(dtype)
    found = {}
    with torch.no_grad():
        for name, text in json.loads(rows.read_text(encoding="utf-8")).items():
            loss, n = 0.0, 0
            for ids in torch.tensor(text).split(SCORED_AT_ONCE):
                logits = model(ids, use_cache=False).logits
                for one, row in zip(logits, ids, strict=True):
                    loss += float(torch.nn.functional.cross_entropy(one[:-1].float(), row[1:], reduction="sum"))
                    n += len(row) - 1
            found[name] = math.exp(loss / n)
    print(json.dumps(found))


def measured(command: list[Any], log: Path, environment: dict[str, str]) -> dict[str, float]:
    """Run a process to its end; give its CPU-seconds and peak memory."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream, env=environment, cwd=log.parent
        )  # gptqmodel writes its own logs where it runs
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed: {log.read_text(errors='replace').strip().splitlines()[-1:]}")
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_mib": usage.ru_maxrss / 1024}


def benchmark(rounds: int, quick: bool, sides: list[str], seed: int, out: Path) -> None:
    """Run all sides in every round, measure what they made, and print the ratios."""
    from folded import folded

    began, python = time.monotonic(), peers.gptqmodel()
    model = folded(seed).path
    rows = make_rows(model)
    texts = {name: text[::2] if quick else text for name, text in rows.items() if name != "calibration"}
    cases = [
        f"{side} {grid}"
        for grid in (("sym",) if quick else ("sym", "asym"))
        for side in ("rtn", *sides, "gptqmodel")
        if not (side in ASYMMETRIC and grid == "sym")
    ]
    samples: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    rng, meter = random.Random(seed), LoadMeter()
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_text(work / "rows.json", json.dumps(rows["calibration"]))
        write_text(work / "texts.json", json.dumps(texts))
        for number in range(rounds):
            for case in rng.sample(cases, len(cases)):
                side, grid = case.split()
                if number and side in ONCE:
                    continue
                place, sym = work / f"{number} {case}", grid == "sym"
                if side == "gptqmodel":
                    script = Path(__file__).resolve().with_name("gptqmodel_peer.py")
                    command = [python, script, model, work / "rows.json", place, BITS, GROUP_SIZE, sym]
                    found = measured(command, work / "log", bare | PEER)
                else:
                    script = Path(__file__).resolve()
                    command = [sys.executable, script, "--child", side, model, work / "rows.json", place, sym]
                    found = measured(command, work / "log", SPIN | os.environ)
                samples[case].append(found)
                print(f"round {number + 1} {case}: {found['cpu_s']:.1f} CPU-s, {found['peak_mib']:.0f} MiB", flush=True)
        load = meter.stop()
        perplexity = {case: scored(work / f"0 {case}", work / "texts.json") for case in cases}
        perplexity["unquantized"] = scored(model, work / "texts.json")
    found = {
        "benchmark": "gptq",
        "totals": totals(samples, perplexity),
        "settings": {"bits": BITS, "group_size": GROUP_SIZE, "rounds": rounds, "seed": seed, "sides": SETTINGS,
                     "rows": {name: [len(text), TOKENS] for name, text in (rows | texts).items()}},
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe().model_dump(mode="json"),
        "load": load.model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in PACKAGES} | {"peer": peers.GPTQMODEL[0]},
        "perplexity": perplexity,
        "samples": samples,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    for case, value in perplexity.items():
        print(f"{case:<16} in {value['in']:7.3f}  out {value['out']:7.3f}")
    if load.busy:
        print(f"the machine was busy: others used {load.others_during:.0%} of it")
    print(" ".join(f"{key}={value:.3f}" for key, value in found["totals"].items()))


def scored(folder: Path, texts: Path) -> dict[str, float]:
    """Give the perplexities of a folder, measured in a process of their own."""
    command = [sys.executable, __file__, "--child", "score", str(folder), str(texts)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        sys.exit(f"scoring {folder.name} failed: {ended.stderr.strip().splitlines()[-1:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def totals(samples: dict[str, list[dict[str, float]]], perplexity: dict[str, dict[str, float]]) -> dict[str, float]:
    """Give the ratios of each of our sides, the worst over the grids."""

    def median(case: str, key: str) -> float:
        return statistics.median(sample[key] for sample in samples[case])

    found: dict[str, float] = {}
    for side in SETTINGS:
        prefix, grids = "" if side == "ours" else f"{side}_", [g for g in ("asym", "sym") if f"{side} {g}" in samples]
        if not grids:
            continue
        for label, key in (("cpu_ratio", "cpu_s"), ("memory_ratio", "peak_mib")):
            found[prefix + label] = max(median(f"{side} {g}", key) / median(f"gptqmodel {g}", key) for g in grids)
        for text in ("in", "out"):
            for label, other in (("ratio", "gptqmodel"), ("to_rtn", "rtn")):
                found[f"{prefix}ppl_{text}_{label}"] = max(
                    perplexity[f"{side} {g}"][text] / perplexity[f"{other} {g}"][text] for g in grids
                )
    return found


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--child"]:
        side, folder, rows, *rest = sys.argv[2:]
        if side == "score":
            score(Path(folder), Path(rows))
        else:
            quantize(side, Path(folder), Path(rows), Path(rest[0]), rest[1] == "True")
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1 round, symmetric only, half of the measured rows")
    parser.add_argument("--sides", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="of our settings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    benchmark(1 if given.quick else given.rounds, given.quick, given.sides, given.seed, given.out)


if __name__ == "__main__":
    main()
