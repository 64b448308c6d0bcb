"""Models larger than memory: peak memory, resuming, time per block and its growth, on random Llamas made on the spot.

    python benchmarks/memory.py --folder DIR             # 3B shape: 28 blocks, hidden 3072, 6.4 GB in bfloat16; hours
    python benchmarks/memory.py --folder DIR --blocks 2  # GPTQ of its first two blocks only; the whole of it rounded
    python benchmarks/memory.py --quick                  # 0.3B shape: 16 blocks, hidden 1024

Each quantization (int4, groups of 128, 8 rows of 256 random tokens) is a process of its own, which tells its peak of
resident memory (VmHWM, mapped files counted), seconds and CPU-seconds after each block. `peak_over_checkpoint` is that
peak over the bytes of the 16-bit checkpoint. Unless `--blocks` cuts it short, one more run is killed (SIGKILL) within a
block that is drawn, and runs again to its end: `different_bytes` counts files that are not those of the whole run.
`seconds_over_plan` is CPU-seconds of a block over those that `plan` predicts of the speed of products, taken in
CPU-seconds, too. Growth is measured on the 0.3B shape: `layers_growth` is CPU-seconds of twice the blocks,
`tokens_growth` what the third thousand of tokens costs over what the second one does; 2 and 1 are linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from tiny import ROOT  # puts the checkout on the path

from edgetune.artifact import Artifact, draft, file_digest, write_text
from edgetune.compress.chain import step_names
from edgetune.counts import Counts, Sizes, Speeds
from edgetune.estimate import START_S, Estimator
from edgetune.recipe import Gptq, Rtn, parse_recipe
from edgetune.runtime.machine import LoadMeter, describe

RESULT = ROOT / "benchmarks" / "results" / "memory.json"
PACKAGES = ("edgetune", "torch", "transformers", "safetensors")
SHAPES = {
    "3B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "0.3B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
             "num_key_value_heads": 4, "vocab_size": 32000},
}  # fmt: skip
POOL = (1 << 24) - 3  # random numbers; rows of all widths begin elsewhere in it
ROWS, TOKENS, CONFIG = 8, 256, {"bits": 4, "group_size": 128, "sym": False}


def make(shape: str, layers: int, out: Path) -> Artifact:
    """Write a random Llama in bfloat16 as a `model` artifact, one safetensors file a block; gives it where it is."""
    if out.exists():
        return Artifact.open(out)
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from edgetune.data.golden import make_golden
    from tests.conftest import tiny_tokenizer

    sizes = SHAPES[shape] | {"num_hidden_layers": layers}
    config = LlamaConfig(**sizes, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
                         architectures=["LlamaForCausalLM"])  # fmt: skip
    with init_empty_weights():
        names = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters() if name != "lm_head.weight"}
    draw = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL, generator=draw)

    def drawn(shape: torch.Size) -> torch.Tensor:
        """Ones for a norm; else a part of the pool that begins somewhere, as often as it takes."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        moved = pool.roll(int(torch.randint(POOL, (1,), generator=draw))).mul_(shape[-1] ** -0.5).bfloat16()
        return moved.repeat(-(-shape.numel() // POOL))[: shape.numel()].reshape(shape)

    with draft(out, kind="model", stage="source/1", config={"random": shape, "layers": layers}) as pending:
        places = {}
        for number in range(-1, layers):
            mine = [n for n in names if (n.split(".")[2] == str(number) if ".layers." in n else number < 0)]
            file = f"model-{number + 2:05d}-of-{layers + 1:05d}.safetensors"
            save_file({n: drawn(names[n]) for n in mine}, pending.path / file, metadata={"format": "pt"})
            places |= dict.fromkeys(mine, file)
        write_text(pending.path / "model.safetensors.index.json", json.dumps({"weight_map": places}))
        config.save_pretrained(pending.path)
        tiny_tokenizer(pending.path)
        turns = [{"role": "user", "content": "set the light"}, {"role": "assistant", "content": "set"}]
        make_golden(AutoTokenizer.from_pretrained(pending.path), [turns], stop_ids=[2]).write(pending.path)
    return pending.artifact


def child(method: str, model: Path, out: Path, rows: int, tokens: int, vocabulary: int) -> None:
    """Be a quantization; print after each block what it took until then, one JSON object a line."""
    import numpy as np

    from edgetune.compress.quantize import run
    from edgetune.data.calibration import CalibrationSet

    began = time.perf_counter(), time.process_time()

    def told(block: int = -1, *_: object) -> None:
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024
        seconds, cpu_s = time.perf_counter() - began[0], time.process_time() - began[1]
        print(json.dumps({"block": block, "seconds": seconds, "cpu_s": cpu_s, "peak_mib": peak}), flush=True)

    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens))
    config = Gptq(**CONFIG) if method == "gptq" else Rtn(**CONFIG)
    told(0)
    run(config, Artifact.open(model), out, calibration=CalibrationSet(ids), progress=told)
    told()


def quantized(
    method: str, model: Path, out: Path, vocabulary: int, *, rows: int = ROWS, kill: float | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Run a quantization; give what it told. It is killed `kill` blocks after its start, parts of a block counted."""
    command = [sys.executable, __file__, "--child", method, str(model), str(out), *map(str, (rows, TOKENS, vocabulary))]
    told: list[dict[str, float]] = []
    with (out.parent / f"{out.name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                told.append(json.loads(line))
                if told[-1]["block"]:
                    print(out.name, line.strip(), flush=True)
                if kill is not None and told[-1]["block"] >= int(kill):
                    each = told[-1]["seconds"] / max(told[-1]["block"], 1)
                    time.sleep((kill - int(kill)) * each)
                    process.send_signal(signal.SIGKILL)
                    break
        except BaseException:
            process.kill()
            raise
        process.wait()
    if kill is None and process.returncode:
        sys.exit(f"{method} of {model.name} failed; see {log.name}")
    return told


def per_block(told: list[dict[str, float]], key: str) -> float:
    """Median of what a block took; the first one, which warms up, is left out where there are others."""
    stamps = [line[key] for line in told if line["block"] >= 0]
    steps = [b - a for a, b in itertools.pairwise(stamps)]
    return statistics.median(steps[1:] or steps)


def measure_speeds() -> Speeds:
    """Measure matrix products as `plan` does, but in CPU-seconds, which others on the machine disturb less."""
    import torch

    from edgetune.devices import compute_dtype
    from edgetune.training_time import PRODUCT

    def gflops(dtype: torch.dtype) -> float:
        M, K, N = PRODUCT
        a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
        times: list[float] = []
        for _ in range(20):
            began = time.process_time()
            torch.mm(a, b)
            times.append(time.process_time() - began)
        return 2 * M * K * N / statistics.median(times) / 1e9

    return Speeds(gflops(torch.float32), gflops(compute_dtype("cpu")), threads=1)  # CPU-seconds are of one each


def predicted(model: Path, speeds: Speeds) -> float:
    """Give the seconds of a block that `plan` predicts for our calibration rows."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    calibration = {"n_samples": ROWS, "n_tokens": TOKENS}
    recipe = parse_recipe({
        "name": "memory", "base": str(model), "data": {"train": "rows.jsonl", "heldout": "rows.jsonl"},
        "candidates": {"int4": {"compress": [{"gptq": CONFIG | {"calibration": calibration}}]}},
        "budgets": {"size_mb": 1},
    })  # fmt: skip
    estimator = Estimator(recipe, config, Counts(0, 0, 0), Counts(0, 0, 0), speeds)
    stage = f"int4: {step_names(recipe.candidates['int4'])[0]}"
    return (estimator.cost(stage).seconds - START_S) / Sizes.of(config).n_layers


def benchmark(folder: Path, quick: bool, layers: int | None, blocks: int | None, seed: int, out: Path) -> None:
    """Make the models, quantize them, and print the figures."""
    began, rng = time.monotonic(), random.Random(seed)
    shape = "0.3B" if quick else "3B"
    vocabulary, layers = SHAPES[shape]["vocab_size"], layers or SHAPES[shape]["num_hidden_layers"]
    model, meter = make(shape, layers, folder / f"{shape}-{layers}"), LoadMeter()
    n_bytes = sum((model.path / n).stat().st_size for n in model.manifest.files if n.endswith(".safetensors"))
    samples: dict[str, Any] = {}
    totals: dict[str, float] = {}
    for name in ("whole", "cut", "rounded"):
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.rmtree(folder / f".{name}.work", ignore_errors=True)
    samples["whole"] = quantized("gptq", model.path, folder / "whole", vocabulary, kill=blocks)
    if blocks is None:
        whole = Artifact.open(folder / "whole")
        moment = rng.uniform(1, layers)
        samples["killed"] = quantized("gptq", model.path, folder / "cut", vocabulary, kill=moment)
        samples["resumed"] = quantized("gptq", model.path, folder / "cut", vocabulary)
        cut = Artifact.open(folder / "cut")
        names = ("manifest.json", *whole.manifest.files)
        different = [n for n in names if file_digest(whole.path / n) != file_digest(cut.path / n)]
        totals |= {"killed_at_block": round(moment, 2), "different_bytes": len(different)}
    else:
        samples["rounded"] = quantized("rtn", model.path, folder / "rounded", vocabulary)
    peak = max(line["peak_mib"] for told in samples.values() for line in told)
    totals |= {"peak_mib": peak, "checkpoint_mib": n_bytes / 2**20, "peak_over_checkpoint": peak * 2**20 / n_bytes}
    speeds = measure_speeds()
    block_s = per_block(samples["whole"], "cpu_s")
    totals |= {"block_cpu_s": block_s, "plan_s": predicted(model.path, speeds)}
    totals["seconds_over_plan"] = block_s / totals["plan_s"]
    if blocks is None:
        totals |= growth(folder, samples)
    found = {
        "benchmark": "memory",
        "totals": totals,
        "settings": SHAPES[shape] | {
            "shape": shape, "num_hidden_layers": layers, "gptq_blocks": blocks or layers, "rows": ROWS,
            "tokens": TOKENS, "gptq": CONFIG, "seed": seed, "threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "speeds": vars(speeds),
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe().model_dump(mode="json"),
        "load": (load := meter.stop()).model_dump(mode="json"),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "samples": samples,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    if load.busy:
        print(f"the machine was busy: others used {load.others_during:.0%} of it")
    print(" ".join(f"{key}={value:.3f}" for key, value in totals.items()))


def growth(folder: Path, samples: dict[str, Any]) -> dict[str, float]:
    """CPU-seconds of 3 and 6 blocks, and of 1, 2 and 3 thousand tokens, on the small shape."""
    vocabulary, spent = SHAPES["0.3B"]["vocab_size"], {}
    for layers, rows in ((3, 4), (6, 4), (3, 8), (3, 12)):
        model, made = make("0.3B", layers, folder / f"0.3B-{layers}"), folder / f"growth-{layers}-{rows}"
        shutil.rmtree(made, ignore_errors=True)
        told = quantized("gptq", model.path, made, vocabulary, rows=rows)
        samples[f"{layers} blocks, {rows * TOKENS} tokens"] = told
        stamps = [line["cpu_s"] for line in told if line["block"] >= 0]
        spent[layers, rows] = stamps[-1] - stamps[0]
    first, second = spent[3, 8] - spent[3, 4], spent[3, 12] - spent[3, 8]
    return {"layers_growth": spent[6, 4] / spent[3, 4], "tokens_growth": second / first}


def main() -> None:
    """Read the command line."""
    if sys.argv[1:2] == ["--child"]:
        method, model, out, *numbers = sys.argv[2:]
        child(method, Path(model), Path(out), *map(int, numbers))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where models are made and kept; else a folder that is removed")
    parser.add_argument("--quick", action="store_true", help="the 0.3B shape")
    parser.add_argument("--layers", type=int, help="blocks of the model, where they are not to be all of the shape")
    parser.add_argument("--blocks", type=int, help="blocks that GPTQ does; the whole model is rounded beside")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        benchmark(folder, given.quick, given.layers, given.blocks, given.seed, given.out)


if __name__ == "__main__":
    main()
