"""What `diff` calls a change, and what it calls chance."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgetune.cli import app
from edgetune.runtime import statistics
from edgetune.runtime.diff import Difference, compare
from edgetune.runtime.evidence import Report
from edgetune.runtime.report.write import dump_report
from tests.report_sample import sample_report


def of(found: list[Difference], subject: str, what: str) -> Difference:
    return next(one for one in found if one.subject == subject and one.what.startswith(what))


def slower(report: Report, name: str, factor: float) -> Report:
    latency = [
        found.model_copy(update={"cases": [
            case.model_copy(update={"generations": [
                g.model_copy(update={"itl_ms": [ms * factor for ms in g.itl_ms]}) for g in case.generations
            ]}) for case in found.cases
        ]}) if found.subject.name == name else found
        for found in report.latency
    ]  # fmt: skip
    return report.model_copy(update={"latency": latency})


def repeated(report: Report, n_runs: int = 3) -> Report:
    """The same report as if its generations came of so many runs."""
    latency = [
        found.model_copy(update={"cases": [
            case.model_copy(update={"generations": [
                g.model_copy(update={"run": i % n_runs}) for i, g in enumerate(case.generations)
            ]}) for case in found.cases
        ]})
        for found in report.latency
    ]  # fmt: skip
    return report.model_copy(update={"latency": latency})


def test_a_report_is_the_same_as_itself() -> None:
    report = sample_report()
    kinds = {one.kind for one in compare(report, report)}
    assert kinds <= {"same", "not comparable"}  # a busy machine's timings are not compared


def test_slower_answers_and_lost_answers_are_worse() -> None:
    report = repeated(sample_report())
    assert of(compare(report, slower(report, "q4-gguf", 1.3)), "q4-gguf", "ITL").kind == "worse"
    assert of(compare(report, slower(report, "q4-gguf", 0.7)), "q4-gguf", "ITL").kind == "better"
    once = repeated(sample_report(), 1)  # without repeated runs nobody knows what chance does
    found = of(compare(once, slower(once, "q4-gguf", 1.3)), "q4-gguf", "ITL")
    assert found.kind == "changed"
    assert found.says.endswith("without repeated runs (bench.runs) that may be chance")
    worse = [
        found.model_copy(update={"rows": [row.model_copy(update={"exact": row.exact and i >= 40})
                                          for i, row in enumerate(found.rows)]})
        if found.subject.name == "q4-gguf" else found
        for found in report.accuracy
    ]  # fmt: skip
    lost = of(compare(report, report.model_copy(update={"accuracy": worse})), "q4-gguf", "answers")
    assert lost.kind == "worse"
    assert "0 right" in lost.says


def test_an_undecided_verdict_is_no_worse_one() -> None:
    report = sample_report(n_rows=40).model_copy(update={"latency": []})

    def judged(verdict: str) -> Report:
        verdicts = [
            v.model_copy(update={"verdict": verdict}) if v.candidate == "q4-gguf" else v for v in report.verdicts
        ]
        return report.model_copy(update={"verdicts": verdicts})

    kinds = {
        (old, new): of(compare(judged(old), judged(new)), "q4-gguf", "verdict").kind
        for old, new in [("ship", "inconclusive"), ("inconclusive", "do not ship"), ("inconclusive", "ship"),
                         ("ship", "do not ship"), ("failed", "ship"), ("ship", "built, not run")]
    }  # fmt: skip
    assert list(kinds.values()) == ["changed", "changed", "changed", "worse", "better", "changed"]


def test_tasks_are_compared_row_by_row() -> None:
    report = sample_report(n_rows=40).model_copy(update={"latency": []})

    def changed(value: float) -> Report:
        tasks = [
            task.model_copy(update={"rows": [
                row.model_copy(update={"scores": {metric: value if i < 30 else score
                                                  for metric, score in row.scores.items()}})
                for i, row in enumerate(task.rows)
            ]}) if task.subject.name == "q4-gguf" else task
            for task in report.tasks
        ]  # fmt: skip
        return report.model_copy(update={"tasks": tasks})

    worse = compare(report, changed(0.0))
    lost = of(worse, "q4-gguf", "task moods")
    assert lost.kind == "worse"
    assert re.fullmatch(r"Accuracy -\d+\.\d\d points \(-\d.* to -\d.*\)", lost.says)
    assert of(worse, "q4-gguf", "task manual").kind == "better"  # of perplexity less is better
    assert of(compare(report, changed(9.0)), "q4-gguf", "task manual").kind == "worse"
    assert of(worse, "q4-onnx", "task moods").kind == "same"
    others = [task.model_copy(update={"workload": "other"}) for task in report.tasks]
    found = of(compare(report, report.model_copy(update={"tasks": others})), "q4-gguf", "task moods")
    assert found.kind == "not comparable"


def test_memory_size_and_versions_need_no_other_measurement() -> None:
    report = sample_report(n_rows=40)
    report = report.model_copy(update={"latency": report.latency[1:2]})

    def heavier(share: float) -> Report:
        latency = [
            one.model_copy(update={"peak_rss_bytes": round(one.peak_rss_bytes * share)}) for one in report.latency
        ]
        return report.model_copy(update={"latency": latency})

    kinds = [of(compare(report, heavier(share)), "q4-gguf", "memory").kind for share in (1.3, 0.7, 1.03)]
    assert kinds == ["worse", "better", "same"]
    scored = report.model_copy(update={"latency": []})
    newer = [
        one.model_copy(
            update={"subject": one.subject.model_copy(update={"engine_version": "99", "size_bytes": 1_000_000})}
        )
        for one in scored.accuracy
    ]
    manifest = report.artifacts["q4-gguf"]
    made = report.artifacts | {"q4-gguf": manifest | {"versions": {"edgetune": "0.2.0"}}}
    found = compare(scored, scored.model_copy(update={"accuracy": newer, "artifacts": made, "tasks": []}))
    assert of(found, "q4-gguf", "size").kind == "better"
    assert of(found, "q4-gguf", "engine").says == "llama.cpp 0.3.36 to llama.cpp 99"
    assert of(found, "q4-gguf", "made by").says.startswith("edgetune 0.1.0 to 0.2.0, numpy ")
    assert of(found, "q4-gguf", "made by").says.endswith(" to absent")


def test_other_rows_and_other_machines_are_not_compared() -> None:
    report = sample_report()
    moved = report.model_copy(
        update={
            "machine": report.machine.model_copy(update={"cpu": "another"}),
            "accuracy": [found.model_copy(update={"workload": "other"}) for found in report.accuracy],
        }
    )
    found = compare(report, slower(moved, "q4-gguf", 3.0))
    assert of(found, "machine", "machine").kind == "changed"
    assert of(found, "q4-gguf", "answers").kind == "not comparable"
    assert not [one for one in found if one.what.startswith(("ITL", "TTFT"))]


def test_the_interval_of_a_ratio_holds_the_truth() -> None:
    """Ten generations a side, true ratio 1: a 95 % interval misses it in about one of twenty runs."""
    rng = np.random.default_rng(0)
    missed = 0
    for trial in range(200):
        sides = [[rng.normal(10, 1, 8).tolist() for _ in range(10)] for _ in range(2)]
        found = statistics.percentile_ratio(*sides, 50, seed=trial, n_resamples=300)
        missed += not found.low <= 1 <= found.high
    assert missed <= 24


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (2.0, 3)])
def test_the_verb(tmp_path: Path, factor: float, code: int) -> None:
    before = repeated(sample_report())
    for name, report in (("a", before), ("b", slower(before, "q4-gguf", factor))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(dump_report(report), encoding="utf-8")
    done = CliRunner().invoke(app, ["diff", str(tmp_path / "a"), str(tmp_path / "b" / "report.json")])
    assert done.exit_code == code, done.output
