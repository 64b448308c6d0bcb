"""What the shipped file lost: task score, likelihood and divergence, measured in the engine that ships it.

Under greedy decoding a target comes out exactly if and only if, at every target position, the end token included, the
argmax under the gold prefix is the gold token. So one scoring pass takes the place of a generation; only rows that
fail it are generated, from their first mismatch on.

Shapes: N target positions of one row, V vocabulary.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.artifact import file_digest, json_digest, write_text
from edgetune.errors import DataError, EngineError, UsageError
from edgetune.runtime.engine import Engine, Logits, TokenRow
from edgetune.runtime.evidence import Accuracy, RowScore, Seam, TextScore
from edgetune.runtime.machine import LoadMeter
from edgetune.runtime.metrics import micro_f1, parse_slots, slot_counts
from edgetune.runtime.reference import Divergence, PackBuilder, ReferencePack, Softmax, join
from edgetune.runtime.worker import Job, Worker

CHUNK = 64  # rows between two checkpoints
TIMEOUT_S = 600.0  # without a word of the child that scores
Progress = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class ScoredRow:
    """One held-out row: its rendered ids, where the target begins, and the target as text, end token left out."""

    ids: tuple[int, ...]
    start: int
    target_text: str

    @property
    def tokens(self) -> TokenRow:
        return TokenRow(self.ids, self.start)


def workload_digest(rows: Sequence[ScoredRow | TokenRow]) -> str:
    """Give the digest of a workload: ids and starts of its rows."""
    return json_digest([[list(row.ids), row.start] for row in rows])


def write_rows(path: Path, rows: Iterable[ScoredRow | TokenRow]) -> None:
    """Write a workload as JSON lines: `ids`, `start` and, where there is one, `target_text`."""
    lines = [
        json.dumps({"ids": list(row.ids), "start": row.start, "target_text": getattr(row, "target_text", "")})
        for row in rows
    ]
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_rows(path: Path) -> list[ScoredRow]:
    """Read a workload; `target_text` is wanted for slots only. Raises DataError with the line that is wrong."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            raw = json.loads(line)
            row = ScoredRow(tuple(raw["ids"]), raw["start"], raw.get("target_text", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} line {number}: not a workload row ({type(error).__name__}: {error})") from error
        if not 0 < row.start < len(row.ids):
            raise DataError(f"{path} line {number}: start={row.start} leaves nothing to score in {len(row.ids)} ids")
        rows.append(row)
    return rows


def score(
    job: Job,
    rows: Sequence[ScoredRow],
    text_rows: Sequence[TokenRow] = (),
    *,
    tokenizer: Path,
    stop_ids: Iterable[int],
    max_new_tokens: int = 256,
    generate_rows: int | None = None,
    reference: Path | None = None,
    build_reference: Path | None = None,
    stands_for: str | None = None,
    work: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Progress | None = None,
) -> Accuracy:
    """Score an artifact in a child process.

    `tokenizer` is a folder with `tokenizer.json`, which turns outputs into text. `reference` is a reference pack to
    diverge from, `build_reference` where to write this subject's own. `stands_for` is the digest of other rows that
    say the same in the ids of another vocabulary: row by row, exact answers and slots compare with theirs. Of the
    first `generate_rows` rows (None: of all, 0: of none) those that are not exact are continued greedily, and slots
    are counted where all targets are JSON objects. `work` keeps finished chunks, so that a run that was killed goes on
    there. `timeout_s` bounds the load and the time between two signs of progress. Raises DataError, UsageError and
    EngineError.
    """
    stop = frozenset(stop_ids)
    _check_rows(rows, stop)
    workload = workload_digest(rows)
    pack = ReferencePack.read(reference) if reference is not None else None
    if pack is not None and pack.workload != workload:
        raise UsageError(f"{reference} was made of other rows; build a reference pack of these rows")
    with tempfile.TemporaryDirectory() as scratch, Worker(job) as worker:
        meter = LoadMeter()
        n_ctx = max([*(max(len(r.ids), r.start + max_new_tokens) for r in rows), *(len(r.ids) for r in text_rows)])
        loaded = worker.load(n_ctx=n_ctx, timeout_s=timeout_s)
        version = loaded["version"]
        if pack is not None and pack.n_vocab != loaded["n_vocab"]:
            raise UsageError(
                f"{reference} is of a vocabulary of {pack.n_vocab} tokens, {job.name} has {loaded['n_vocab']}; compare "
                "models of one vocabulary"
            )
        request: dict[str, Any] = {
            "workload": workload, "text_workload": workload_digest(text_rows), "stop_ids": sorted(stop),
            "max_new_tokens": max_new_tokens, "generate_rows": len(rows) if generate_rows is None else generate_rows,
            "subject": job.artifact_digest, "build": build_reference is not None,
        }  # fmt: skip
        asked = [request, version, job.settings, job.n_threads, file_digest(reference) if reference else None]
        folder = (work or Path(scratch)) / f"score-{json_digest(asked)[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "rows.jsonl", rows)
        write_rows(folder / "text.jsonl", text_rows)
        done = worker.call(
            "score", timeout_s=timeout_s, folder=str(folder), reference=str(reference) if reference else None,
            on_progress=lambda p: progress(p["done"], p["of"]) if progress else None, **request,
        )  # fmt: skip
        load = meter.stop()
        chunks = [json.loads(_chunk(folder, n).read_text(encoding="utf-8")) for n in range(done["chunks"])]
        text = json.loads((folder / "text.json").read_text(encoding="utf-8")) if text_rows else None
        if build_reference is not None:
            packs = [ReferencePack.read(_chunk(folder, n).with_suffix(".npz")) for n in range(done["chunks"])]
            join(packs, workload).save(build_reference)
    raw = [row for chunk in chunks for row in chunk["rows"]]
    return Accuracy(
        subject=job.subject(version), workload=stands_for or workload,
        rows=_row_scores(raw, rows, request, tokenizer),
        text=TextScore(nll=text["nll"], n_tokens=text["n_tokens"]) if text else None,
        seconds=round(sum(c["seconds"] for c in chunks) + (text["seconds"] if text else 0.0), 3), load=load,
    )  # fmt: skip


def _check_rows(rows: Sequence[ScoredRow], stop: frozenset[int]) -> None:
    """Refuse rows whose exact match would not be that of greedy decoding: a target ends at its first stop token."""
    if not rows:
        raise DataError("there are no rows to score on; give at least one held-out row")
    for number, row in enumerate(rows):
        *inner, last = row.tokens.target
        if last not in stop or not stop.isdisjoint(inner):
            raise DataError(f"row {number}: a target must end at its first stop token {sorted(stop)}, found ..{last}")


def _row_scores(
    raw: Sequence[dict[str, Any]], rows: Sequence[ScoredRow], request: dict[str, Any], tokenizer: Path
) -> list[RowScore]:
    """Turn generated ids into text and count slots."""
    from tokenizers import Tokenizer

    limit, stop = request["generate_rows"], set(request["stop_ids"])
    slots = all(parse_slots(row.target_text) is not None for row in rows)
    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json")) if limit else None
    scores = []
    for number, (found, row) in enumerate(zip(raw, rows, strict=True)):
        ids = found.pop("output_ids")
        output = None
        if ids is not None and decoder is not None:
            output = decoder.decode(ids[:-1] if ids[-1] in stop else ids, skip_special_tokens=False)
        if slots and number < limit:
            counts = slot_counts(row.target_text if found["exact"] else output or "", row.target_text)
            found |= dict(zip(("slot_true_positives", "slot_predicted", "slot_gold"), counts, strict=True))
        scores.append(RowScore(**found, output=output))
    return scores


def summary(accuracy: Accuracy) -> dict[str, float | None]:
    """Give the figures of one measurement; None for what was not measured. Per token where named so, in nats."""
    rows = accuracy.rows
    n_tokens = sum(row.n_tokens for row in rows)
    kls = [row.kl for row in rows if row.kl is not None]
    agree = [row.n_agree for row in rows if row.n_agree is not None]
    counted = [
        (row.slot_true_positives, row.slot_predicted, row.slot_gold)
        for row in rows
        if row.slot_true_positives is not None and row.slot_predicted is not None and row.slot_gold is not None
    ]
    text = accuracy.text
    return {
        "exact_match": sum(1 for row in rows if row.exact) / len(rows),
        "token_accuracy": sum(row.n_correct for row in rows) / n_tokens,
        "nll_per_token": sum(row.nll for row in rows) / n_tokens,
        "slot_f1": micro_f1(counted) if counted else None,
        "kl_per_token": sum(kls) / n_tokens if len(kls) == len(rows) else None,
        "agreement": sum(agree) / n_tokens if len(agree) == len(rows) else None,
        "perplexity": math.exp(sum(text.nll) / sum(text.n_tokens)) if text else None,
    }


def seam(hop: str, accuracy: Accuracy, *, evidence: str | None = None, reported: bool = False) -> Seam:
    """Make one line of the seam ledger. `evidence` is the file that holds its rows; `reported`: the report does too."""
    figures = summary(accuracy)
    return Seam(
        hop=hop, engine=accuracy.subject.engine, n_rows=len(accuracy.rows), kl_per_token=figures["kl_per_token"],
        exact_match=figures["exact_match"] or 0.0, token_accuracy=figures["token_accuracy"] or 0.0,
        nll_per_token=figures["nll_per_token"] or 0.0, exact_rows="".join(str(int(row.exact)) for row in accuracy.rows),
        subject=accuracy.subject.name if reported else None, evidence=evidence,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- in the child


def score_in_child(engine: Engine, request: dict[str, Any], emit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Score the rows of a folder, chunk by chunk; a chunk whose file is there is not scored again."""
    folder = Path(request["folder"])
    rows = read_rows(folder / "rows.jsonl")
    text_rows = read_rows(folder / "text.jsonl")
    pack = ReferencePack.read(Path(request["reference"])) if request["reference"] else None
    starts = range(0, len(rows), CHUNK)
    for number, first in enumerate(starts):
        part = rows[first : first + CHUNK]
        file = _chunk(folder, number)
        if not file.exists():
            began = time.perf_counter()
            builder = PackBuilder(first) if request["build"] else None
            scored = _score_chunk(engine, part, first, pack, builder)
            wanted = [i for i, row in enumerate(scored) if not row["exact"] and first + i < request["generate_rows"]]
            outputs = continue_greedily(
                engine, [part[i] for i in wanted], [scored[i]["argmax"] for i in wanted],
                frozenset(request["stop_ids"]), request["max_new_tokens"],
            )  # fmt: skip
            for row in scored:
                row["output_ids"] = None
                del row["argmax"]
            for i, output in zip(wanted, outputs, strict=True):
                scored[i]["output_ids"] = output
            if builder is not None:
                builder.build(request["workload"], request["subject"]).save(file.with_suffix(".npz"))
            write_text(file, json.dumps({"rows": scored, "seconds": time.perf_counter() - began}))
        emit({"done": min(first + CHUNK, len(rows)), "of": len(rows)})
    if text_rows and not (folder / "text.json").exists():
        began = time.perf_counter()
        nll = []
        for number, (text_row, logits) in enumerate(
            zip(text_rows, engine.score_rows([r.tokens for r in text_rows]), strict=True)
        ):
            nll.append(score_row(text_row.tokens, logits, f"{engine.name}, text {number}")["nll"])
            emit({"done": len(rows), "of": len(rows)})
        n_tokens = [len(row.ids) - row.start for row in text_rows]
        found = {"nll": nll, "n_tokens": n_tokens, "seconds": time.perf_counter() - began}
        write_text(folder / "text.json", json.dumps(found))
    return {"chunks": len(starts)}


def _score_chunk(
    engine: Engine, rows: Sequence[ScoredRow], first: int, pack: ReferencePack | None, builder: PackBuilder | None
) -> list[dict[str, Any]]:
    scored = []
    for i, logits in enumerate(engine.score_rows([row.tokens for row in rows])):
        softmax = Softmax.of(logits)
        found = score_row(rows[i].tokens, logits, f"{engine.name}, row {first + i}", softmax)
        if pack is not None:
            found |= _divergence(pack.compare(first + i, logits, softmax))
        if builder is not None:
            builder.add(logits)
        scored.append(found)
    if len(scored) != len(rows):
        raise EngineError(f"{engine.name} gave the logits of {len(scored)} rows for {len(rows)}")
    return scored


def _divergence(found: Divergence) -> dict[str, Any]:
    """Give the fields of RowScore that compare a row with the reference."""
    differs = np.flatnonzero(~found.agree)
    return {
        "kl": float(found.kl.sum()),
        "kl_tokens": [float(f"{value:.4g}") for value in found.kl],
        "n_agree": int(found.agree.sum()),
        "first_divergence": int(differs[0]) if len(differs) else None,
    }


def score_row(row: TokenRow, logits: Logits, where: str = "a row", softmax: Softmax | None = None) -> dict[str, Any]:
    """Compare the logits of a row's target, [N, V], with its gold tokens. `softmax` is theirs, where there is one.

    Gives the fields of RowScore, and `argmax`, the tokens that greedy decoding would choose under the gold prefix.
    Raises EngineError where the logits are not finite or too few.
    """
    gold = np.array(row.target)
    if len(logits) != len(gold):
        raise EngineError(f"{where}: {len(logits)} positions of logits for {len(gold)} target tokens")
    chosen, top, exps = softmax or Softmax.of(logits)
    told = logits[np.arange(len(gold)), gold]
    bad = np.flatnonzero(~np.isfinite(top) | ~np.isfinite(told))
    if len(bad):
        raise EngineError(f"{where}: logits that are not finite at target position {bad[0]}")
    total = np.log(exps.sum(1, dtype=np.float64)) + top
    right = chosen == gold
    return {
        "exact": bool(right.all()),
        "n_tokens": len(gold),
        "n_correct": int(right.sum()),
        "nll": float((total - told).sum()),
        "argmax": chosen.tolist(),
    }


def continue_greedily(
    engine: Engine,
    rows: Sequence[ScoredRow],
    argmaxes: Sequence[Sequence[int]],
    stop: frozenset[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Give what greedy decoding makes of rows that are not exact: gold up to the first mismatch, then what follows."""
    outputs: list[list[int]] = []
    open_rows: list[int] = []
    for row, argmax in zip(rows, argmaxes, strict=True):
        target = row.tokens.target
        same = next(n for n, (got, gold) in enumerate(zip(argmax, target, strict=True)) if got != gold)
        output = [*target[:same], argmax[same]][:max_new_tokens]
        if output[-1] not in stop and len(output) < max_new_tokens:
            open_rows.append(len(outputs))
        outputs.append(output)
    prompts = [[*rows[i].ids[: rows[i].start], *outputs[i]] for i in open_rows]
    limits = [max_new_tokens - len(outputs[i]) for i in open_rows]
    for i, new in zip(open_rows, engine.continue_rows(prompts, stop, limits), strict=True):
        outputs[i] += new
    return outputs


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05}.json"
