"""A whole recipe on the tiny Llama: base folder to report, twice, and with a candidate that fails."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgetune import pipeline, plan, sources
from edgetune.artifact import Artifact, Store
from edgetune.errors import DataError, EdgetuneError, EngineError, UnsupportedError, UsageError
from edgetune.past import merge_timings
from edgetune.recipe import Recipe, parse_recipe
from edgetune.runtime.evidence import Accuracy, Report
from edgetune.runtime.report import beside
from edgetune.runtime.report.write import read_report
from edgetune.score import score


def write_rows(path: Path, start: int, n: int) -> str:
    rows = [
        {"instruction": "JSON.", "input": f"set light to {i}", "output": f'{{"level":{i}}}'}
        for i in range(start, start + n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_wide: Artifact) -> Recipe:
    return make_recipe(tmp_path, tiny_model_wide.path)


def make_recipe(folder: Path, base: Path, **changes: Any) -> Recipe:
    calibration = {"n_samples": 4, "n_tokens": 32}
    raw: dict[str, Any] = {
        "name": "tiny",
        "base": str(base),
        "data": {
            "train": write_rows(folder / "train.jsonl", 100, 40),
            "heldout": write_rows(folder / "heldout.jsonl", 500, 12),
        },
        "adapt": {"r": 4, "alpha": 8, "batch_size": 8, "max_steps": 4, "eval_steps": 2, "eval_rows": 4},
        "candidates": {
            "q8": {"export": {"gguf": {"type": "Q8_0"}}},
            "int4": {
                "compress": [{"gptq": {"group_size": 32, "sym": False, "calibration": calibration}}],
                "export": {"onnx": {}},
            },
            "checkpoint": {"compress": [{"rtn": {"group_size": 32}}]},
        },
        "bench": {"prompt_tokens": [8], "new_tokens": 4, "repeats": 2, "runs": 1, "warmup": 1, "threads": 1},
        "budgets": {"accuracy": {"max_loss": 0.5}, "size_mb": 50},
    }
    return parse_recipe(raw | changes)


def run(recipe: Recipe, tmp_path: Path) -> tuple[Any, str]:
    said = io.StringIO()
    report = pipeline.run(recipe, tmp_path / "run", Store(tmp_path / "store"), Console(file=said, width=200))
    return report, said.getvalue()


def test_a_recipe_from_base_to_report_and_again(recipe: Recipe, tmp_path: Path) -> None:
    report, said = run(recipe, tmp_path)
    assert not report.failures, report.failures
    assert [v.candidate for v in report.verdicts] == ["q8", "int4", "checkpoint"]
    assert {a.subject.engine for a in report.accuracy} == {"torch", "llama.cpp", "onnxruntime"}
    assert {found.subject.name for found in report.latency} == {"reference", "q8", "int4", "checkpoint"}
    assert [seam.hop for seam in report.seams] == [
        "base",
        "adapter on the nf4 base",
        "merged",
        "q8: gguf Q8_0",
        "int4: gptq int4 g32",
        "int4: onnx int4",
        "checkpoint: rtn int4 g32 sym",
    ]
    folder = tmp_path / "run"
    assert [seam.subject for seam in report.seams] == ["base", None, "reference", "q8", None, "int4", "checkpoint"]
    for seam in report.seams:  # what the page names as the place of its rows
        raw = Accuracy.model_validate_json((tmp_path / "store" / seam.evidence).read_bytes())
        assert "".join(str(int(row.exact)) for row in raw.rows) == seam.exact_rows
    assert read_report(folder / "report.json") == report
    assert [(p.subject.name, p.subject.engine, len(p.rows)) for p in report.probe] == [
        ("base", "torch", 120),
        ("reference", "torch", 120),
    ]
    assert "general questions" in (folder / "report.md").read_text()
    assert [one.candidate for one in report.updates] == ["int4", "checkpoint"]
    assert {layer.split(".")[2] for layer in report.updates[0].layers} == {"0", "1"}
    assert all(0 <= share <= 1 for one in report.updates for share in one.layers.values())
    assert "What of the fine-tune is left" in (folder / "report.md").read_text()
    for name in ("report.html", "report.md", "log.jsonl", "recipe.json"):
        assert (folder / name).stat().st_size > 0
    for name in ("q8", "int4", "checkpoint"):
        link = folder / "candidates" / name
        assert not link.readlink().is_absolute()
        Artifact.open(link).verify()
    assert "done before" not in said
    score_again(report, folder, tmp_path / "box.json")

    again, said = run(recipe, tmp_path)
    repeated = {stage["name"] for stage in again.stages if not stage["done_before"]}
    assert repeated <= {"latency"}  # which is timed again where the machine was busy
    assert said.count("done before") == len(again.stages) - len(repeated)
    took = {stage["name"]: stage["seconds"] for stage in report.stages}
    assert all(took[stage["name"]] == stage["seconds"] for stage in again.stages if stage["done_before"])
    planned = plan.plan(recipe, Store(tmp_path / "store"))
    assert [stage.done for stage in planned] == [True] * 9 + [None] * 10
    assert {stage.name for stage in planned} == {stage["name"] for stage in report.stages}
    assert all(stage.cost.seconds > 0 and stage.cost.memory_mib > 0 for stage in planned)
    unmade = plan.plan(recipe, Store(tmp_path / "empty"))
    assert [stage.name for stage in unmade] == [stage.name for stage in planned]


def score_again(report: Report, folder: Path, raw: Path) -> None:
    """Another box scores a candidate against the pack of the run, and the report takes what it found."""
    scored = score(folder / "candidates" / "q8", folder / pipeline.REFERENCE, Console(file=io.StringIO()), json=raw)
    (mine,) = [found for found in report.accuracy if found.subject.name == "q8"]
    assert [row.kl_tokens for row in scored.rows] == [row.kl_tokens for row in mine.rows]
    assert scored.text == mine.text
    merged = merge_timings(report, raw)
    here = set(beside.lines(report))
    assert {line.source for line in here if line.subject == "q8"} == {
        f"artifacts.q8.notes.{what}" for what in ("contract", "parity", "perplexity", "generation")
    }
    ((subject, said, _),) = (line for line in beside.lines(merged) if line not in here)
    assert subject == "q8"
    assert "scored in llama.cpp on 12 rows: KL mean" in said
    other = report.model_copy(update={"accuracy": [mine.model_copy(update={"workload": "of other rows"})]})
    with pytest.raises(UsageError, match="none of the files of report 'tiny'; their digests or rows differ"):
        merge_timings(other, raw)


def write_tasks(folder: Path) -> list[dict[str, Any]]:
    rows = {
        "moods": [{"input": f"{w} light", "output": m} for w, m in (("warm", "glad"), ("no", "sad"))] * 3,
        "sums": [{"question": f"{i} + 1", "choices": [str(i + 1), str(i + 2)], "answer": 0} for i in range(5)],
        "texts": [{"text": "set the kitchen light to 30 percent"}],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    kinds = {"moods": "classification", "sums": "multiple_choice", "texts": "perplexity"}
    return [{"name": name, "kind": kind, "rows": str(folder / f"{name}.jsonl")} for name, kind in kinds.items()]


@pytest.mark.usefixtures("known_speeds", "scored_store")
def test_tasks_are_scored_in_each_runtime_and_judged(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    chosen = {"type": "Q4_0", "gptq": True, "calibration": {"n_samples": 8, "n_tokens": 32}}
    changes: dict[str, Any] = {"adapt": None, "candidates": {"q4": {"export": {"gguf": chosen}}}}
    budgets = {"accuracy": {"task": "moods", "metric": "accuracy", "max_loss": 0.9}}
    recipe = make_recipe(tmp_path, tiny_model_wide.path, **changes, tasks=write_tasks(tmp_path), budgets=budgets)
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    assert [(t.subject.name, t.subject.engine, t.task) for t in report.tasks] == [
        (subject, engine, task)
        for subject, engine in (("reference", "torch"), ("q4", "llama.cpp"))
        for task in ("moods", "sums", "texts")
    ]
    (check,) = report.verdicts[0].checks
    assert check.budget == "moods: accuracy loss"
    assert "at 95% on either side, 6 rows" in check.reason
    texts = [task.figures["perplexity"] for task in report.tasks if task.task == "texts"]
    assert texts[1] == pytest.approx(texts[0], rel=0.1)
    planned = plan.plan(recipe, Store(tmp_path / "store"))
    assert {stage.name for stage in planned} == {stage["name"] for stage in report.stages}
    assert plan.rows_said(recipe) == (
        "6 rows can show a loss of at most 90 points; 1 would do (no loss, 0.03 of the rows flipping, 0.95 confidence, "
        "80% power)"
    )
    plain = make_recipe(tmp_path, tiny_model_wide.path, **changes)
    stages = {stage.name: stage.done for stage in plan.plan(plain, Store(tmp_path / "store"))}
    assert stages["q4: gguf Q4_0 gptq"]  # tasks change no other identity
    assert "q4: tasks" not in stages


@pytest.mark.usefixtures("known_speeds")
def test_a_general_probe_of_ones_own_is_checked_first_and_null_asks_nothing(
    tmp_path: Path, tiny_model_wide: Artifact
) -> None:
    def stages(probe: str | None) -> list[str]:
        files = {"train": str(tmp_path / "train.jsonl"), "heldout": str(tmp_path / "heldout.jsonl")}
        recipe = make_recipe(tmp_path, tiny_model_wide.path, data=files | {"general_probe": probe})
        return [stage.name for stage in plan.plan(recipe, Store(tmp_path / "store"))]

    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"question": "light?", "choices": ["on", "off"], "answer": 0}) + "\n")
    asked = stages(str(own))
    assert [name for name in asked if "probe" in name] == ["base: general probe", "reference: general probe"]
    assert stages(None) == [name for name in asked if "probe" not in name]
    own.write_text(json.dumps({"question": "light?", "choices": ["on"], "answer": 0}) + "\n")
    with pytest.raises(DataError, match=r"^task general_probe: .*own\.jsonl line 1: 'choices' must hold at least two"):
        stages(str(own))


def test_a_scoring_has_the_time_that_the_recipe_gives(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates={"same": {}})
    short = recipe.model_copy(update={"data": recipe.data.model_copy(update={"score_timeout_s": 0.01})})
    with pytest.raises(EngineError, match=r"gave no answer in 0\.01 s while loading"):
        run(short, tmp_path)


@pytest.mark.parametrize(
    ("budget", "n_candidates", "said"),
    [
        ({"max_loss": 0.02}, 1, "12 rows cannot show a loss of at most 2 points; 470 can (no loss, 0.03 of the rows"),
        ({"max_loss": 0.02}, 3, "12 rows cannot show a loss of at most 2 points; 670 can (no loss, 0.03 of the rows"),
        ({"task": "moods", "metric": "accuracy", "max_loss": 0.02}, 1, "6 rows cannot show a loss of at most 2 points"),
        ({"metric": "slot_f1", "max_loss": 0.02}, 3, None),  # no row of these flips
        ({"task": "texts", "metric": "perplexity", "max_loss": 0.02}, 1, None),
        (None, 1, None),
    ],
)
def test_the_plan_of_rows_counts_candidates_and_knows_which_metrics_flip(
    budget: dict[str, Any] | None, n_candidates: int, said: str | None, tmp_path: Path
) -> None:
    candidates = {f"q{n}": {"export": {"gguf": {"type": "Q8_0"}}} for n in range(n_candidates)}
    changes: dict[str, Any] = {
        "candidates": candidates,
        "tasks": write_tasks(tmp_path),
        "budgets": {"accuracy": budget},
    }
    found = plan.rows_said(make_recipe(tmp_path, tmp_path, **changes))
    assert (found is None) if said is None else (found or "").startswith(said)
    if n_candidates > 1 and found is not None:
        assert "0.95 confidence of 3 candidates together" in found


@pytest.mark.usefixtures("known_speeds", "scored_store")
def test_a_failing_candidate_is_a_row_and_zeros_go_on_to_the_report(
    tmp_path: Path, tiny_model_wide: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.export import onnx

    def fail(*_: object, **__: object) -> None:
        raise ValueError("the builder\nbroke")

    monkeypatch.setattr(onnx, "run", fail)
    sparse = {"sparsify": {"pattern": "2:4", "calibration": {"n_samples": 4, "n_tokens": 32}}}
    candidates = {
        "q8": {"export": {"gguf": {"type": "Q8_0"}}},
        "int4": {"compress": [{"rtn": {"group_size": 32, "sym": False}}], "export": {"onnx": {}}},
        "joint": {"compress": [sparse, {"rtn": {"group_size": 32}}]},
    }
    bench = {"prompt_tokens": [8], "new_tokens": 2, "repeats": 1, "runs": 1, "warmup": 1, "threads": 1}
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates=candidates, bench=bench)
    report, _ = run(recipe, tmp_path)
    assert [v.verdict for v in report.verdicts if v.candidate == "int4"] == ["failed"]
    assert [(f.subject, f.reason) for f in report.failures] == [("int4", "ValueError: the builder broke")]
    assert {found.subject.name for found in report.latency} == {"reference", "q8", "joint"}
    assert [seam.hop for seam in report.seams] == [
        "base", "q8: gguf Q8_0", "joint: sparsify sparsegpt 2:4", "joint: rtn int4 g32 sym",
    ]  # fmt: skip
    said = "joint: the zeros of sparsify save neither time nor bytes"
    assert [line for line in report.warnings if line.startswith(said) and "need not keep them" in line]
    assert said in (tmp_path / "run" / "report.md").read_text()
    planned = [stage for stage in plan.plan(recipe, Store(tmp_path / "store")) if not stage.name.startswith("int4: ")]
    assert {stage.name for stage in planned} == {stage["name"] for stage in report.stages} - {"int4: rtn int4 g32"}
    assert all(stage.done is not False for stage in planned)
    assert all(stage.cost is not None and stage.cost.seconds > 0 for stage in planned)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        (
            {"candidates": {"a": {"compress": [{"gptq": {"group_size": 48}}]}}},
            UnsupportedError,
            "candidates.a: group_size=48",
        ),
        ({"candidates": {"a": {"export": {"onnx": {}}}}}, UnsupportedError, "add a gptq step"),
        (
            {"candidates": {"a": {"compress": [{"rtn": {}}], "export": {"gguf": {"gptq": True}}}}},
            UnsupportedError,
            "candidates.a: gptq: true chooses codes by the float weights",
        ),
        ({"tasks": [{"name": "t", "kind": "perplexity", "rows": "none.jsonl"}]}, DataError, "task t: none.jsonl"),
        ({"device": "cuda:7"}, EdgetuneError, "device: torch cannot use 'cuda:7'"),
    ],
)
def test_what_cannot_be_done_is_refused_before_training(
    tmp_path: Path, tiny_model_wide: Artifact, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        run(make_recipe(tmp_path, tiny_model_wide.path, **changes), tmp_path)
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        ("general", {}, "candidates.int4: calibration wants 1 x 32 tokens of general text, "),
        ("train", {}, "train.jsonl: 1 training rows are too few; give at least 5"),
        ("train", {"max_length": 1}, "train.jsonl: every row is longer than max_length=1"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "plan"])
def test_what_only_token_ids_tell_is_refused_before_training(
    tmp_path: Path, tiny_model_wide: Artifact, file: str, settings: dict[str, Any], says: str, verb: str
) -> None:
    places = {name: str(tmp_path / f"{name}.jsonl") for name in {"train", "heldout", file}}
    recipe = make_recipe(tmp_path, tiny_model_wide.path, data=places | settings)
    Path(places[file]).write_text('{"text": "set the light"}\n')
    store, base = Store(tmp_path / "store"), sources.find(recipe.base)
    store.once(base.identity, lambda out: sources.run(base, out))
    with pytest.raises(DataError, match=re.escape(says)):
        run(recipe, tmp_path) if verb == "run" else plan.plan(recipe, store)
    assert len([*(tmp_path / "store").glob("*/manifest.json")]) == 1  # the base


@pytest.mark.usefixtures("known_speeds", "scored_store")
def test_an_engine_for_another_machine_is_built_and_not_judged(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgetune.runtime.engine import why_not_run
    from edgetune.runtime.gate import judge_again, junit
    from edgetune.runtime.verdict import exit_code

    if why_not_run("tensorrt") is None:
        pytest.skip("there is a GPU, so it runs here")
    candidates = {"engine": {"export": {"tensorrt": {"max_length": 128}}}}
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates=candidates)
    report, _ = run(recipe, tmp_path)
    (verdict,) = report.verdicts
    assert verdict.verdict == "built, not run"
    assert "no NVIDIA GPU" in verdict.reason
    assert f"edgetune bench {tmp_path / 'run' / 'candidates' / 'engine'}" in verdict.reason
    assert not report.failures
    assert exit_code(report.verdicts) == 4
    assert {found.subject.name for found in (*report.accuracy, *report.latency)} == {"reference"}
    assert report.artifacts["engine"]["notes"]["status"] == "built, not run"
    assert judge_again(report, recipe.budgets.model_copy(update={"accuracy": None})).verdicts == report.verdicts
    assert '<failure type="built, not run"' in junit(report)
    for name in ("report.html", "report.md"):
        assert "built, not run" in (tmp_path / "run" / name).read_text().lower()
    names = [stage.name for stage in plan.plan(recipe, Store(tmp_path / "store"))]
    assert names == ["base", "engine: tensorrt fp16", "reference: accuracy", "latency"]


def test_a_leak_is_refused_with_both_lines(recipe: Recipe, tmp_path: Path) -> None:
    train = Path(recipe.data.train).read_text().splitlines()
    with Path(recipe.data.heldout).open("a") as stream:
        stream.write(train[6].replace("set light", "SET  light") + "\n")
    with pytest.raises(DataError, match=r"heldout.jsonl line 13 is also .*train.jsonl line 7 \(1 such rows\)"):
        run(recipe, tmp_path)
