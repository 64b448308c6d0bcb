"""The recipe's tasks: rows beside the held-out ones, each with its kind and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MetricName = Literal[
    "exact_match", "slot_f1", "bleu", "rouge_l", "json_valid", "accuracy", "macro_f1", "auc", "f1", "perplexity",
    "scorer",
]  # fmt: skip
# kind of task -> its metrics, the default first; `scorer` is a function of the user's
TASK_METRICS: dict[str, tuple[MetricName, ...]] = {
    "generation": ("exact_match", "slot_f1", "bleu", "rouge_l", "json_valid", "scorer"),
    "classification": ("accuracy", "macro_f1", "auc", "scorer"),
    "multiple_choice": ("accuracy", "scorer"),
    "question_answering": ("exact_match", "f1", "scorer"),
    "perplexity": ("perplexity",),
}
# of these a row is right or wrong, so that a loss is made of rows that flip
OF_FLIPS: tuple[MetricName, ...] = ("exact_match", "accuracy", "json_valid")
HELDOUT_METRICS: tuple[MetricName, ...] = ("exact_match", "slot_f1")
Count = Annotated[int, Field(gt=0)]


class Task(BaseModel):
    """Rows that are scored in each candidate's own runtime; docs/accuracy.md shows a row of each kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    kind: Literal["generation", "classification", "multiple_choice", "question_answering", "perplexity"]
    rows: str = Field(description="JSONL file with the task's rows")
    n_rows: Count | None = Field(None, description="use the first N rows")
    metrics: list[MetricName] = Field([], description="the first metric of the kind where absent")
    instruction: str | None = Field(None, description="system turn of rows that carry none")
    labels: list[str] | None = Field(None, description="classification: the labels; those of the rows where absent")
    max_new_tokens: Count = Field(64, description="generation and question answering: tokens of the longest answer")
    scorer: str | None = Field(
        None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:function that scores each output, 0 to 1"
    )

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Task:
        known = TASK_METRICS[self.kind]
        for metric in self.metrics:
            if metric not in known:
                raise ValueError(f"metric {metric!r} is not one of {self.kind}; known: {', '.join(known)}")
        if ("scorer" in self.metrics) != (self.scorer is not None):
            raise ValueError("metric scorer and key scorer belong together; give both or neither")
        if self.labels is not None and (self.kind != "classification" or len(set(self.labels)) < 2):
            raise ValueError("labels are for classification, and there are at least two different ones")
        return self

    @property
    def measured(self) -> tuple[MetricName, ...]:
        return tuple(self.metrics) or TASK_METRICS[self.kind][:1]


def check_budgeted(tasks: Sequence[Task], budgeted: str | None, metric: MetricName | None) -> None:
    """Raise ValueError where two tasks have one name, or the accuracy budget asks for what is not measured.

    `metric` is the budget's, None where there is no budget; `budgeted` its task, None for the held-out rows.
    """
    by_name = {task.name: task for task in tasks}
    if len(by_name) < len(tasks):
        raise ValueError(f"tasks: each needs a name of its own; found {', '.join(task.name for task in tasks)}")
    if metric is None:
        return
    if budgeted is not None and budgeted not in by_name:
        known = ", ".join(by_name) or "none"
        raise ValueError(f"budgets.accuracy.task {budgeted!r} is no task of the recipe; known: {known}")
    measured = by_name[budgeted].measured if budgeted else HELDOUT_METRICS
    if metric not in measured:
        where = f"task {budgeted}" if budgeted else "the held-out rows"
        raise ValueError(f"budgets.accuracy.metric {metric!r} is not measured on {where}; use {' or '.join(measured)}")
