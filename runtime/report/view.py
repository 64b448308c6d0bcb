"""The view model: what a report shows, as strings and numbers that know where they came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from edgetune.runtime.evidence import Accuracy, Check, Latency, Report, RowScore, RowText, Subject
from edgetune.runtime.report import background, beside, ledger, measures, timings
from edgetune.runtime.report.cells import Cell, column_cell, column_cells
from edgetune.runtime.report.columns import COLUMNS, Column, budget, interval_text, number
from edgetune.runtime.report.forgetting import Forgetting, forgetting
from edgetune.runtime.report.kept import Kept, kept
from edgetune.runtime.report.slots import SlotTable, slot_table
from edgetune.runtime.report.tasks import TaskLine, WorstRow, task_lines, worst_rows
from edgetune.runtime.verdict import tasks_of

VERDICTS = ("ship", "inconclusive", "built, not run", "do not ship", "failed")  # the order of rows
N_CHANGES = 5  # changed answers that the page shows of each candidate


@dataclass(frozen=True)
class Row:
    """One subject of the table."""

    name: str
    role: str  # "candidate", "reference" or "base"
    verdict: str  # empty for reference and base
    engine: str
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Budgeted:
    """One budget of one candidate, in the unit of its heading."""

    text: str
    interval: str
    verdict: str
    reason: str
    value: float | None
    low: float | None
    high: float | None
    limit: float
    source: str


@dataclass(frozen=True)
class BudgetColumn:
    column: str  # key of the column that it bounds, or empty
    title: str
    limit: str
    bound: float
    checks: dict[str, Budgeted]  # candidate -> check


@dataclass(frozen=True)
class Decision:
    candidate: str
    verdict: str
    reason: str


@dataclass(frozen=True)
class Change:
    """A row whose answer changed."""

    row: int
    kind: str
    prompt: str
    gold: str
    reference: str
    candidate: str
    split: int  # characters that gold and candidate share at their start
    nll: str


@dataclass(frozen=True)
class Changes:
    candidate: str
    harmful: int
    beneficial: int
    shown: list[Change]


@dataclass(frozen=True)
class View:
    name: str
    edgetune: str
    headline: str
    lead: str
    decisions: list[Decision]
    budgets: list[BudgetColumn]
    candidates: list[Row]
    yardsticks: list[Row]  # reference and base
    cases: dict[int, list[timings.Case]]  # prompt tokens -> one case of each subject
    hops: list[ledger.Hop]
    slots: SlotTable | None
    changes: list[Changes]
    forgetting: list[Forgetting]
    kept: list[Kept]
    tasks: list[TaskLine]
    worst_rows: list[WorstRow]
    training: list[tuple[float, float]]
    heldout: list[tuple[float, float]]
    training_curves: list[tuple[str, list[tuple[float, float]]]]
    training_facts: list[tuple[str, str]]
    machine: list[tuple[str, str]]
    method: list[str]
    stages: list[tuple[str, str, str, str]]
    commands: dict[str, list[str]]
    notes: list[tuple[str, str]]  # subject, what fell back, failed or is to be known
    beside: list[beside.Line]
    columns: tuple[Column, ...] = field(default=COLUMNS)

    def bound(self, key: str) -> float | None:
        """Give the budget of a column, in the column's unit."""
        return next((b.bound for b in self.budgets if b.column == key), None)


def build_view(report: Report) -> View:
    """Turn evidence into what is shown."""
    order = sorted(report.verdicts, key=lambda v: VERDICTS.index(v.verdict))
    names = [v.candidate for v in order]
    decisions = [Decision(v.candidate, v.verdict, v.reason) for v in order]
    scores = {a.subject.name: (i, a) for i, a in enumerate(report.accuracy)}
    speeds = {x.subject.name: (i, x) for i, x in enumerate(report.latency)}
    verdict_of = {v.candidate: v.verdict for v in order}
    plain = [n for n in (report.reference, *scores, *speeds) if n not in verdict_of]
    timed = [[measures.case_figures(case) for case in x.cases] for x in report.latency]
    rows = [
        _row(report, name, verdict_of.get(name, ""), scores, speeds, timed) for name in (*names, *dict.fromkeys(plain))
    ]
    p_values = measures.mcnemar(report)
    for row in rows:
        if row.name in p_values:
            found = measures.Figure(p_values[row.name])
            row.cells["mcnemar"] = column_cell("mcnemar", found, f"accuracy[{scores[row.name][0]}]")
    tasks = list(task_lines(report))
    return View(
        name=report.name,
        edgetune=report.edgetune,
        headline=_headline(decisions),
        lead=_lead(report, scores),
        decisions=decisions,
        budgets=_budgets(report, rows[: len(names)], tasks),
        candidates=rows[: len(names)],
        yardsticks=[row for row in rows[len(names) :] if any(c.value is not None for c in row.cells.values())],
        cases=timings.cases(report, [*names, *dict.fromkeys(plain)], timed),
        hops=list(ledger.hops(report, set(names))),
        slots=slot_table(report, names),
        changes=list(_changes(report, names, report.texts)),
        forgetting=list(forgetting(report)),
        kept=list(kept(report)),
        tasks=tasks,
        worst_rows=list(worst_rows(report)),
        training=background.curve(report.training, "loss"),
        heldout=background.curve(report.training, "heldout_loss"),
        training_curves=background.curves(report.training),
        training_facts=background.facts(report.training),
        machine=background.machine_facts(report.machine),
        method=background.method(report),
        stages=[background.stage_line(stage) for stage in report.stages],
        commands={name: report.commands[name] for name in names if report.commands.get(name)},
        notes=list(background.notes(report, scores)),
        beside=list(beside.lines(report)),
    )


def _seed(report: Report) -> int:
    return int(report.recipe.get("seed") or 0)


def _headline(decisions: list[Decision]) -> str:
    ship = [d.candidate for d in decisions if d.verdict == "ship"]
    if ship:
        return f"Ship {' or '.join([', '.join(ship[:-1]), ship[-1]] if len(ship) > 1 else ship)}"
    if any(d.verdict in ("inconclusive", "built, not run") for d in decisions):
        return "Inconclusive: nothing is proven fit to ship"
    return "Do not ship"


def _lead(report: Report, scores: dict[str, tuple[int, Accuracy]]) -> str:
    counts = [(v, sum(d.verdict == v for d in report.verdicts)) for v in VERDICTS]
    words = {"ship": "within every budget", "do not ship": "over budget"}
    said = ", ".join(f"{n} {words.get(v, v)}" for v, n in counts if n)
    many = "candidate" if len(report.verdicts) == 1 else "candidates"
    lead = f"{len(report.verdicts)} {many}: {said}."
    judged = (report.recipe.get("budgets") or {}).get("accuracy")
    if not judged:
        return f"{lead} No budget judges accuracy."
    where, rows = "", scores[report.reference][1].rows if report.reference in scores else []
    n_rows, kind = len(rows), "held-out rows"
    if judged.get("task"):
        task = tasks_of(report, report.reference).get(judged["task"])
        n_rows, kind = len(task.rows) if task else 0, "rows"
        where = f" by {judged.get('metric', 'exact_match').replace('_', ' ')} of task {judged['task']}"
    if n_rows:
        lead += f" Judged{where} against {report.reference} on {n_rows:,} {kind}, with the files that would ship."
    return lead


def _row(
    report: Report,
    name: str,
    verdict: str,
    scores: dict[str, tuple[int, Accuracy]],
    speeds: dict[str, tuple[int, Latency]],
    timed: list[list[dict[str, measures.Figure]]],
) -> Row:
    cells: dict[str, Cell] = {column.key: Cell() for column in COLUMNS}
    engine = ""
    if name in scores:
        i, score = scores[name]
        reference = scores.get(report.reference, (i, score))[1]
        checks = next((v.checks for v in report.verdicts if v.candidate == name), [])
        budgeted = measures.accuracy_budget(report)
        found = measures.accuracy_figures(score, reference, budgeted, checks, seed=_seed(report))
        cells |= column_cells(found, f"accuracy[{i}]")
        cells["size"] = column_cell("size", measures.Figure(score.subject.size_bytes / 1e6), f"accuracy[{i}]")
        engine = _engine(score.subject)
    if name in speeds:
        i, speed = speeds[name]
        figures, places = measures.latency_figures(speed, timed[i])
        for key, cell in column_cells(figures, f"latency[{i}]").items():
            cells[key] = replace(cell, source=cell.source.replace("cases[]", f"cases[{places.get(key)}]"))
        engine = _engine(speed.subject)
    bpw = measures.bits_per_weight(report.artifacts.get(name, {}))
    cells["bpw"] = column_cell("bpw", measures.Figure(bpw), f"artifacts.{name}")
    role = "candidate" if verdict else "reference" if name == report.reference else "base"
    return Row(name, role, verdict, engine, cells)


def _engine(subject: Subject) -> str:
    """Name the engine once, as its version often does; what it is built of and with stays in report.json."""
    version = re.split(r" \(|, ", subject.engine_version)[0]
    return version if version.startswith(subject.engine) else f"{subject.engine} {version}"


def _budgets(report: Report, rows: Sequence[Row], tasks: Sequence[TaskLine]) -> list[BudgetColumn]:
    names, cells = [row.name for row in rows], {row.name: row.cells for row in rows}
    checks = {v.candidate: {c.budget: c for c in v.checks} for v in report.verdicts}
    keys = dict.fromkeys(key for name in names for key in checks[name])
    sources = {
        (v.candidate, c.budget): f"verdicts[{i}].checks[{j}].value"
        for i, v in enumerate(report.verdicts)
        for j, c in enumerate(v.checks)
    }
    sources |= {(line.subject, line.budget): line.loss_source for line in tasks if line.loss_source}
    made = []
    for key in keys:
        about = budget(key)
        found = {name: checks[name][key] for name in names if key in checks[name]}
        limit = next(iter(found.values())).limit * about.factor
        written = f"at most {limit:,.10g} {about.unit}".strip()
        judged = {
            name: _budgeted(
                check, about.factor, about.digits,
                (about.column and cells[name][about.column].source) or sources[name, key],
            )
            for name, check in found.items()
        }  # fmt: skip
        made.append(BudgetColumn(about.column, about.title, written, limit, judged))
    return made


def _budgeted(check: Check, factor: float, digits: int, source: str) -> Budgeted:
    value, low, high = (None if x is None else x * factor for x in (check.value, check.low, check.high))
    interval = interval_text(low, high, digits)
    return Budgeted(
        number(value, digits), interval, check.verdict, check.reason, value, low, high, check.limit * factor, source
    )


def _changes(report: Report, names: list[str], texts: Sequence[RowText]) -> Iterator[Changes]:
    """Give, for each candidate, rows that the reference had right and it has wrong (or back), worst first."""
    found = {a.subject.name: a for a in report.accuracy}
    reference = found.get(report.reference)
    for name in names:
        score = found.get(name)
        if reference is None or score is None or not measures.paired(score, reference):
            continue
        pairs = list(zip(score.rows, reference.rows, strict=True))
        harmful = [i for i, (c, r) in enumerate(pairs) if r.exact and not c.exact]
        beneficial = [i for i, (c, r) in enumerate(pairs) if c.exact and not r.exact]
        harmful.sort(key=lambda i: pairs[i][1].nll - pairs[i][0].nll)
        beneficial.sort(key=lambda i: pairs[i][0].nll - pairs[i][1].nll)
        chosen = harmful[:N_CHANGES] + beneficial[: min(2, max(0, N_CHANGES - len(harmful)))]
        shown = [_change(i, *pairs[i], texts[i] if i < len(texts) else None) for i in chosen]
        yield Changes(name, len(harmful), len(beneficial), shown)


def _change(i: int, row: RowScore, reference: RowScore, text: RowText | None) -> Change:
    gold = text.gold if text else ""
    output = gold if row.exact else row.output or ""
    split = next((k for k, (a, b) in enumerate(zip(gold, output, strict=False)) if a != b), min(len(gold), len(output)))
    return Change(
        row=i,
        kind="turned wrong" if reference.exact else "turned right",
        prompt=text.prompt if text else "",
        gold=gold,
        reference="same as gold" if reference.exact else reference.output or "wrong; output was not kept",
        candidate="same as gold" if row.exact else row.output or "wrong; output was not kept",
        split=split if gold and not row.exact and row.output else 0,
        nll=f"{number(reference.nll, 2)} → {number(row.nll, 2)}",
    )
