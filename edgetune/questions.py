"""What a run asks its subjects, in the ids of each one's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from edgetune.graph import Graph
from edgetune.recipe import Recipe
from edgetune.runtime.accuracy import ScoredRow, workload_digest
from edgetune.runtime.engine import TokenRow
from edgetune.runtime.tasks import TaskWork
from edgetune.task_work import load_tasks


@dataclass(frozen=True)
class Questions:
    """Rows and tasks as token ids, and the tokenizer that they are of."""

    rows: list[ScoredRow]
    text_rows: list[TokenRow]
    tasks: list[TaskWork]
    tokenizer: Path
    stop_ids: Sequence[int]
    stands_for: str | None = None  # of a pruned vocabulary: digest of the reference's rows, which say the same


class Asked:
    """The questions of one recipe, by vocabulary."""

    def __init__(self, recipe: Recipe, graph: Graph) -> None:
        """Render those of the base's own vocabulary. Raises DataError."""
        self._recipe, self._graph = recipe, graph
        self._own = self._rendered(None)
        self._cut: dict[int, Questions] = {}

    def of(self, n_tokens: int | None) -> Questions:
        """Give what a subject of so many tokens is asked; None for the base's own vocabulary.

        Text is left out for a pruned one: its perplexity is of a token, and the tokens of a text are others.
        """
        if n_tokens is None:
            return self._own
        if n_tokens not in self._cut:
            made = self._rendered(n_tokens)
            pairs = zip(made.tasks, self._own.tasks, strict=True)
            self._cut[n_tokens] = replace(
                made, text_rows=[], tasks=[replace(work, stands_for=own.digest) for work, own in pairs],
                stands_for=workload_digest(self._own.rows),
            )  # fmt: skip
        return self._cut[n_tokens]

    def _rendered(self, n_tokens: int | None) -> Questions:
        work = self._graph.rendered(n_tokens)
        return Questions(
            rows=[ScoredRow(row.ids, row.start, row.target_text) for row in work.heldout],
            text_rows=[TokenRow(ids, 1) for ids in work.text_rows()],
            tasks=load_tasks(self._recipe.tasks, work.tokenizer),
            tokenizer=work.tokenizer,
            stop_ids=work.golden.stop_ids,
        )
