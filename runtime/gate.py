"""The release gate: a report's evidence held against budgets again, and the answer in forms that a CI reads."""

from __future__ import annotations

import csv
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

from edgetune.errors import DataError
from edgetune.recipe import Budgets
from edgetune.runtime.evidence import Report, Verdict
from edgetune.runtime.report.view import build_view
from edgetune.runtime.verdict import Scored, accuracy_levels, judge, tasks_of

_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML 1.0 forbids


def judge_again(report: Report, budgets: Budgets) -> Report:
    """Give the same evidence with verdicts by other budgets. Nothing is measured.

    Raises DataError where the report has no candidate, or lacks the reference that an accuracy budget needs.
    """
    accuracy = {found.subject.name: found for found in report.accuracy}
    latency = {found.subject.name: found for found in report.latency}
    candidates = [verdict.candidate for verdict in report.verdicts]
    not_run = {verdict.candidate: verdict.reason for verdict in report.verdicts if verdict.verdict == "built, not run"}
    if not candidates:
        raise DataError(f"report {report.name!r} has no candidate to judge")
    if budgets.accuracy is not None and report.reference not in accuracy:
        raise DataError(f"report {report.name!r} has no accuracy of its reference {report.reference!r}")
    tasks = {name: tasks_of(report, name) for name in (report.reference, *candidates)}
    scored = {name: Scored(accuracy.get(name), tasks[name]) for name in tasks}
    levels = accuracy_levels(budgets, {name: scored[name] for name in candidates}, scored[report.reference])
    verdicts: list[Verdict] = []
    for name in candidates:
        measured = [found.subject.size_bytes for found in (accuracy.get(name), latency.get(name)) if found]
        verdicts.append(
            judge(
                name, budgets, size_bytes=measured[0] if measured else None, accuracy=accuracy.get(name),
                reference=accuracy.get(report.reference), tasks=tasks[name], reference_tasks=tasks[report.reference],
                level=levels[name], latency=latency.get(name),
                failures=[failure for failure in report.failures if failure.subject == name],
                not_run=not_run.get(name),
            )
        )  # fmt: skip
    recipe = report.recipe | {"budgets": budgets.model_dump(mode="json")}
    return report.model_copy(update={"verdicts": verdicts, "recipe": recipe})


def junit(report: Report) -> str:
    """Write the verdicts as JUnit XML: a suite for each candidate, a case for each budget.

    Over a budget is a failure, and so are inconclusive and "built, not run", which are never a pass; a candidate that
    failed is an error.
    """
    root = ET.Element("testsuites", name=_text(f"edgetune {report.name}"))
    for verdict in report.verdicts:
        broken = [check for check in verdict.checks if check.verdict != "ship"]
        failed, not_run = verdict.verdict == "failed", verdict.verdict == "built, not run"
        suite = ET.SubElement(
            root, "testsuite", name=_text(verdict.candidate), tests=str(len(verdict.checks) + failed + not_run),
            failures=str(len(broken) + not_run), errors=str(int(failed)),
        )  # fmt: skip
        for check in verdict.checks:
            case = ET.SubElement(suite, "testcase", classname=_text(verdict.candidate), name=_text(check.budget))
            if check.verdict != "ship":
                ET.SubElement(case, "failure", type=check.verdict, message=_text(check.reason))
        if failed or not_run:
            case = ET.SubElement(suite, "testcase", classname=_text(verdict.candidate), name="run")
            kind = "error" if failed else "failure"
            ET.SubElement(case, kind, type=verdict.verdict, message=_text(verdict.reason))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def figures_csv(report: Report) -> str:
    """Write every figure of every subject as CSV, one a line: value, interval, unit, and its place in report.json."""
    view = build_view(report)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["subject", "role", "verdict", "figure", "value", "low", "high", "unit", "source"])
    for row in (*view.candidates, *view.yardsticks):
        for column in view.columns:
            cell = row.cells[column.key]
            if cell.value is not None:
                figures = [cell.value, cell.low, cell.high]
                writer.writerow(
                    [row.name, row.role, row.verdict, column.key, *figures, column.unit, cell.source or column.source]
                )
    return stream.getvalue()


def report_file(path: Path) -> Path:
    """Give the report.json that a path means: the file itself, or that of a run's folder."""
    return path / "report.json" if path.is_dir() else path


def _text(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
