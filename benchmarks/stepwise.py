"""Is the exact match that is scored in one pass the one of decoding token by token? On the files of a run.

    python benchmarks/stepwise.py                              # of runs/quickstart, all rows of its reference pack
    python benchmarks/stepwise.py --run DIR --limit 20

A row is exact in one pass where the likeliest token is the gold one at every position of the answer; `report.json`
holds that for each candidate. Here the same file decodes each answer greedily, one token at a time as it is timed, as
long as it gives the gold answer's tokens. With numbers of infinite precision both are the same. `differ` is the number
of rows in which they are not, of one candidate; `differ_max` the largest of any.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from edgetune.artifact import write_text
from edgetune.runtime.accuracy import ScoredRow
from edgetune.runtime.engine import Engine, load_engine
from edgetune.runtime.evidence import Accuracy
from edgetune.runtime.machine import describe
from edgetune.runtime.reference_rows import FILE, ReferenceRows
from edgetune.runtime.report.write import read_report

RESULT = Path(__file__).resolve().parent / "results" / "stepwise.json"


def gives(engine: Engine, row: ScoredRow) -> bool:
    """Decode greedily until the answer ends or parts from the gold one."""
    logits = engine.prefill(row.ids[: row.start])
    for place, token in enumerate(row.tokens.target):
        if int(logits.argmax()) != token:
            return False
        if place + 1 < len(row.tokens.target):
            logits = engine.decode(token)
    return True


def compare(run: Path, scored: Accuracy, rows: list[ScoredRow]) -> dict[str, Any]:
    """Decode the rows with one candidate's file, and count those that come out otherwise."""
    subject, began = scored.subject, time.monotonic()
    n_ctx = max(len(row.ids) for row in rows)
    engine = load_engine(
        subject.engine, (run / "candidates" / subject.name).resolve(), n_ctx=n_ctx, n_threads=subject.n_threads,
        **subject.settings,
    )  # fmt: skip
    differ = [i for i, row in enumerate(rows) if gives(engine, row) != scored.rows[i].exact]
    engine.close()
    return {
        "candidate": subject.name, "engine": subject.engine_version, "digest": subject.artifact_digest,
        "n_rows": len(rows), "differ": differ, "seconds": round(time.monotonic() - began, 1),
        "exact_in_one_pass": sum(row.exact for row in scored.rows[: len(rows)]),
    }  # fmt: skip


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="folder of a run")
    parser.add_argument("--limit", type=int, help="the first rows only")
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    if not (given.run / "report.json").is_file():
        sys.exit(f"{given.run} holds no run; make one with `edgetune run`")
    report = read_report(given.run / "report.json")
    rows = list(ReferenceRows.read(given.run / "reference" / FILE).rows)[: given.limit]
    names = [verdict.candidate for verdict in report.verdicts]
    found = []
    for scored in (one for one in report.accuracy if one.subject.name in names):
        found.append(compare(given.run, scored, rows))
        one = found[-1]
        print(f"{one['candidate']:12} {len(one['differ'])} of {one['n_rows']} rows, {one['seconds']:.0f} s", flush=True)
    write_text(given.out, json.dumps({"machine": describe().model_dump(), "candidates": found}, indent=1) + "\n")
    print(f"rows={len(rows)} differ_max={max(len(one['differ']) for one in found)}")


if __name__ == "__main__":
    main()
