"""The report's part on what compression left of the fine-tune."""

from __future__ import annotations

from edgetune.runtime.evidence import UpdateLeft
from edgetune.runtime.report.columns import DASH
from edgetune.runtime.report.html import render_html
from edgetune.runtime.report.kept import kept
from edgetune.runtime.report.markdown import render_markdown
from edgetune.runtime.report.view import build_view
from tests.report_sample import sample_report


def test_each_candidate_stands_between_the_base_and_the_trained_model() -> None:
    updates = [UpdateLeft(candidate="q4-onnx", layers={"a": 0.5, "b": 0.9})]
    report = sample_report().model_copy(update={"updates": updates})
    of = {found.subject.name: found for found in report.accuracy}

    def away(name: str) -> float:
        return sum(row.kl or 0 for row in of[name].rows) / sum(row.n_tokens for row in of[name].rows)

    lines = {line.candidate: line for line in kept(report)}
    assert list(lines) == [v.candidate for v in report.verdicts if v.candidate in of]
    line = lines["q4-onnx"]
    assert line.left == f"{100 * (1 - away('q4-onnx') / away('base')):.1f} %"
    assert (line.small, line.worst) == ("70.0 %", "b: 90.0 %")
    assert lines["q4-gguf"].small == DASH
    view = build_view(report)
    assert "**What of the fine-tune is left**" in render_markdown(view)
    assert "b: 90.0 %" in render_html(view)


def test_a_recipe_that_trains_nothing_has_no_such_part() -> None:
    assert not list(kept(sample_report().model_copy(update={"training": None})))
