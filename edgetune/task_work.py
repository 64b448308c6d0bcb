"""A recipe's tasks as token ids, rendered for one base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune.counts import Counts
from edgetune.data.formats import Row
from edgetune.data.general import probe_file
from edgetune.data.golden import Golden
from edgetune.data.render import render
from edgetune.data.task_rows import Example, read_examples
from edgetune.errors import DataError, UsageError
from edgetune.recipe import Recipe
from edgetune.recipe_tasks import Task
from edgetune.runtime.accuracy import ScoredRow
from edgetune.runtime.task_metrics import check_metrics
from edgetune.runtime.tasks import TaskItem, TaskWork, load_scorer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 256  # tokens of a text that are read at once for perplexity


def check_task(task: Task) -> None:
    """Read a task's rows and find its packages and scorer before a model is there. Raises a UsageError."""
    try:
        read_examples(task)
        check_metrics(task.measured)
        if task.scorer is not None:
            load_scorer(task.scorer)
    except UsageError as error:
        raise type(error)(f"task {task.name}: {error}") from error


def guess_counts(tasks: Sequence[Task]) -> Counts:
    """Guess how much text the tasks are, before there is a tokenizer: four characters a token."""
    examples = [example for task in tasks for example in read_examples(task)]
    given = sum(len(text) // 4 + 6 for example in examples for _, text in example.prompt)
    scored = sum(len(text) // 4 + 1 for example in examples for text in example.choices or example.answers[:1])
    return Counts(len(examples), given + scored, scored)


def load_tasks(tasks: Sequence[Task], base: Path) -> list[TaskWork]:
    """Read and render the rows of all tasks for a base model's folder. Raises DataError."""
    if not tasks:
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    stop = Golden.read(base).stop_ids
    made = []
    for task in tasks:
        try:
            examples = read_examples(task)
            items = [_item(example, tokenizer, stop) for example in examples]
        except DataError as error:
            raise DataError(f"task {task.name}: {error}") from error
        made.append(TaskWork(task, tuple(items), tuple(example.row for example in examples)))
    return made


def probe_task(recipe: Recipe) -> Task | None:
    """Give the general probe as a task; None where there is none."""
    if recipe.probe is None:
        return None
    return Task(name="general_probe", kind="multiple_choice", rows=str(probe_file(recipe.probe)))


def load_probe(task: Task, base: Path) -> TaskWork:
    """Render the general probe; a model without a chat template is asked in plain text. Raises DataError."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if tokenizer.chat_template:
        return load_tasks([task], base)[0]
    examples = read_examples(task)
    items = tuple(_plain_item(example, tokenizer) for example in examples)
    return TaskWork(task, items, tuple(example.row for example in examples))


def _plain_item(example: Example, tokenizer: PreTrainedTokenizerBase) -> TaskItem:
    asked = f"Question: {example.prompt[-1][1]}\nAnswer:"
    given, *told = [
        tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        for text in (asked, *(f" {choice}" for choice in example.choices))
    ]
    rows = [ScoredRow((*given, *ids), len(given), choice) for ids, choice in zip(told, example.choices, strict=True)]
    return TaskItem(tuple(rows), example.answers, example.choices)


def _item(example: Example, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int]) -> TaskItem:
    if not example.prompt:
        return TaskItem(_windows(example, tokenizer), example.answers, ())
    rows = []
    for answer in example.choices or example.answers[:1]:
        row = render(Row((*example.prompt, ("assistant", answer)), None, example.line), tokenizer, stop)
        rows.append(ScoredRow(row.ids, row.start, answer))
    return TaskItem(tuple(rows), example.answers, example.choices)


def _windows(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[ScoredRow, ...]:
    """Cut a text into windows; the first token of each is given and not scored."""
    ids: list[int] = tokenizer(example.answers[0], add_special_tokens=False)["input_ids"]
    parts = [tuple(ids[at : at + WINDOW]) for at in range(0, len(ids), WINDOW)]
    rows = tuple(ScoredRow(part, 1, "") for part in parts if len(part) > 1)
    if not rows:
        raise DataError(f"line {example.line}: the text gives fewer than two tokens")
    return rows
