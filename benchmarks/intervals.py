"""Coverage and false passes of the statistics that decide a release, on simulated rows and waits of known truth.

    python benchmarks/intervals.py            # 2,000 trials of each case
    python benchmarks/intervals.py --quick    # 200

A case is a metric and a number of rows. `coverage` is the share of two-sided 95 % intervals that hold the true loss,
`false_passes` the share of trials in which a candidate that loses exactly the margin ships at 95 %, `family_passes`
that any of four such candidates ships under Holm's correction. Of latency a case is a kind of waits and a number of
generations, and the limit is the true p95. `rare_passes` is what no statistic of so few generations can prevent.
`shown` are the intervals that tables show and nothing is judged by: divergence, agreement and slot F1 of rows, p50 and
p95 of waits; `shown_min` is the least coverage of any.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tiny import ROOT

from edgetune.artifact import write_text
from edgetune.runtime.machine import LoadMeter, describe
from edgetune.runtime.statistics import holm, non_inferiority
from tests import simulated_rows
from tests import simulated_waits as waits
from tests.simulated import METRICS, coverage, exact_rows, false_passes, trials

RESULT = ROOT / "benchmarks" / "results" / "intervals.json"
ROWS = (60, 200, 500, 1000)
GENERATIONS = (10, 59, 100)
CANDIDATES, LOSS = 4, 0.04


def case(metric: str, n: int, times: int) -> dict[str, Any]:
    """Run one case; every trial's loss and interval are kept."""
    found = trials(metric, n, times=times, seed=n)
    return {
        "metric": metric, "n_rows": n, "trials": times, "coverage": coverage(metric, found),
        "false_passes": false_passes(found),
        "samples": [[*(round(x, 4) for x in t[:3]), int(t.shipped)] for t in found],
    }  # fmt: skip


def latency(kind: str, n: int, times: int) -> dict[str, Any]:
    """Hold the p95 of n generations to a limit that it equals; every trial's bounds are kept, null where infinite."""
    draw = waits.KINDS.get(kind, waits.rare)
    found = waits.trials(draw, n, times=times, seed=n)
    return {
        "waits": kind, "n_generations": n, "trials": times, "limit": waits.true_percentile(draw),
        "false_passes": waits.false_passes(draw, found), "false_stops": waits.false_stops(draw, found),
        "bounded": float(np.mean([np.isfinite(one.high) for one in found])),
        "samples": [[round(end, 4) if np.isfinite(end) else None for end in one] for one in found],
    }  # fmt: skip


def shown(n: int, times: int) -> list[dict[str, Any]]:
    """Hold what tables show of n rows to the truth."""
    found = simulated_rows.coverage(n, times=times, seed=n)
    return [{"figure": name, "n_rows": n, "trials": times, "coverage": share} for name, share in found.items()]


def shown_waits(kind: str, n: int, q: int, times: int) -> dict[str, Any]:
    """Hold what tables show of n generations to the truth."""
    share = simulated_rows.waits_coverage(kind, n, q, times=times, seed=n)
    return {"figure": f"p{q}", "waits": kind, "n_generations": n, "trials": times, "coverage": share}


def family(n: int, times: int) -> dict[str, Any]:
    """Four candidates that all lose the margin, judged together."""
    rng = np.random.default_rng(n)
    shipped, alone = [], []
    for _ in range(times):
        _, reference = exact_rows(rng, n)
        harmed = [np.where(rng.random(n) < LOSS / reference.mean(), False, reference) for _ in range(CANDIDATES)]

        def passes(i: int, level: float, rows: list[Any] = harmed, was: Any = reference) -> bool:
            return non_inferiority(rows[i], was, margin=LOSS, confidence=level).verdict == "ship"

        levels = holm(CANDIDATES, 0.95, passes)
        shipped.append(any(passes(i, level) for i, level in enumerate(levels)))
        alone.append(any(passes(i, 0.95) for i in range(CANDIDATES)))
    return {"n_rows": n, "trials": times, "family_passes": float(np.mean(shipped)),
            "without_correction": float(np.mean(alone)), "samples": shipped}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage and false passes on simulated rows.")
    parser.add_argument("--quick", action="store_true", help="200 trials of each case in place of 2,000")
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    times = 200 if asked.quick else 2000
    meter, began = LoadMeter(), time.monotonic()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(case, metric, n, times) for metric in METRICS for n in ROWS]
        timing = [pool.submit(latency, kind, n, times) for kind in (*waits.KINDS, "rare") for n in GENERATIONS]
        tables = [pool.submit(shown, n, times) for n in ROWS[:3]]
        percentiles = [
            pool.submit(shown_waits, kind, n, q, times) for kind in waits.KINDS for n in GENERATIONS for q in (50, 95)
        ]
        together = pool.submit(family, 500, times)
        cases, corrected, timed = [job.result() for job in jobs], together.result(), [job.result() for job in timing]
    for one in cases:
        print(f"{one['metric']:12} {one['n_rows']:5} rows: coverage {one['coverage']:.4f}, "
              f"false passes {one['false_passes']:.4f}")  # fmt: skip
    in_tables = [one for job in tables for one in job.result()] + [job.result() for job in percentiles]
    for one in in_tables:
        of = f"{one['n_rows']:5} rows" if "n_rows" in one else f"{one['n_generations']:5} generations, {one['waits']}"
        print(f"{one['figure']:12} {of}: coverage {one['coverage']:.4f}")
    for one in timed:
        print(f"{one['waits']:12} {one['n_generations']:5} generations: false passes {one['false_passes']:.4f}, "
              f"false stops {one['false_stops']:.4f}, bounded {one['bounded']:.4f}")  # fmt: skip
    seen = [one for one in timed if one["waits"] != "rare"]
    few = [one["coverage"] for one in cases if one["n_rows"] == 60]
    enough = [one for one in cases if one["n_rows"] >= 200]
    keys = {
        "coverage_min": min(one["coverage"] for one in enough), "coverage_max": max(one["coverage"] for one in enough),
        "false_passes_max": max(one["false_passes"] for one in enough),
        "coverage_60_min": min(few), "coverage_60_max": max(few),
        "family_passes": corrected["family_passes"], "without_correction": corrected["without_correction"],
        "latency_passes_max": max(one["false_passes"] for one in seen),
        "latency_stops_max": max(one["false_stops"] for one in seen),
        "shown_min": min(one["coverage"] for one in in_tables),
        "rare_passes": max(one["false_passes"] for one in timed if one["waits"] == "rare"),
    }  # fmt: skip
    result = {
        "keys": keys, "cases": cases, "latency": timed, "shown": in_tables, "family": corrected,
        "seconds": round(time.monotonic() - began, 1),
        "machine": describe().model_dump(), "load": meter.stop().model_dump(),
        "versions": {name: metadata.version(name) for name in ("edgetune", "numpy", "scipy")}
        | {"python": platform.python_version()},
    }  # fmt: skip
    write_text(asked.out, json.dumps(result, separators=(",", ":")) + "\n")
    print(" ".join(f"{key}={value:.4f}" for key, value in keys.items()))


if __name__ == "__main__":
    main()
