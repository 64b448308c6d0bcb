"""The release gate: the same evidence under other budgets, as exit code, JUnit XML and CSV."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgetune.cli import app
from edgetune.errors import DataError
from edgetune.recipe import Budgets
from edgetune.runtime import gate
from edgetune.runtime.evidence import Report, Verdict
from edgetune.runtime.report.write import dump_report
from tests.conftest import Call
from tests.report_sample import BUDGETS, sample_report


def test_the_run_s_own_budgets_give_its_own_verdicts() -> None:
    report = sample_report()
    again = gate.judge_again(report, Budgets.model_validate(BUDGETS))
    assert [(v.candidate, v.verdict) for v in again.verdicts] == [(v.candidate, v.verdict) for v in report.verdicts]


def test_other_budgets_give_other_verdicts() -> None:
    report = sample_report()
    strict = gate.judge_again(report, Budgets(size_mb=1))
    assert {v.verdict for v in strict.verdicts} == {"do not ship", "failed"}
    lax = gate.judge_again(report, Budgets(size_mb=10_000))
    assert {v.verdict for v in lax.verdicts} == {"ship", "failed"}  # what failed stays failed


def test_a_report_without_its_reference_cannot_judge_accuracy() -> None:
    report = sample_report()
    cut = report.model_copy(update={"accuracy": [a for a in report.accuracy if a.subject.name != report.reference]})
    with pytest.raises(DataError, match="no accuracy of its reference"):
        gate.judge_again(cut, Budgets.model_validate(BUDGETS))


def test_junit_counts_inconclusive_as_a_failure_and_survives_hostile_text() -> None:
    report = sample_report()
    hostile = Verdict(candidate="a\x00<b>&", verdict="failed", checks=[], reason="\x1b[31m]]>")
    root = ET.fromstring(gate.junit(report.model_copy(update={"verdicts": [*report.verdicts, hostile]})))
    suites = root.findall("testsuite")
    assert len(suites) == len(report.verdicts) + 1
    for suite, verdict in zip(suites, report.verdicts, strict=False):
        broken = [check for check in verdict.checks if check.verdict != "ship"]
        assert len(suite.findall("testcase/failure")) == len(broken) == int(suite.get("failures", "-1"))
        assert len(suite.findall("testcase/error")) == (verdict.verdict == "failed")
        assert len(suite.findall("testcase")) == int(suite.get("tests", "-1"))
    assert any(check.verdict == "inconclusive" for v in report.verdicts for check in v.checks)
    assert suites[-1].get("name") == "a\ufffd<b>&"


def test_csv_has_a_line_for_each_figure() -> None:
    rows = list(csv.DictReader(io.StringIO(gate.figures_csv(sample_report()))))
    exact = {row["subject"]: float(row["value"]) for row in rows if row["figure"] == "exact"}
    assert {"reference", "q4-gguf", "q4-onnx"} <= set(exact)
    assert all(0 <= value <= 100 for value in exact.values())
    assert all(row["unit"] and row["source"] for row in rows)


def without_failures() -> Report:
    report = sample_report()
    finished = [verdict for verdict in report.verdicts if verdict.verdict != "failed"]
    return report.model_copy(update={"verdicts": finished, "failures": []})


@pytest.mark.parametrize(
    ("report", "budgets", "code"),
    [
        (without_failures(), "{size_mb: 10000}", 0),
        (without_failures(), "{size_mb: 1, ttft_ms_p95: 10000}", 3),
        (without_failures(), "{size_mb: 10000, ttft_ms_p95: 10000}", 4),  # of ten first tokens none bounds p95
        (without_failures(), "{size_mb: 10000, ttft_ms_p50: 10000}", 0),
        (sample_report(), "{size_mb: 10000}", 1),
        (sample_report(), "{size_mb: 1}", 1),
    ],
)
def test_the_verb_says_a_line_for_each_candidate(report: Report, budgets: str, code: int, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(dump_report(report), encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: r\nbase: b\ndata: {{train: t, heldout: h}}\nbudgets: {budgets}\n"
        "candidates: {q8: {export: {gguf: {type: Q8_0}}}}\n"
    )
    done = CliRunner().invoke(
        app, ["gate", str(tmp_path), "--recipe", str(recipe), "--junit", str(tmp_path / "j.xml"),
              "--csv", str(tmp_path / "f.csv")],
    )  # fmt: skip
    assert done.exit_code == code, done.output
    assert len(done.output.strip().splitlines()) == len(report.verdicts)
    assert (tmp_path / "j.xml").stat().st_size
    assert (tmp_path / "f.csv").stat().st_size


@pytest.mark.parametrize("seed", [0, 7])
def test_the_verb_without_a_recipe_repeats_the_run_s_own_verdicts(tmp_path: Path, seed: int) -> None:
    """Nothing in a verdict is drawn, so neither the seed of the run nor that of the gate can change one."""
    made = without_failures()
    report = made.model_copy(update={"recipe": made.recipe | {"seed": seed}})
    (tmp_path / "report.json").write_text(dump_report(report), encoding="utf-8")
    done = CliRunner().invoke(app, ["gate", str(tmp_path)])
    assert done.exit_code == 3, done.output
    said = [f"{verdict.candidate}: {verdict.verdict}. {verdict.reason}" for verdict in report.verdicts]
    assert done.output.splitlines() == said


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({}, "report.json: budgets of the run: recipe: Input should be a valid dictionary"),
        ({"budgets": {"size_mb": "small"}}, "report.json: budgets of the run: size_mb: Input should be a valid number"),
        ({"budgets": {"size_mb": 9}, "seed": "x"}, "report.json is damaged: its parts do not fit (ValueError: "),
        ({"budgets": {"size_mb": 9}, "bench": 3}, "report.json is damaged: its parts do not fit (AttributeError: "),
    ],
)
def test_a_recipe_that_is_none_is_one_line(recipe: dict[str, object], said: str, call: Call, tmp_path: Path) -> None:
    report = sample_report(n_rows=20).model_copy(update={"recipe": recipe})
    (tmp_path / "report.json").write_text(dump_report(report), encoding="utf-8")
    code, out, err = call("gate", str(tmp_path), "--csv", str(tmp_path / "f.csv"))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "f.csv").exists()


def test_a_report_whose_parts_do_not_fit_is_one_line(call: Call, tmp_path: Path) -> None:
    report = sample_report(n_rows=20)
    tasks = [task.model_copy(update={"kind": "riddles"}) for task in report.tasks]
    (tmp_path / "report.json").write_text(dump_report(report.model_copy(update={"tasks": tasks})), encoding="utf-8")
    for words in (["report", str(tmp_path)], ["diff", str(tmp_path), str(tmp_path)]):
        code, _, err = call(*words)
        assert code == 2
        assert "report.json is damaged: its parts do not fit (KeyError: 'riddles'); write the report again" in err
        assert err.count("\n") == 1
