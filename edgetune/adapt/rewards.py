"""Rule rewards for GRPO, and the door to a user's own: what an answer earns, as one number for each answer."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from edgetune.artifact import file_digest
from edgetune.errors import RecipeError
from edgetune.recipe_training import Reward

# prompts, completions and the rows' own answers -> a reward for each completion
Score = Callable[[Sequence[str], Sequence[str], Sequence[str]], Sequence[float]]


def score_of(reward: Reward) -> tuple[str, float, Score]:
    """Give the name, weight and function of a reward. Raises RecipeError where a user's function cannot be had."""
    if reward.json_valid is not None:
        return "json_valid", reward.json_valid.weight, lambda _, texts, __: [json_valid(text) for text in texts]
    if reward.exact_match is not None:
        return (
            "exact_match",
            reward.exact_match.weight,
            lambda _, texts, answers: [
                float(text.strip() == answer.strip()) for text, answer in zip(texts, answers, strict=True)
            ],
        )
    if reward.regex is not None:
        pattern = re.compile(reward.regex.pattern, re.DOTALL)
        return "regex", reward.regex.weight, lambda _, texts, __: [float(bool(pattern.fullmatch(t))) for t in texts]
    if reward.length is not None:
        limit = reward.length.characters
        return "length", reward.length.weight, lambda _, texts, __: [within(len(text), limit) for text in texts]
    assert reward.function is not None, "a reward has exactly one key"
    return reward.function.name, reward.function.weight, _users(reward.function.name)


def json_valid(text: str) -> float:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def within(length: int, limit: int) -> float:
    """1 up to the limit, then falling in proportion to the excess, 0 from twice the limit on."""
    return min(1.0, max(0.0, 2.0 - length / limit))


def sources_of(rewards: Sequence[Reward]) -> dict[str, str]:
    """Digests of the files in which users' functions stand: another function is another reward."""
    names = [reward.function.name for reward in rewards if reward.function is not None]
    return {f"reward {name}": file_digest(Path(inspect.getfile(load_function(name)))) for name in names}


def load_function(name: str) -> Callable[..., Sequence[float]]:
    """Import `module:function` from the Python path or the folder that the command runs in. Raises RecipeError."""
    module, _, attribute = name.partition(":")
    with _here_on_path():
        try:
            found = getattr(importlib.import_module(module), attribute)
        except ImportError as error:
            raise RecipeError(f"prefer.rewards: {name}: {module} cannot be imported ({error})") from error
        except AttributeError as error:
            raise RecipeError(f"prefer.rewards: {name}: {module} has no {attribute!r}") from error
    if not inspect.isfunction(found):
        raise RecipeError(f"prefer.rewards: {name} is a {type(found).__name__}; give a Python function")
    function: Callable[..., Sequence[float]] = found
    return function


def _users(name: str) -> Score:
    function = load_function(name)

    def score(prompts: Sequence[str], texts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        found = [float(value) for value in function(prompts=prompts, completions=texts, answers=answers)]
        if len(found) != len(texts):
            raise RecipeError(f"prefer.rewards: {name} gave {len(found)} numbers for {len(texts)} answers")
        return found

    return score


@contextmanager
def _here_on_path() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
