"""Puts the quickstart's figures into README.md, between `<!-- results -->` and `<!-- /results -->`.

They come from benchmarks/results/quickstart.json, the report.json of a run of recipes/quickstart.yaml. `--check` writes
nothing and exits 1 where README differs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from edgetune.errors import EdgetuneError
from edgetune.runtime.accuracy import summary
from edgetune.runtime.evidence import Report
from edgetune.runtime.report.columns import DASH, number, seconds
from edgetune.runtime.report.timings import Case
from edgetune.runtime.report.view import Row, build_view
from edgetune.runtime.report.write import read_report

ROOT = Path(__file__).resolve().parent.parent
RESULT, README = ROOT / "benchmarks" / "results" / "quickstart.json", ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"
HEADS = (
    "Candidate", "Verdict", "Exact match, %", "Loss, points (interval)", "KL per token, nats", "Size, MB",
    "ITL p50, ms", "Decode speed", "Peak memory, MB",
)  # fmt: skip


def results(report: Report) -> str:
    """Write the table and the lines below it."""
    view = build_view(report)
    length = max(view.cases, default=0)  # every latency figure of the table is that of the longest prompt
    cases = {case.name: case for case in view.cases.get(length, [])}
    yardstick = [row for row in view.yardsticks if row.name == report.reference]
    lines = [f"| {' | '.join(HEADS)} |", f"|---|---|{'---:|' * (len(HEADS) - 2)}"]
    lines += [_line(row, cases, report.reference) for row in (*view.candidates, *yardstick)]
    exact = {found.subject.name: summary(found)["exact_match"] for found in report.accuracy}
    rows = {found.subject.name: len(found.rows) for found in report.accuracy}.get(report.reference, 0)
    said = [
        f"{name} {number(100 * value, 1)} %"
        for name, value in (("base", exact.get("base")), (report.reference, exact.get(report.reference)))
        if value is not None
    ]
    spent = sum(float(stage["seconds"] or 0) for stage in report.stages)
    untimed = sum(stage["seconds"] is None for stage in report.stages)
    before = f" ({untimed} of {len(report.stages)} stages were found in the store)" if untimed else ""
    machine = f"{report.machine.cpu}, {report.machine.cores} cores"
    return "\n".join([
        *lines, "",
        f"Exact match: {', '.join(said)}, on {rows:,} held-out rows. Latency: prompts of {length} tokens.",
        f"Decode speed is relative to the {report.reference} in torch bfloat16 (tokens/s over tokens/s).",
        f"Machine: {machine}. All stages together: {seconds(spent)}{before}.",
    ])  # fmt: skip


def _line(row: Row, cases: dict[str, Case], reference: str) -> str:
    case, against = cases.get(row.name), cases.get(reference)
    itl = case.cells["itl_p50"].text if case and "itl_p50" in case.cells else DASH
    speed = DASH
    if case is not None and against is not None:
        ours, theirs = case.cells["decode"].value, against.cells["decode"].value
        speed = f"{ours / theirs:.2f}×" if ours and theirs else DASH
    loss = row.cells["loss"]
    figures = [
        row.cells["exact"].text, f"{loss.text} ({loss.note})" if loss.note else loss.text, row.cells["kl"].text,
        row.cells["size"].text, itl, speed, row.cells["memory"].text,
    ]  # fmt: skip
    return f"| {' | '.join([row.name, row.verdict or row.role, *figures])} |"


def filled(readme: str, report: Report) -> str:
    """Give the README with the report's figures in it. Raises ValueError where the markers are not there."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the markers {BEGIN} and {END} are not there")
    return f"{head}{BEGIN}\n{results(report)}\n{END}{tail}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fill the result table of README.md.")
    parser.add_argument("--check", action="store_true", help="exit 1 if README differs; write nothing")
    parser.add_argument("--report", type=Path, default=RESULT, help="report.json to read")
    parser.add_argument("--readme", type=Path, default=README, help="file with the two markers")
    args = parser.parse_args(argv)
    if not args.report.is_file():
        print(f"{args.report.name} is not there; run recipes/quickstart.yaml and copy its report.json to {args.report}")
        return 1
    try:
        found = args.readme.read_text(encoding="utf-8")
        wanted = filled(found, read_report(args.report))
    except (EdgetuneError, OSError, ValueError) as error:
        print(f"{args.readme.name}: {error}")
        return 1
    if found == wanted:
        return 0
    if args.check:
        print(f"{args.readme.name} differs from {args.report.name}; run scripts/update_readme.py")
        return 1
    args.readme.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
