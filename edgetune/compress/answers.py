"""Sequence-level knowledge distillation (arXiv:1606.07947), section 3.2: the teacher writes what the student learns.

The teacher answers the last prompt of each training row greedily. An answer that does not end within `max_new_tokens`
would teach none to end, so the row's own stays; so does that of a row which asks nothing (`Rendered.asks`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edgetune.artifact import Artifact, draft, identity, write_text
from edgetune.compress.on_policy import answered
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, rows_digest
from edgetune.data.spool import RenderedRows
from edgetune.devices import has_fast_bfloat16
from edgetune.errors import ArtifactError, DataError
from edgetune.progress import Report, silent
from edgetune.recipe_distill import Distill
from edgetune.runtime.engines.torch_engine import TorchEngine

STAGE = "compress.answers/2"
FILE = "answers.jsonl"
CHUNK_ROWS = 32  # rows that are answered together, and that a kill can cost


def planned_identity(config: Distill, teacher_identity: str, rows: str) -> str:
    """Give the identity of the evidence that `run` would make for rows of that digest."""
    return identity(STAGE, _config(config), [teacher_identity], {"rows": rows})


def run(
    config: Distill,
    teacher: Artifact,
    out: Path,
    *,
    rows: Sequence[Rendered],
    device: str = "cpu",
    progress: Report = silent,
) -> Artifact:
    """Write `answers.jsonl`: place, token ids and text of each answer that ends. Goes on after its last chunk of rows.

    Raises DataError where none ends.
    """
    stop, limit = frozenset(Golden.read(teacher.path).stop_ids), most_new_tokens(config, rows)
    # Prompts of like length together: they are padded to the longest of their chunk.
    order = sorted((place for place, row in enumerate(rows) if row.asks), key=lambda place: (rows[place].start, place))
    chunks = [order[first : first + CHUNK_ROWS] for first in range(0, len(order), CHUNK_ROWS)]
    with draft(
        out, kind="evidence", stage=STAGE, config=_config(config), parents=[teacher],
        sources={"rows": rows_digest(rows)},
    ) as pending:  # fmt: skip
        files = [pending.work / f"{index}.json" for index in range(len(chunks))]
        found = [_finished(file, chunk, teacher.digest) for file, chunk in zip(files, chunks, strict=True)]
        engine = load_engine(teacher, rows, device)
        try:
            for index, chunk in enumerate(chunks):
                if found[index] is None:
                    prompts = [rows[place].ids[: rows[place].start] for place in chunk]
                    made = engine.continue_rows(prompts, stop, [limit] * len(chunk))
                    write_text(files[index], json.dumps({"by": teacher.digest, "places": chunk, "ids": made}))
                    found[index] = made
                progress(min((index + 1) * CHUNK_ROWS, len(order)), len(order), "answers")
            answers = dict(zip(order, (ids for chunk in found for ids in chunk or ()), strict=True))
            ended = {place: ids for place, ids in sorted(answers.items()) if ids[-1] in stop}
            lines = [
                {"place": place, "line": rows[place].line, "ids": ids, "text": engine.detokenize(ids)}
                for place, ids in ended.items()
            ]
        finally:
            engine.close()
        if not ended:
            raise DataError(
                f"none of the teacher's {len(answers)} answers ends within {limit} tokens; set a larger max_new_tokens"
            )
        write_text(pending.path / FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        same = sum(tuple(ids) == rows[place].ids[rows[place].start :] for place, ids in ended.items())
        pending.notes = {"answers": len(ended), "same_as_the_rows": same, "rows": len(rows)}
        if len(ended) < len(rows):
            pending.fallbacks.append(
                f"{len(rows) - len(ended)} of {len(rows)} rows keep their own answer: the teacher's did not end within "
                f"{limit} tokens, or the row asks nothing"
            )
    return pending.artifact


def read(evidence: Artifact, rows: Sequence[Rendered]) -> RenderedRows:
    """Give the rows with what the teacher wrote to them. Raises ArtifactError where the file is damaged."""
    file, found = evidence.path / FILE, RenderedRows()
    try:
        lines = map(json.loads, filter(None, file.read_text(encoding="utf-8").split("\n")))
        said = {line["place"]: (line["ids"], line["text"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} is damaged: {str(error).splitlines()[0]}") from error
    for place, row in enumerate(rows):
        if place in said:
            ids, text = said[place]
            row = replace(answered(row, ids), target_text=text)
        found.come([found.write(row)])
    return found


def most_new_tokens(config: Distill, rows: Sequence[Rendered]) -> int:
    """Give how many tokens an answer that a model writes may have: those of the rows' longest unless it is said."""
    return config.max_new_tokens or max((len(row.ids) - row.start for row in rows if row.asks), default=1)


def load_engine(teacher: Artifact, rows: Sequence[Rendered], device: str) -> TorchEngine:
    """Load a teacher to read rows, in the dtype that the device computes fast."""
    return TorchEngine.load(
        teacher.path, n_ctx=max(len(row.ids) for row in rows), n_threads=torch.get_num_threads(),
        dtype="bfloat16" if has_fast_bfloat16(device) else "float32", device=device,
    )  # fmt: skip


def _finished(file: Path, chunk: list[int], teacher: str) -> list[list[int]] | None:
    """Give what a run that was killed had written of a chunk, None where it had not."""
    if not file.exists():
        return None
    said = json.loads(file.read_text(encoding="utf-8"))
    return said["ids"] if (said["by"], said["places"]) == (teacher, chunk) else None


def _config(config: Distill) -> dict[str, Any]:
    return {"max_new_tokens": config.max_new_tokens}
