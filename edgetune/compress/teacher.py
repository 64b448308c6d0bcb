"""The stage that writes down what a teacher says: its likeliest tokens at each labelled position, and the rest as one.

The file is a pack (`teacher_pack.py`) made at the temperature of the distillation. Every student of the same teacher,
rows, temperature and `top_k` reads the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact, draft, identity, json_digest
from edgetune.compress import answers as answering
from edgetune.compress.teacher_pack import PackBuilder, TeacherPack, join
from edgetune.data.checks import refuse_untaught
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import ArtifactError
from edgetune.progress import Report, silent
from edgetune.recipe_distill import Distill
from edgetune.runtime.engine import TokenRow
from edgetune.runtime.engines.torch_engine import TorchEngine

STAGE = "compress.teacher/1"
FILE = "teacher.npz"
CHUNK_ROWS = 64  # rows that a kill can cost


def planned_identity(
    config: Distill, teacher_identity: str, rows: str, kept_tokens: Sequence[int] | None = None,
    answers: str | None = None,
) -> str:  # fmt: skip
    """Give the identity of the evidence that `run` would make for rows of that digest, or what was written to them."""
    parents = [teacher_identity, *([answers] if answers is not None else [])]
    return identity(STAGE, _config(config), parents, _sources(rows, kept_tokens))


def run(
    config: Distill,
    teacher: Artifact,
    out: Path,
    *,
    rows: Sequence[Rendered],
    kept_tokens: Sequence[int] | None = None,
    answers: Artifact | None = None,
    device: str = "cpu",
    progress: Report = silent,
) -> Artifact:
    """Write `teacher.npz`: one entry for each labelled position of each row. Goes on after its last chunk of rows.

    `kept_tokens` are the teacher's ids that a student of a pruned vocabulary has, ascending: only those are named, by
    the student's ids, and the probability of all others is in the rest. `answers` is what `answers.run` wrote to the
    rows, which is then what is read.
    """
    sources, parents = _sources(rows_digest(rows), kept_tokens), [teacher]
    if answers is not None:
        rows, parents = answering.read(answers, rows), [teacher, answers]
    refuse_untaught(rows, Golden.read(teacher.path).stop_ids)
    kept = None if kept_tokens is None else np.asarray(kept_tokens, np.int64)
    with draft(out, kind="evidence", stage=STAGE, config=_config(config), parents=parents, sources=sources) as pending:
        starts = range(0, len(rows), CHUNK_ROWS)
        files = [pending.work / f"{start}.npz" for start in starts]
        packs = [_finished(file, teacher.digest) for file in files]
        if None in packs:
            engine = answering.load_engine(teacher, rows, device)
            try:
                for index, start in enumerate(starts):
                    if packs[index] is None:
                        packs[index] = _write(
                            files[index], engine, rows[start : start + CHUNK_ROWS], config, teacher.digest, kept
                        )
                    progress(min(start + CHUNK_ROWS, len(rows)), len(rows), "rows")
            finally:
                engine.close()
        whole = join([pack for pack in packs if pack is not None], rows_digest(rows))
        whole.save(pending.path / FILE)
        pending.notes = {"positions": len(whole.tail), "mean_tail_mass": float(f"{whole.mean_tail_mass:.3g}")}
    return pending.artifact


def read(evidence: Artifact) -> TeacherPack:
    """Read what the teacher says. Raises ArtifactError where the file is damaged."""
    return TeacherPack.read(evidence.path / FILE)


def _write(
    file: Path,
    engine: TorchEngine,
    rows: Sequence[Rendered],
    config: Distill,
    subject: str,
    kept: NDArray[np.int64] | None,
) -> TeacherPack:
    """Score one chunk of rows and keep it, whole or not at all."""
    builder = PackBuilder()
    # What comes after the last label is not read; the first label is at 1 or later, as nothing predicts a first token.
    spans = [(max(1, row.labels.index(True)), len(row.ids)) for row in rows]
    tokens = [TokenRow(row.ids, start) for row, (start, _) in zip(rows, spans, strict=True)]
    for row, (start, end), logits in zip(rows, spans, engine.score_rows(tokens), strict=True):
        builder.add(logits[list(row.labels[start:end])] / config.temperature, config.top_k, kept)
    pack = builder.build(f"rows from {rows[0].line}", subject)
    beside = file.with_suffix(".part")
    pack.save(beside)
    beside.replace(file)
    return pack


def _finished(file: Path, subject: str) -> TeacherPack | None:
    try:
        pack = TeacherPack.read(file)
    except ArtifactError:
        return None  # not there yet, or cut by a kill
    return pack if pack.subject == subject else None


def _sources(rows: str, kept_tokens: Sequence[int] | None) -> dict[str, str]:
    return {"rows": rows, **({} if kept_tokens is None else {"tokens": json_digest(list(kept_tokens))})}


def _config(config: Distill) -> dict[str, object]:
    return {"temperature": config.temperature, "top_k": config.top_k}
