"""A recipe's tasks, scored in the artifact's own runtime.

Labels and choices are scored by the likelihood of their text under the prompt, end token included. Generation is one
scoring pass of the gold answer; where it is not what greedy decoding would give, the answer is continued from its
first mismatch on (`runtime/accuracy.py`), so every output is the one that greedy decoding gives.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.artifact import file_digest, json_digest, write_text
from edgetune.errors import UsageError
from edgetune.recipe_tasks import Task
from edgetune.runtime.accuracy import CHUNK, TIMEOUT_S, Progress, ScoredRow, continue_greedily, score_row
from edgetune.runtime.engine import Engine
from edgetune.runtime.evidence import TaskRow, TaskScore
from edgetune.runtime.machine import LoadMeter
from edgetune.runtime.task_metrics import METRICS, Answer
from edgetune.runtime.worker import Job, Worker

GENERATED = ("generation", "question_answering")
Scorer = Callable[[list[str], list[dict[str, Any]]], Sequence[float]]


@dataclass(frozen=True)
class TaskItem:
    """One row of a task: a scored row for each label or choice, for each window of a text, or for the gold answer."""

    rows: tuple[ScoredRow, ...]
    gold: tuple[str, ...]  # accepted answers
    choices: tuple[str, ...]  # labels or choices, in the order of `rows`; else empty


@dataclass(frozen=True)
class TaskWork:
    """A task and its rows as token ids."""

    task: Task
    items: tuple[TaskItem, ...]
    written: tuple[dict[str, Any], ...]  # the rows as they were written, for the user's own scorer
    stands_for: str | None = None  # digest of the work that says the same in the ids of another vocabulary

    @property
    def generates(self) -> bool:
        return self.task.kind in GENERATED

    @cached_property
    def digest(self) -> str:
        """Digest of ids, answers and settings; of the user's scorer the file that it is in."""
        settings = self.task.model_dump(mode="json", exclude={"name", "rows", "n_rows"})
        scorer = file_digest(_module_file(load_scorer(self.task.scorer))) if self.task.scorer else None
        rows = [[[[list(r.ids), r.start] for r in item.rows], item.gold, item.choices] for item in self.items]
        return json_digest([settings, scorer, rows, list(self.written) if scorer else None])


def load_scorer(name: str) -> Scorer:
    """Import a scorer, `module:function`, also from the folder that the command runs in. Raises UsageError."""
    module, _, function = name.partition(":")
    here = os.getcwd()  # noqa: PTH109 - an entry of sys.path
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise UsageError(f"scorer {name!r}: module {module!r} cannot be imported ({error})") from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UsageError(f"scorer {name!r}: module {module!r} has no function {function!r}")
    return found  # type: ignore[no-any-return]


def _module_file(scorer: Scorer) -> Path:
    return Path(str(sys.modules[scorer.__module__].__file__))


def score_tasks(
    job: Job,
    works: Sequence[TaskWork],
    *,
    tokenizer: Path,
    stop_ids: Iterable[int],
    work: Path | None = None,
    timeout_s: float = TIMEOUT_S,
    progress: Progress | None = None,
) -> list[TaskScore]:
    """Score an artifact on all tasks in one child process.

    `tokenizer` is a folder with `tokenizer.json`, which turns outputs into text. `work` keeps finished chunks.
    Raises UsageError and EngineError.
    """
    stop = sorted(stop_ids)
    rows = [(row, w.task.max_new_tokens if w.generates else 0) for w in works for item in w.items for row in item.rows]
    scores = []
    with tempfile.TemporaryDirectory() as scratch, Worker(job) as worker:
        n_ctx = max(max(len(row.ids), row.start + n_new) for row, n_new in rows)
        version = worker.load(n_ctx=n_ctx, timeout_s=timeout_s)["version"]
        before = 0
        for one in works:
            meter = LoadMeter()
            asked = [one.digest, version, job.artifact_digest, job.settings, job.n_threads, stop]
            folder = (work or Path(scratch)) / f"task-{json_digest(asked)[:16]}"
            folder.mkdir(parents=True, exist_ok=True)
            _write_items(folder / "items.jsonl", one.items)

            def tell(done: dict[str, Any], so_far: int = before) -> None:
                if progress is not None:
                    progress(so_far + done["done"], len(rows))

            done = worker.call(
                "score_task", timeout_s=timeout_s, folder=str(folder), generate=one.generates, stop_ids=stop,
                max_new_tokens=one.task.max_new_tokens, on_progress=tell,
            )  # fmt: skip
            before += sum(len(item.rows) for item in one.items)
            chunks = [json.loads(_chunk(folder, n).read_text(encoding="utf-8")) for n in range(done["chunks"])]
            answers = _answers(one, [item for chunk in chunks for item in chunk["items"]], tokenizer, stop)
            figures, shares = _measure(one, answers)
            scores.append(
                TaskScore(
                    subject=job.subject(version), task=one.task.name, kind=one.task.kind,
                    workload=one.stands_for or one.digest, figures=figures, rows=_rows(answers, shares),
                    seconds=round(sum(chunk["seconds"] for chunk in chunks), 3), load=meter.stop(),
                )
            )  # fmt: skip
    return scores


def _answers(work: TaskWork, scored: Sequence[dict[str, Any]], tokenizer: Path, stop: Sequence[int]) -> list[Answer]:
    """Turn scored rows into what the subject answered."""
    from tokenizers import Tokenizer

    decoder = Tokenizer.from_file(str(tokenizer / "tokenizer.json")) if work.generates else None
    answers = []
    for item, found in zip(work.items, scored, strict=True):
        logs, n_tokens = found["logs"], found["n_tokens"]
        if decoder is not None:
            ids = found["output_ids"]
            text = decoder.decode(ids[:-1] if ids and ids[-1] in stop else ids, skip_special_tokens=False)
            answers.append(Answer(text, item.gold))
        elif item.choices:
            weights = [len(c.encode()) if work.task.kind == "multiple_choice" else 1 for c in item.choices]
            normed = [log / weight for log, weight in zip(logs, weights, strict=True)]
            answers.append(Answer(item.choices[int(np.argmax(normed))], item.gold, tuple(logs)))
        else:
            answers.append(Answer("", ("",), (sum(logs),), sum(n_tokens)))  # of a text, only its likelihood
    return answers


def _measure(work: TaskWork, answers: Sequence[Answer]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Give each metric's figure, and its share of each row."""
    figures: dict[str, float] = {}
    shares: dict[str, list[float]] = {}
    for name in work.task.measured:
        if name == "scorer":
            assert work.task.scorer is not None, "metric and key were checked to belong together"
            scores = _own_scores(work.task.scorer, answers, work.written)
            figures[name], shares[name] = sum(scores) / len(scores), scores
        else:
            found = METRICS[work.task.kind][name].measure(answers, work.items[0].choices)
            figures[name], shares[name] = found.figure, found.rows.tolist()
        if not all(map(math.isfinite, (figures[name], *shares[name]))):
            raise UsageError(f"task {work.task.name}: {name} is not defined on these rows; leave it out of metrics")
    return figures, shares


def _own_scores(name: str, answers: Sequence[Answer], written: Sequence[dict[str, Any]]) -> list[float]:
    """Ask the user's scorer. Raises UsageError where it does not give one number from 0 to 1 for each row."""
    scores = [float(x) for x in load_scorer(name)([answer.output for answer in answers], list(written))]
    if len(scores) != len(answers):
        raise UsageError(f"scorer {name!r} gave {len(scores)} scores for {len(answers)} rows; give one for each row")
    bad = next((i for i, x in enumerate(scores) if not (math.isfinite(x) and 0 <= x <= 1)), None)
    if bad is not None:
        raise UsageError(f"scorer {name!r} gave {scores[bad]} for row {bad}; a score is a number from 0 to 1")
    return scores


def _rows(answers: Sequence[Answer], shares: dict[str, list[float]]) -> list[TaskRow]:
    return [
        TaskRow(
            gold=answer.gold[0], output=answer.output,
            scores={name: values[i] for name, values in shares.items()},
            likelihoods=list(answer.likelihoods) or None,
        )
        for i, answer in enumerate(answers)
    ]  # fmt: skip


def _write_items(path: Path, items: Sequence[TaskItem]) -> None:
    lines = [json.dumps([[list(row.ids), row.start] for row in item.rows]) for item in items]
    write_text(path, "".join(f"{line}\n" for line in lines))


# ----------------------------------------------------------------------------------------------- in the child


def score_task_in_child(
    engine: Engine, request: dict[str, Any], emit: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Score the items of a folder, chunk by chunk; a chunk whose file is there is not scored again."""
    folder = Path(request["folder"])
    lines = (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
    items = [[ScoredRow(tuple(ids), start, "") for ids, start in json.loads(line)] for line in lines]
    done = number = 0
    for number, part in enumerate(_chunks(items)):
        file = _chunk(folder, number)
        if not file.exists():
            began = time.perf_counter()
            found = _score_items(engine, part, request)
            write_text(file, json.dumps({"items": found, "seconds": time.perf_counter() - began}))
        done += sum(map(len, part))
        emit({"done": done})
    return {"chunks": number + 1}


def _score_items(engine: Engine, items: Sequence[list[ScoredRow]], request: dict[str, Any]) -> list[dict[str, Any]]:
    scored: list[dict[str, Any]] = []
    for rows in _calls(items):
        for row, logits in zip(rows, engine.score_rows([row.tokens for row in rows]), strict=True):
            scored.append(score_row(row.tokens, logits, f"{engine.name}, row {len(scored)}"))
    flat = [row for item in items for row in item]
    outputs: list[list[int] | None] = [None] * len(items)
    if request["generate"]:
        n_new = request["max_new_tokens"]
        wrong = [i for i, found in enumerate(scored) if not found["exact"]]
        told = continue_greedily(
            engine,
            [flat[i] for i in wrong],
            [scored[i]["argmax"] for i in wrong],
            frozenset(request["stop_ids"]),
            n_new,
        )
        outputs = [list(row.tokens.target[:n_new]) for row in flat]
        for i, ids in zip(wrong, told, strict=True):
            outputs[i] = ids
    found, at = [], 0
    for item, output in zip(items, outputs, strict=True):
        part = scored[at : at + len(item)]
        at += len(item)
        logs, n_tokens = [-row["nll"] for row in part], [row["n_tokens"] for row in part]
        found.append({"logs": logs, "n_tokens": n_tokens, "output_ids": output})
    return found


def _calls(items: Sequence[list[ScoredRow]]) -> list[list[ScoredRow]]:
    """Group rows for scoring: an engine reads what the rows of one call begin with once.

    All together share a short beginning, the rows of one item their whole prompt; what reads fewer tokens is taken.
    """
    together = [row for item in items for row in item]
    apart = list(items)
    return [together] if _n_read([together]) <= _n_read(apart) else apart


def _n_read(calls: Sequence[Sequence[ScoredRow]]) -> int:
    total = 0
    for rows in calls:
        first, last = min(row.ids for row in rows), max(row.ids for row in rows)  # what these share, all do
        same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        shared = min(same, min(row.start for row in rows) - 1)
        total += shared + sum(len(row.ids) - 1 - shared for row in rows)
    return total


def _chunks(items: Sequence[list[ScoredRow]]) -> Iterator[list[list[ScoredRow]]]:
    """Cut items, in order, into chunks of about CHUNK rows."""
    part: list[list[ScoredRow]] = []
    for item in items:
        part.append(item)
        if sum(map(len, part)) >= CHUNK:
            yield part
            part = []
    if part:
        yield part


def _chunk(folder: Path, number: int) -> Path:
    return folder / f"chunk-{number:05}.json"
