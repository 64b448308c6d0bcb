"""The recipe's tasks: closed, of one kind each, and known to the budget that names one."""

from __future__ import annotations

from typing import Any

import pytest

from edgetune.errors import RecipeError
from edgetune.recipe import parse_recipe
from tests.test_recipe import raw

TASK = {"name": "moods", "kind": "classification", "rows": "moods.jsonl"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": [TASK | {"knd": 1}]}, "unknown key 'tasks.0.knd'; did you mean 'kind'?"),
        ({"tasks": [TASK, TASK]}, "tasks: each needs a name of its own; found moods, moods"),
        ({"tasks": [TASK | {"metrics": ["bleu"]}]}, "metric 'bleu' is not one of classification; known: accuracy"),
        ({"tasks": [TASK | {"metrics": ["scorer"]}]}, "metric scorer and key scorer belong together"),
        ({"tasks": [TASK | {"labels": ["a", "a"]}]}, "at least two different ones"),
        ({"tasks": [TASK | {"kind": "generation", "labels": ["a", "b"]}]}, "labels are for classification"),
        ({"budgets": {"accuracy": {"task": "moods"}}}, "'moods' is no task of the recipe; known: none"),
        (
            {"tasks": [TASK], "budgets": {"accuracy": {"task": "moods", "metric": "auc"}}},
            "budgets.accuracy.metric 'auc' is not measured on task moods; use accuracy",
        ),
        (
            {"budgets": {"accuracy": {"metric": "bleu"}}},
            "'bleu' is not measured on the held-out rows; use exact_match or slot_f1",
        ),
    ],
)
def test_tasks_are_closed_and_fit_their_kind(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw(**changes))
    assert says in str(caught.value)


def test_a_budget_may_name_a_task() -> None:
    tasks = [TASK | {"metrics": ["macro_f1", "auc"]}]
    found = parse_recipe(raw(tasks=tasks, budgets={"accuracy": {"task": "moods", "metric": "auc"}}))
    assert found.tasks[0].measured == ("macro_f1", "auc")
    assert parse_recipe(raw(tasks=[TASK])).tasks[0].measured == ("accuracy",)
