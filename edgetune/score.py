"""The verb `score`: any file against a reference pack, in its own runtime, without the 16-bit model."""

from __future__ import annotations

import math
import statistics
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgetune import __version__, found
from edgetune.artifact import write_text
from edgetune.errors import ArtifactError, UsageError
from edgetune.measure import PACK
from edgetune.progress import reporting
from edgetune.runtime import accuracy as scoring
from edgetune.runtime.clustered import token_intervals
from edgetune.runtime.evidence import Accuracy, Timings
from edgetune.runtime.machine import describe
from edgetune.runtime.reference import ReferencePack
from edgetune.runtime.reference_rows import FILE as ROWS
from edgetune.runtime.reference_rows import ReferenceRows


def score(
    path: Path,
    reference: Path,
    console: Console,
    *,
    rows: Path | None = None,
    engine: str | None = None,
    threads: int = 2,
    timeout_s: float = scoring.TIMEOUT_S,
    json: Path | None = None,
) -> Accuracy:
    """Score a file or folder on the rows that a reference pack was made of, and print how far it is from the reference.

    `reference` is the pack, or the folder that holds it; `rows` its rows as JSON lines of `ids` and `start`, where
    they do not lie beside it. Raises UsageError where pack, rows and vocabulary do not belong together.
    """
    pack = reference / PACK if reference.is_dir() else reference
    work = _rows(pack, rows)
    (job,) = found.jobs([path], [engine] if engine else [], n_threads=threads)
    with reporting(console, "score") as progress:
        scored = scoring.score(
            job, work.rows, work.text_rows, tokenizer=path, stop_ids=work.stop_ids, max_new_tokens=1, generate_rows=0,
            reference=pack, timeout_s=timeout_s, progress=lambda done, total: progress(done, total, "rows"),
        )  # fmt: skip
    if json is not None:
        time = datetime.now(UTC).isoformat(timespec="seconds")
        evidence = Timings(edgetune=__version__, time=time, machine=describe(), results=[], scored=[scored])
        write_text(json, evidence.model_dump_json(indent=1) + "\n")
    console.print(figures(scored))
    return scored


def figures(scored: Accuracy) -> Table:
    """Put the figures of a scoring into two columns."""
    title = f"{scored.subject.name} in {scored.subject.engine}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    rows, n_tokens = scored.rows, sum(row.n_tokens for row in scored.rows)
    spread = token_intervals([row.kl_tokens or [] for row in rows], seed=0)
    parted = [row.first_divergence for row in rows if row.first_divergence is not None]
    at = f", in the median at answer token {statistics.median_low(parted) + 1}" if parted else ""
    said = {"rows": f"{len(rows)}, with {n_tokens} answer tokens"}
    for name in ("mean", "p50", "p99"):
        value, low, high = spread[name]
        interval = f"{low:.3g} to {high:.3g}" if math.isfinite(high - low) else "too few rows for an interval"
        said[f"KL {'median' if name == 'p50' else name}"] = f"{value:.3g} ({interval}) nats"
    said |= {
        "KL max": f"{spread['max'].value:.3g} nats",
        "top-1 agreement": f"{sum(row.n_agree or 0 for row in rows) / n_tokens:.2%} of the answer tokens",
        "first divergence": f"{len(parted)} of {len(rows)} rows part from the reference{at}",
        "exact match": f"{sum(row.exact for row in rows) / len(rows):.1%} of the rows",
        "perplexity": f"{math.exp(sum(row.nll for row in rows) / n_tokens):.4g} of the answers",
    }
    if (text := scoring.summary(scored)["perplexity"]) is not None:
        said["perplexity"] += f", {text:.4g} of general text"
    for name, words in said.items():
        table.add_row(name, words)
    return table


def _rows(pack: Path, rows: Path | None) -> ReferenceRows:
    """Read the rows of a pack, and hold them to it."""
    made = ReferencePack.read(pack)
    beside = pack.with_name(ROWS)
    if rows is not None:
        given = scoring.read_rows(rows)
        found = ReferenceRows.of(given, (), [row.ids[-1] for row in given])
    elif beside.is_file():
        found = ReferenceRows.read(beside)
    else:
        raise ArtifactError(f"{beside} is not there; copy it from where the pack was made, or give --rows")
    if scoring.workload_digest(found.rows) != made.workload:
        raise UsageError(f"{pack} was made of other rows than {rows or beside} holds; give those it was made of")
    return found
