"""DPO, IPO, KTO, ORPO and GRPO on the real model: what each does to a model that was fine-tuned shortly.

    python benchmarks/preferences.py                    # 24 steps of each method, 100 held-out rows
    python benchmarks/preferences.py --quick            # 2 steps, 8 held-out rows
    python benchmarks/preferences.py --data DIR         # where snips/{train,test}.jsonl lie

SmolLM2-135M learns voice commands (snips) by QLoRA for 40 steps of 16 rows and is merged. It then answers commands that
it has not seen; where the answer is wrong, the gold one is the chosen and its own the rejected. Four fifths of these
pairs train, the others are held out. KTO reads both answers with labels, GRPO the commands alone and rewards exact and
valid answers; ORPO begins with the base, in place of fine-tuning, all others with the merged model. Held-out commands
are scored as in `methods.py`; `preferred` is the share of held-out pairs whose chosen answer the model finds likelier.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from methods import BASE, DATA, PACKAGES, log_softmax

from edgetune.artifact import Artifact, write_text
from edgetune.recipe_training import Prefer

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "preferences.json"
TUNED = {"method": "qlora", "learning_rate": 1e-3, "batch_size": 16, "eval_rows": 16, "report_to": []}
TUNED_STEPS, STEPS, BATCH, HELDOUT, ASKED = 40, 24, 8, 100, 120
REWARDS = [{"exact_match": {"weight": 2.0}}, {"json_valid": {}}]
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"learning_rate": 5e-4},
    "ipo": {"learning_rate": 5e-4},
    "kto": {"learning_rate": 5e-4},
    "orpo": {"learning_rate": 1e-3, "beta": 0.5},
    "grpo": {"learning_rate": 5e-4, "rewards": REWARDS, "generations": 4, "max_new_tokens": 96, "beta": 0.02},
}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tuned(work: Path, train: Path, heldout: Path, store: Path, steps: int) -> Artifact:
    """Fine-tune and merge by the command line."""
    raw = {
        "name": "preferences", "base": BASE, "data": {"train": str(train), "heldout": str(heldout)},
        "adapt": TUNED | {"max_steps": steps, "eval_steps": steps}, "candidates": {"same": {}},
    }  # fmt: skip
    (work / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    command = [sys.executable, "-m", "edgetune", "adapt", str(work / "recipe.yaml"), "--store", str(store)]
    done = subprocess.run([*command, "--out", str(work / "run")], stdout=subprocess.PIPE, text=True, check=True)
    return Artifact.open(Path(done.stdout.splitlines()[-1]))


def answers(model: Artifact, rows: Sequence[dict[str, Any]], threads: int) -> Iterator[str]:
    """Answer commands greedily."""
    from transformers import AutoTokenizer

    from edgetune.data.formats import parse_row
    from edgetune.data.golden import Golden
    from edgetune.data.records import Record
    from edgetune.data.render import render
    from edgetune.runtime.engine import greedy
    from edgetune.runtime.engines.torch_engine import TorchEngine

    tokenizer = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
    stop = Golden.read(model.path).stop_ids
    engine = TorchEngine.load(model.path, n_ctx=1024, n_threads=threads)
    for number, values in enumerate(rows, 1):
        row = render(parse_row(Record(values, number, "row"), "alpaca"), tokenizer, stop)
        new = greedy(engine, row.ids[: row.start], frozenset(stop), 128)
        yield engine.detokenize([token for token in new if token not in stop])
    engine.close()


def score(engine: Any, held: Sequence[Any], pairs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    """Exact match and loss of held-out rows, and how often the chosen of two answers is the likelier."""
    import numpy as np

    from edgetune.runtime.engine import TokenRow

    def logs(rows: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        for row, logits in zip(rows, engine.score_rows([TokenRow(r.ids, r.start) for r in rows]), strict=True):
            gold = np.asarray(row.ids[row.start :])
            yield log_softmax(logits)[np.arange(len(gold)), gold], logits.argmax(1) == gold

    found = list(logs(held))
    likely = [float(log.sum()) for log, _ in logs([row for pair in pairs for row in pair])]
    return {
        "exact_match": float(np.mean([bool(right.all()) for _, right in found])),
        "loss": float(-np.concatenate([log for log, _ in found]).mean()),
        "preferred": float(np.mean([a > b for a, b in zip(likely[::2], likely[1::2], strict=True)])),
    }


def turns(values: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": values["instruction"]},
        {"role": "user", "content": values["input"]},
    ]


def benchmark(data: Path, store: Path, steps: int, n_heldout: int, asked: int, out: Path) -> None:
    """Tune, collect pairs, train each method and print a table."""
    from transformers import AutoTokenizer

    from edgetune.adapt import preference
    from edgetune.data.formats import read_rows
    from edgetune.data.golden import Golden
    from edgetune.data.preference import read_preferences
    from edgetune.data.render import render
    from edgetune.runtime.engines.torch_engine import TorchEngine
    from edgetune.runtime.machine import LoadMeter, describe

    began, meter = time.monotonic(), LoadMeter()
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    test = rows_of(data / "snips" / "test.jsonl")[:n_heldout]
    known = {row["input"].casefold() for row in test}
    fresh = [row for row in rows_of(data / "snips" / "train.jsonl") if row["input"].casefold() not in known]
    tuned_steps = min(TUNED_STEPS, 4 * steps)  # fewer with --quick
    n_tuned = (tuned_steps + 2) * TUNED["batch_size"]
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        heldout = save(work / "heldout.jsonl", test)
        model = tuned(work, save(work / "train.jsonl", fresh[:n_tuned]), heldout, store, tuned_steps)
        base = next(
            a for a in map(Artifact.open, sealed(store)) if a.manifest.kind == "model" and not a.manifest.parents
        )
        unseen = fresh[n_tuned : n_tuned + asked]
        said = list(answers(model, unseen, threads))
        wrong = [(row, answer) for row, answer in zip(unseen, said, strict=True) if answer.strip() != row["output"]]
        pairs = [{"prompt": turns(row), "chosen": row["output"], "rejected": answer or "?"} for row, answer in wrong]
        n_train = max(BATCH, len(pairs) * 4 // 5)
        print(f"{len(pairs)} of {len(unseen)} answers were wrong; {n_train} pairs train", file=sys.stderr, flush=True)
        both = [
            {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
            for pair in pairs[:n_train] for key in ("chosen", "rejected")
        ]  # fmt: skip
        files = {"kto": save(work / "kto.jsonl", both), "grpo": save(work / "grpo.jsonl", [row for row, _ in wrong])}
        plain = save(work / "pairs.jsonl", pairs[:n_train])
        tokenizer, golden = AutoTokenizer.from_pretrained(model.path), Golden.read(model.path)
        held = [render(row, tokenizer, golden.stop_ids) for row in read_rows(heldout)]
        apart = read_preferences(save(work / "apart.jsonl", pairs[n_train:] or pairs[:1]))
        chosen = [tuple(render(row, tokenizer, golden.stop_ids) for row in pair.rows) for pair in apart]
        told: dict[str, dict[str, Any]] = {}
        for case, source in (("base", base), ("fine-tuned", model)):
            told[case] = score(TorchEngine.load(source.path, n_ctx=1024, n_threads=threads), held, chosen)
            print(line(case, told[case]), flush=True)
        for case, settings in CASES.items():
            config = Prefer(
                method=case, train=str(files.get(case, plain)), adapter="lora", batch_size=BATCH, max_steps=steps,
                report_to=[], **settings,
            )  # fmt: skip
            source, start = base if case == "orpo" else model, time.monotonic()
            made = preference.run(config, source, work / case, examples=preference.read(config))
            seconds = time.monotonic() - start
            engine = TorchEngine.load(source.path, n_ctx=1024, n_threads=threads, adapter=str(made.path))
            told[case] = score(engine, held, chosen) | {
                "seconds": seconds, "config": config.model_dump(mode="json", exclude={"train"}),
                "notes": made.manifest.notes,
            }  # fmt: skip
            engine.close()
            print(line(case, told[case]), flush=True)
    load = meter.stop()
    found = {
        "machine": describe().model_dump(), "load": load.model_dump(), "seconds": time.monotonic() - began,
        "versions": {name: metadata.version(name) for name in (*PACKAGES, "trl")},
        "settings": {"base": BASE, "tuned": TUNED | {"max_steps": tuned_steps}, "steps": steps, "heldout": len(held),
                     "asked": len(unseen), "wrong": len(wrong), "pairs": n_train, "heldout_pairs": len(chosen)},
        "cases": told,
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, json.dumps(found, indent=1) + "\n")
    tuned_exact = told["fine-tuned"]["exact_match"]
    print(" ".join(f"{case}_gain={told[case]['exact_match'] - tuned_exact:+.3f}" for case in CASES))


def sealed(store: Path) -> Iterator[Path]:
    return (manifest.parent for manifest in sorted(store.glob("*/manifest.json")))


def line(case: str, found: dict[str, Any]) -> str:
    """One row of the table in docs/adapt.md."""
    took = f"{found['seconds']:.0f}" if "seconds" in found else ""
    return f"| `{case}` | {found['exact_match']:.1%} | {found['loss']:.4f} | {found['preferred']:.1%} | {took} |"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder that holds snips/train.jsonl and test.jsonl")
    parser.add_argument("--store", type=Path, default=Path("runs/.preferences"), help="where tuned models are kept")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--heldout", type=int, default=HELDOUT, help="held-out rows that are scored")
    parser.add_argument("--asked", type=int, default=ASKED, help="commands that the fine-tuned model answers")
    parser.add_argument("--quick", action="store_true", help="2 steps, 8 held-out rows, 24 commands")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if not (given.data / "snips" / "train.jsonl").is_file():
        sys.exit(f"{given.data / 'snips' / 'train.jsonl'} is not there; give its folder's parent with --data")
    steps, heldout, asked = (2, 8, 24) if given.quick else (given.steps, given.heldout, given.asked)
    benchmark(given.data, given.store, steps, heldout, asked, given.out)


if __name__ == "__main__":
    main()
