"""The report: its figures, its three files, that hostile text does nothing, and the page in a browser."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from edgetune.errors import ArtifactError
from edgetune.runtime.evidence import Report, RowText
from edgetune.runtime.report import measures
from edgetune.runtime.report.columns import COLUMNS, DASH, number
from edgetune.runtime.report.html import render_html, shown
from edgetune.runtime.report.markdown import ICONS, STYLES, console_table, render_markdown
from edgetune.runtime.report.view import VERDICTS, View, build_view
from edgetune.runtime.report.write import json_schema, read_report, write_report
from edgetune.runtime.statistics import flips, holm_adjusted, paired_difference_bounds
from tests.report_sample import HOSTILE, sample_report


@pytest.fixture(scope="module")
def report() -> Report:
    return sample_report()


@pytest.fixture(scope="module")
def view(report: Report) -> View:
    return build_view(report)


@pytest.fixture(scope="module")
def paths(report: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_report(report, tmp_path_factory.mktemp("report"))


class Page(HTMLParser):
    """Collects elements, and what a browser would load or follow."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[tuple[str, str]] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [(tag, v or "") for k, v in attrs if k in {"src", "href", "action", "data", "srcset"}]
        self.handlers += [k for k, _ in attrs if k.startswith("on") or k == "style"]
        self.ids += [v or "" for k, v in attrs if k == "id"]


def test_figures_agree_with_a_plain_computation(report: Report, view: View) -> None:
    row = next(r for r in view.candidates if r.name == "q4-onnx")
    mine = next(a for a in report.accuracy if a.subject.name == "q4-onnx").rows
    ref = next(a for a in report.accuracy if a.subject.name == "reference").rows
    n_tokens = sum(r.n_tokens for r in mine)
    assert row.cells["exact"].value == pytest.approx(np.mean([r.exact for r in mine]) * 100)
    lost = np.mean([r.exact for r in ref]) - np.mean([m.exact for m in mine])
    assert row.cells["loss"].value == pytest.approx(lost * 100)
    assert row.cells["harmful"].value == sum(r.exact and not m.exact for m, r in zip(mine, ref, strict=True))
    assert row.cells["kl"].value == pytest.approx(sum(r.kl or 0 for r in mine) / n_tokens)
    speed = next(x for x in report.latency if x.subject.name == "q4-onnx")
    case = next(c for c in speed.cases if c.prompt_tokens == 256)
    kept = [g for g in case.generations if not g.warmup]
    waits = np.concatenate([g.itl_ms for g in kept])
    assert row.cells["itl_p95"].value == pytest.approx(np.percentile(waits, 95))
    assert row.cells["decode"].value == pytest.approx(1000 / waits.mean())
    assert row.cells["prefill"].value == pytest.approx(256_000 / np.median([g.ttft_ms for g in kept]))
    assert row.cells["memory"].value == speed.peak_rss_bytes / 1e6


def test_page_and_verdict_show_the_same_numbers(report: Report, view: View) -> None:
    keys = {"exact_match loss": ("loss", 100), "itl_ms p95": ("itl_p95", 1), "ttft_ms p50": ("ttft_p50", 1),
            "size_mb": ("size", 1), "peak_memory_mb": ("memory", 1)}  # fmt: skip
    seen = 0
    for verdict in report.verdicts:
        row = next(r for r in view.candidates if r.name == verdict.candidate)
        for check in (c for c in verdict.checks if c.value is not None):
            key, factor = keys[check.budget]
            cell = row.cells[key]
            assert cell.value == pytest.approx(check.value * factor)
            if key == "loss":  # of a percentile the table shows the spread, the verdict its bounds
                assert (cell.low, cell.high) == pytest.approx((check.low * 100, check.high * 100))
            seen += 1
    assert seen == 15


def test_a_loss_without_a_verdict_has_bounds_too(view: View) -> None:
    loss = next(r for r in view.yardsticks if r.name == "base").cells["loss"]
    assert loss.value is not None
    assert loss.low is not None
    assert loss.high is not None
    assert loss.low < loss.value < loss.high


def test_rows_are_ordered_by_verdict_and_headline_says_it(report: Report, view: View) -> None:
    assert [row.verdict for row in view.candidates] == [v for v in VERDICTS if v != "built, not run"]
    assert set(ICONS) == set(STYLES) == set(VERDICTS)
    assert [row.role for row in view.yardsticks] == ["reference", "base"]
    assert view.headline == "Ship q4-gguf"
    undecided = [v for v in report.verdicts if v.verdict != "ship"]
    assert build_view(report.model_copy(update={"verdicts": undecided})).headline.startswith("Inconclusive")
    none = [v for v in report.verdicts if v.verdict in {"failed", "do not ship"}]
    assert build_view(report.model_copy(update={"verdicts": none})).headline == "Do not ship"


def test_page_holds_everything_that_the_evidence_says(report: Report, paths: dict[str, Path]) -> None:
    page = paths["html"].read_text()
    for verdict in report.verdicts:
        assert verdict.candidate in page
        assert str(shown(verdict.reason)) in page
    fallback = "damp_percent 0.01 raised to 0.02"
    titles = [c.title for c in COLUMNS]
    warnings = [str(shown(w)) for w in report.warnings]
    engines = [s.engine for s in report.seams]
    for text in (*engines, *titles, *warnings, report.machine.cpu, fallback, "the machine was busy"):
        assert text in page
    assert 'aria-sort="ascending"' in page
    assert "21 min 24 s" in page


def test_what_training_noted_by_step_is_drawn(view: View, paths: dict[str, Path]) -> None:
    titles = [title for title, _ in view.training_curves]
    assert titles == [
        "Learning rate",
        "Tokens a second",
        "Preference training: Reward margin, chosen less rejected",
    ]
    page = paths["html"].read_text()
    for title in titles:
        assert f"<summary>{title}</summary>" in page
    assert "Learning rate over optimizer steps. In training it goes from 0.000983 to 0." in page


def test_lines_that_stand_aside_change_nothing_on_the_way(report: Report) -> None:
    plain = [(hop.name, hop.change.text) for hop in build_view(report).hops]
    tried = report.seams[0].model_copy(update={"hop": "on rows set aside: base4", "exact_match": 0.1, "aside": True})
    hops = build_view(report.model_copy(update={"seams": [tried, *report.seams]})).hops
    assert (hops[0].name, hops[0].change.text) == ("on rows set aside: base4", DASH)
    assert [(hop.name, hop.change.text) for hop in hops[1:]] == plain


def test_page_is_self_contained_and_hostile_text_does_nothing(paths: dict[str, Path]) -> None:
    text = paths["html"].read_text()
    page = Page(text)
    assert page.tags.count("script") == 1
    assert not {"img", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert {href for tag, href in page.links if tag == "a" and not href.startswith("#")} == {"report.json"}
    assert all(tag == "a" for tag, _ in page.links)
    assert page.handlers == []
    assert len(page.ids) == len(set(page.ids))
    assert HOSTILE not in text
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in text
    assert "\u202e" not in text
    assert "default-src &#39;none&#39;" in text
    assert not re.search(r"@import|url\(|unsafe-inline", text)


def test_hostile_names_do_nothing_anywhere(report: Report) -> None:
    hostile = report.model_copy(
        update={
            "name": HOSTILE, "warnings": [HOSTILE], "training": {"method": HOSTILE, HOSTILE: HOSTILE},
            "seams": [s.model_copy(update={"hop": HOSTILE, "engine": HOSTILE}) for s in report.seams],
            "verdicts": [v.model_copy(update={"candidate": HOSTILE, "reason": HOSTILE}) for v in report.verdicts[:1]],
            "machine": report.machine.model_copy(update={"cpu": HOSTILE, "gpu": HOSTILE}),
            "texts": [RowText(prompt=HOSTILE, gold=HOSTILE)] * 500,
        }
    )  # fmt: skip
    view = build_view(hostile)
    page = Page(render_html(view))
    assert page.tags.count("script") == 1
    assert "img" not in page.tags
    assert page.handlers == []
    assert "<script" not in render_markdown(view)


def test_an_empty_report_renders(report: Report) -> None:
    empty = report.model_copy(
        update={key: [] for key in ("accuracy", "latency", "seams", "verdicts", "failures", "warnings", "stages")}
        | {"artifacts": {}, "commands": {}, "training": None, "recipe": {}}
    )
    view = build_view(empty)
    assert "Nothing is recorded as failed" in render_html(view)
    assert render_markdown(view).startswith("## Do not ship")
    assert console_table(empty).row_count == 0


def test_rows_that_are_not_the_reference_s_give_no_loss(report: Report) -> None:
    other = [a.model_copy(update={"workload": "x"}) if a.subject.name == "q4-gguf" else a for a in report.accuracy]
    view = build_view(report.model_copy(update={"accuracy": other}))
    assert next(r for r in view.candidates if r.name == "q4-gguf").cells["harmful"].text == "–"
    assert ("q4-gguf", "scored on other rows than the reference: no loss, no flips") in view.notes


def test_changed_answers_come_worst_first_and_mark_where_they_part(report: Report, view: View) -> None:
    changes = next(c for c in view.changes if c.candidate == "student-q4")
    rows = {a.subject.name: a.rows for a in report.accuracy}
    risen = [rows["student-q4"][c.row].nll - rows["reference"][c.row].nll for c in changes.shown]
    assert risen == sorted(risen, reverse=True)
    assert all(c.reference == "same as gold" for c in changes.shown)
    assert all(c.candidate[: c.split] == c.gold[: c.split] for c in changes.shown)


def test_what_was_forgotten_is_shown_with_its_interval_and_flips(
    report: Report, view: View, paths: dict[str, Path]
) -> None:
    text, probe = view.forgetting
    before, after = (measures.perplexity(next(a for a in report.accuracy if a.subject.name == name))
                     for name in ("base", "reference"))  # fmt: skip
    assert before is not None
    assert after is not None
    assert (text.before, text.after) == (number(before, 2), number(after, 2))
    assert text.change == f"{number(100 * (after / before - 1), 1, signed=True)} %"
    assert (probe.over, probe.before, probe.after) == ("40 general questions", "75.0 %", "70.0 %")
    assert probe.flips == "4 turned wrong, 2 turned right, p = 0.688"  # by hand: 2 * (1 + 6 + 15) / 64
    bounds = paired_difference_bounds(4, 2, 40, 0.975)
    assert probe.change == f"{number(-5, 1, signed=True)} points"
    assert probe.interval == " to ".join(number(-100 * x, 1, signed=True) for x in (bounds.high, bounds.low))
    assert bounds.low < 0 < bounds.high
    for said in (text.change, probe.flips, probe.interval, "What was forgotten"):
        assert said in paths["html"].read_text()
        assert said in paths["md"].read_text()
    other = report.probe[1].model_copy(update={"workload": "other"})
    without = build_view(report.model_copy(update={"probe": [report.probe[0], other]}))
    assert [line.measure for line in without.forgetting] == ["Perplexity"]
    assert build_view(report.model_copy(update={"training": None})).forgetting == []


def test_tasks_have_figures_losses_and_worst_rows(report: Report, view: View, paths: dict[str, Path]) -> None:
    lines = {(line.task, line.subject): line for line in view.tasks}
    assert [line.task for line in view.tasks] == ["moods"] * 4 + ["manual"] * 4
    found = lines["moods", "q4-gguf"]
    assert found.loss.endswith(" points")
    assert lines["moods", "reference"].loss == DASH
    assert lines["manual", "q4-gguf"].loss.endswith(" %")
    i = next(i for i, task in enumerate(report.tasks) if (task.task, task.subject.name) == ("moods", "q4-gguf"))
    assert found.figure == f"{report.tasks[i].figures['accuracy'] * 100:.1f} %"
    assert found.source == f"tasks[{i}].rows[].scores.accuracy"
    assert all(worst.reference == "glad" for worst in view.worst_rows)
    assert {worst.task for worst in view.worst_rows} == {"moods"}
    page, summary = paths["html"].read_text(), paths["md"].read_text()
    assert 'href="#tasks"' in page
    assert f"| moods | 60 | Accuracy | q4-gguf | {found.figure} | {found.loss} | {found.bounds} |" in summary
    assert 'id="tasks"' not in render_html(build_view(report.model_copy(update={"tasks": []})))


def test_flips_have_a_corrected_p_value(report: Report, view: View) -> None:
    exact = {score.subject.name: [row.exact for row in score.rows] for score in report.accuracy}
    p_values = [flips(exact[name], exact["reference"]).p_value for name in ("student-q4", "q4-gguf", "q4-onnx")]
    shown = [next(r for r in view.candidates if r.name == n).cells["mcnemar"].value for n in
             ("student-q4", "q4-gguf", "q4-onnx")]  # fmt: skip
    assert shown == holm_adjusted(p_values)
    assert any("Holm's correction" in line for line in view.method)
    assert any("rows cannot show a loss of at most 1 point" in line for line in view.method)


def test_ledger_branches_leave_the_trunk(view: View) -> None:
    hops = view.hops
    trunk = next(h for h in hops if h.name == "merged")
    firsts = [next(h for h in hops if h.branch == b) for b in ("q4-gguf", "q4-onnx", "student-q4")]
    assert [h.before for h in firsts] == [trunk.exact.value] * 3
    assert hops[5].before == hops[4].exact.value


def test_a_hop_has_the_interval_of_its_change(report: Report, view: View, paths: dict[str, Path]) -> None:
    rows = {seam.hop: np.array([row == "1" for row in seam.exact_rows or ""]) for seam in report.seams}
    now, was = rows["student-q4: Q4_K_M"], rows["merged"]
    harmful, beneficial = int((was & ~now).sum()), int((now & ~was).sum())
    bounds = paired_difference_bounds(harmful, beneficial, len(now), 0.975)
    hop = view.hops[-1]
    assert hop.change.value == pytest.approx(100 * (now.mean() - was.mean()))
    assert (hop.change.low, hop.change.high) == pytest.approx((-100 * bounds.high, -100 * bounds.low))
    assert hop.exact.low < hop.exact.value < hop.exact.high  # type: ignore[operator]
    assert hop.change.source == "seams[6].exact_rows"
    assert any("from hop to hop" in line for line in view.method)
    assert json.loads(paths["json"].read_text())["seams"][6]["exact_rows"] == report.seams[6].exact_rows
    assert f"{hop.change.text} ({hop.change.note})" in paths["md"].read_text()
    bars = re.findall(r'class="hop".*?</svg>|<svg[^>]*class="hop".*?</svg>', paths["html"].read_text())
    assert ["whisker" in bar for bar in bars] == [False] + [True] * 6
    earlier = [seam.model_copy(update={"exact_rows": None}) for seam in report.seams]
    hops = build_view(report.model_copy(update={"seams": earlier})).hops
    assert [(h.change.value, h.change.low) for h in hops[1:]] == [(h.change.value, None) for h in view.hops[1:]]


def test_json_goes_round_and_keeps_every_sample(report: Report, paths: dict[str, Path]) -> None:
    assert read_report(paths["json"]) == report
    assert json_schema()["properties"]["schema_version"]["const"] == 1
    assert json.loads(paths["json"].read_text())["schema_version"] == 1


def test_a_figure_that_is_not_finite_goes_round(report: Report, tmp_path: Path) -> None:
    first, *rest = report.accuracy
    broken = first.model_copy(
        update={"rows": [r.model_copy(update={"nll": math.inf, "kl": math.nan}) for r in first.rows]}
    )
    paths = write_report(report.model_copy(update={"accuracy": [broken, *rest]}), tmp_path)
    json.loads(paths["json"].read_text(), parse_constant=lambda c: pytest.fail(f"not standard JSON: {c}"))
    row = read_report(paths["json"]).accuracy[0].rows[0]
    assert math.isinf(row.nll)
    assert row.kl is not None
    assert math.isnan(row.kl)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "schema_version None"),
        ('{"schema_version": 2}', "this edgetune reads 1"),
        ('{"schema_version": 1}', "is damaged at name"),
        ("\ufeff", "is not JSON"),
    ],
)
def test_a_damaged_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=said) as caught:
        read_report(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_report(tmp_path / "report.json")


def test_markdown_has_verdicts_reasons_ledger_and_machine(report: Report, paths: dict[str, Path]) -> None:
    text = paths["md"].read_text()
    assert text.startswith("## Ship q4-gguf\n")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in tables} == {8, 6, 5}
    for verdict in report.verdicts:
        assert f"**{verdict.candidate}**" in text
    assert "student-q4: Q4\\_K\\_M" in text
    assert report.machine.cpu in text


def test_console_table(report: Report) -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
    console.print(console_table(report))
    text = console.export_text()
    assert "Ship q4-gguf" in text
    assert "inconclusive" in text
    assert "do not ship" in text


def test_what_holds_of_several_is_noted_once(report: Report) -> None:
    busy = report.latency[1].load.model_copy(update={"busy": True, "others_during": 0.4})
    timed = [one.model_copy(update={"load": busy}) for one in report.latency]
    notes = build_view(report.model_copy(update={"latency": timed, "warnings": ["a", "a", "b"]})).notes
    said = "the machine was busy during latency: other processes held 40 % of it"
    assert [subject for subject, text in notes if text == said] == ["reference, q4-gguf, q4-onnx, student-q4"]
    assert [text for subject, text in notes if not subject] == ["a", "b"]
