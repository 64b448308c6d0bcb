"""Every figure of the report's tables: computed plainly again, with its interval, and traced to its raw samples."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from edgetune.plan import rows_said
from edgetune.recipe import Budgets, Recipe
from edgetune.runtime.diff import compare
from edgetune.runtime.evidence import Report, TextScore
from edgetune.runtime.gate import figures_csv, judge_again
from edgetune.runtime.report import measures, plots
from edgetune.runtime.report.cells import Cell
from edgetune.runtime.report.columns import DASH, number, seconds
from edgetune.runtime.report.html import render_html
from edgetune.runtime.report.view import View, build_view
from edgetune.runtime.report.write import read_report, write_report
from tests.report_sample import sample_report


@pytest.fixture(scope="module")
def report() -> Report:
    return sample_report()


@pytest.fixture(scope="module")
def view(report: Report) -> View:
    return build_view(report)


@pytest.fixture(scope="module")
def paths(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(report, tmp_path_factory.mktemp("report"))


def _walk(raw: Any, source: str) -> None:
    """Follow every path of a source; one that begins with a dot leaves from where the last one's field is."""
    parent = ""
    for path in source.split(", "):
        full = f"{parent}{path}" if path.startswith(".") else path
        parent = full.rpartition(".")[0]
        node = raw
        for part in re.findall(r"artifacts|(?<=artifacts\.)[^.]+|[^.\[\]]+|\[\d*\]", full):
            node = node[int(part[1:-1] or 0)] if part.startswith("[") else node[part]


def test_every_figure_names_raw_samples_that_exist(report: Report, view: View, paths: dict[str, Path]) -> None:
    raw = json.loads(paths["json"].read_text())
    cells = [cell for row in (*view.candidates, *view.yardsticks) for cell in row.cells.values()]
    cases = [case for found in view.cases.values() for case in found]
    cells += [cell for case in cases for cell in case.cells.values()]
    cells += [cell for hop in view.hops for cell in (hop.exact, hop.change, *hop.cells)]
    assert view.slots is not None
    cells += [cell for line in view.slots.lines for cell in line.cells]
    sources = [cell.source for cell in cells if cell.value is not None]
    sources += [check.source for budget in view.budgets for check in budget.checks.values() if check.value is not None]
    sources += [line.source for line in (*view.beside, *view.tasks)]
    sources += [line.loss_source for line in view.tasks if line.loss != DASH]
    assert len(sources) > 300
    assert "accuracy[4].rows[].kl_tokens" in sources
    for source in sources:
        _walk(raw, source)
    page = paths["html"].read_text()
    for source in sources:
        assert f"{source} in report.json" in page


def test_a_hop_names_its_rows_in_the_report_or_in_the_store(report: Report) -> None:
    own = {"student-q4: Q4_K_M": "student-q4"}
    seams = [
        seam.model_copy(update={"evidence": "0a1b2c/accuracy.json", "subject": own.get(seam.hop)})
        for seam in report.seams
    ]
    view = build_view(report.model_copy(update={"seams": seams}))
    last, before = view.hops[-1], view.hops[4]
    assert [cell.source for cell in last.cells] == [f"accuracy[4].rows[].{k}, .n_tokens" for k in
                                                    ("n_correct", "nll", "kl")]  # fmt: skip
    assert {cell.file for cell in last.cells} == {"report.json"}
    assert before.cells[1].source == "rows[].nll, .n_tokens"
    assert before.cells[1].file == "0a1b2c/accuracy.json of the store"
    assert "rows[].nll, .n_tokens in 0a1b2c/accuracy.json of the store" in render_html(view)


def test_slots_are_counted_over_the_rows_whose_answers_were_made() -> None:
    report = sample_report(n_rows=200, generated_rows=80)
    view = build_view(report)
    cell = next(row for row in view.candidates if row.name == "student-q4").cells["slot_f1"]
    rows = next(a for a in report.accuracy if a.subject.name == "student-q4").rows[:80]
    counts = np.array([[r.slot_true_positives, r.slot_predicted, r.slot_gold] for r in rows], dtype=float).sum(0)
    assert cell.value == pytest.approx(200 * counts[0] / (counts[1] + counts[2]))
    assert cell.low < cell.value < cell.high  # type: ignore[operator]
    assert cell.note == f"{cell.low:.1f} to {cell.high:.1f}, 80 rows"
    assert f"{cell.text}<small>{cell.note}</small>" in render_html(view)
    assert view.slots is not None
    assert (view.slots.n_rows, view.slots.n_slots) == (80, 3)
    assert [line.n_gold for line in view.slots.lines] == [80] * 3
    k = view.slots.subjects.index("student-q4")
    by_slot = {line.name: line.cells[k].value for line in view.slots.lines}
    assert set(by_slot) == {"intent", "room", "level"}  # a wrong intent makes all its slots wrong
    assert np.mean([v for v in by_slot.values() if v is not None]) == pytest.approx(cell.value)
    unmade = build_view(sample_report(n_rows=40, generated_rows=0))
    assert unmade.slots is None
    assert 'id="slots"' not in render_html(unmade)


def test_agreement_perplexity_and_divergence_have_intervals(report: Report, view: View) -> None:
    row = next(r for r in view.candidates if r.name == "student-q4")
    score = next(a for a in report.accuracy if a.subject.name == "student-q4")
    assert score.text is not None
    assert row.cells["ppl"].value == pytest.approx(math.exp(sum(score.text.nll) / sum(score.text.n_tokens)))
    for key in ("ppl", "agree", "slot_f1", "alike"):
        cell = row.cells[key]
        assert cell.low < cell.value < cell.high, key  # type: ignore[operator]
    parted = [r.first_divergence + 1 for r in score.rows if r.first_divergence is not None]
    assert row.cells["alike"].value == pytest.approx(100 * (1 - len(parted) / len(score.rows)))
    assert row.cells["parts_at"].value == np.median(parted)
    assert row.cells["parts_at"].note.endswith(f"{len(parted)} rows")


def test_few_texts_have_a_perplexity_and_no_interval(report: Report) -> None:
    def cell(n: int) -> Cell:
        texts = TextScore(nll=[600.0 + i for i in range(n)], n_tokens=[200] * n)
        cut = [one.model_copy(update={"text": texts}) for one in report.accuracy]
        return build_view(report.model_copy(update={"accuracy": cut})).yardsticks[0].cells["ppl"]

    assert (cell(19).low, cell(19).high, cell(19).note) == (None, None, "")
    assert cell(4).value == pytest.approx(math.exp(601.5 / 200))
    assert cell(20).low < cell(20).value < cell(20).high  # type: ignore[operator]


def test_a_budget_that_allows_no_loss_is_planned_and_shown(report: Report) -> None:
    strict = {"accuracy": {"metric": "exact_match", "max_loss": 0.0, "confidence": 0.95}}
    said = build_view(report.model_copy(update={"recipe": report.recipe | {"budgets": strict}})).method
    (rows,) = [line for line in said if "rows can" in line]
    assert rows.startswith("500 rows cannot show a loss of at most 1 point; ")
    assert "of at most 0 points" not in rows
    data, candidates = {"train": "t", "heldout": "h"}, {"q8": {"export": {"gguf": {"type": "Q8_0"}}}}
    recipe = {"name": "r", "base": "b", "data": data, "candidates": candidates, "budgets": strict}
    assert rows_said(Recipe.model_validate(recipe)) is None


def test_the_lead_says_what_is_judged(report: Report) -> None:
    def lead(accuracy: dict[str, Any] | None) -> str:
        return build_view(report.model_copy(update={"recipe": {"budgets": {"accuracy": accuracy}}})).lead

    held_out = "Judged against reference on 500 held-out rows, with the files that would ship."
    assert lead({"metric": "slot_f1"}).endswith(held_out)
    of_a_task = "Judged by accuracy of task moods against reference on 60 rows, with the files that would ship."
    assert lead({"task": "moods", "metric": "accuracy"}).endswith(of_a_task)
    assert lead(None).endswith(". No budget judges accuracy.")


def test_a_task_of_one_text_has_no_bounds_on_the_page(report: Report, tmp_path: Path) -> None:
    cut = [task.model_copy(update={"rows": task.rows[:1]}) for task in report.tasks]
    budgets = Budgets.model_validate({"accuracy": {"task": "manual", "metric": "perplexity", "max_loss": 0.05}})
    judged = judge_again(report.model_copy(update={"tasks": cut}), budgets)
    view = build_view(judged)
    lines = [line for line in view.tasks if line.task == "manual" and line.subject != "reference"]
    assert {line.bounds for line in lines} == {DASH}
    (budget,) = view.budgets
    assert {check.interval for check in budget.checks.values()} == {""}
    assert budget.limit == "at most 5 %"
    paths = write_report(judged, tmp_path)
    assert read_report(paths["json"]) == judged
    without = build_view(report.model_copy(update={"tasks": cut}))  # no verdict has bounds of it
    assert {line.bounds for line in without.tasks if line.task == "manual"} == {DASH}
    later = judged.model_copy(update={"tasks": [t.model_copy(update={"figures": t.figures}) for t in cut]})
    assert any(one.says.endswith("(no bound)") for one in compare(judged, later))
    assert {line.split(",")[3] for line in figures_csv(judged).splitlines()} > {"exact", "ppl"}


def test_latency_has_every_percentile_and_load_apart_from_the_first_run(report: Report, view: View) -> None:
    timed = next(one for one in report.latency if one.subject.name == "q4-onnx")
    case = next(case for case in view.cases[256] if case.name == "q4-onnx")
    kept = [g for g in timed.cases[1].generations if not g.warmup]
    samples = {"TTFT": [g.ttft_ms for g in kept], "ITL": [x for g in kept for x in g.itl_ms],
               "TPOT": [float(np.mean(g.itl_ms)) for g in kept]}  # fmt: skip
    assert [line.title for line in case.lines] == list(samples)
    for line in case.lines:
        assert line.n_samples == len(samples[line.title])
        found = [cell.value for cell in line.percentiles]
        assert found == pytest.approx([np.percentile(samples[line.title], q) for q in (50, 90, 95, 99)])
        assert all(cell.note for cell in line.percentiles)
    assert (case.cells["load"].value, case.cells["first_run"].value) == (timed.load_ms, timed.first_run_ms)
    assert [line.rate_of for line in case.lines] == ["prefill", "decode", ""]
    row = next(r for r in view.candidates if r.name == "q4-onnx")
    assert row.cells["first_run"].value == timed.first_run_ms
    assert row.cells["tpot_p99"].value == case.lines[2].percentiles[3].value


def test_a_candidate_on_another_device_than_the_reference_is_noted(report: Report, view: View) -> None:
    def moved(name: str) -> Report:
        latency = [
            one.model_copy(update={"subject": one.subject.model_copy(update={"settings": {"device": "cuda"}})})
            if one.subject.name == name else one
            for one in report.latency
        ]  # fmt: skip
        return report.model_copy(update={"latency": latency})

    said = "timed on a GPU, but reference on the CPU: their times compare devices too"
    assert [name for name, text in build_view(moved("q4-onnx")).notes if text == said] == ["q4-onnx"]
    assert not [text for _, text in view.notes if "devices" in text]


@pytest.mark.parametrize(
    ("value", "digits", "signed", "text"),
    [(-0.004, 2, True, "0.00"), (1234.5, 1, False, "1,234.5"), (-3.2, 1, True, "−3.2"), (None, 1, False, "–"),
     (float("nan"), 1, False, "–"), (0.26, 1, True, "+0.3")],
)  # fmt: skip
def test_numbers(value: float | None, digits: int, signed: bool, text: str) -> None:
    assert number(value, digits, signed=signed) == text


def test_durations() -> None:
    assert [seconds(x) for x in (4.2, 725, 3780)] == ["4.2 s", "12 min 05 s", "1 h 03 min"]


def test_ticks_are_round_and_inside() -> None:
    assert plots.ticks(-1.2, 11, 6) == [0, 2, 4, 6, 8, 10]
    assert plots.ticks(0, 0.031, 3) == pytest.approx([0, 0.01, 0.02, 0.03])
    assert plots.ticks(3, 3, 5) == [3]


def test_no_name_lies_over_the_budget_s() -> None:
    points = [plots.Point("reference", "", 270, 0, 0, 0), plots.Point("here", "ship", 268, 2.0, 1.2, 2.8)]
    drawn = plots.scatter(points, title="Size", unit="MB", x_limit=None, y_limit=2)
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" (?:text-anchor="(\w+)")?[^>]*>(here|loss budget)<', drawn)
    assert len(found) == 4  # wide and narrow
    for budget, here in (found[:2], found[2:]):
        assert (budget[3], here[3]) == ("loss budget", "here")
        apart = abs(float(budget[1]) - float(here[1])) > 10
        assert apart or (here[2] == "end" and float(here[0]) < float(budget[0]) - 66)


def test_pareto_front_holds_what_nothing_beats() -> None:
    points = [
        plots.Point(str(i), "ship", x, y, y, y) for i, (x, y) in enumerate([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1)])
    ]
    assert [p.name for p in plots.front(points)] == ["0", "1", "4"]


def test_bits_per_weight_comes_from_the_scheme() -> None:
    assert measures.bits_per_weight({"scheme": {"bits_per_weight": 4.5}}) == 4.5
    assert measures.bits_per_weight({"scheme": None, "notes": {}}) is None


@pytest.mark.parametrize(("right", "n"), [(0, 50), (5, 50), (45, 50), (50, 50)])
def test_a_share_of_rows_has_wilsons_interval(right: int, n: int) -> None:
    found = measures.share_interval(right, n)
    wilson = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert found[:3] == pytest.approx((100 * right / n, 100 * wilson.low, 100 * wilson.high))
