"""Which compress steps may follow which. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgetune.recipe import CompressStep


def check_order(steps: Sequence[CompressStep]) -> None:
    """Integers come last, right after their scales, and a student is another model than its teacher.

    What is trained of integers comes right after them. Raises ValueError.
    """
    _scales_meet_their_grid(steps)
    for index, step in enumerate(steps):
        if step.distill is not None and step.keeps_integers and all(one.quantizer is None for one in steps[:index]):
            raise ValueError(
                f"distill.into {step.distill.into} trains what an rtn or gptq step made; put one before it"
            )
    for before, step in pairwise(steps):
        if before.quantizer is None and not before.keeps_integers:
            continue
        if step.keeps_integers and before.quantizer is not None:
            _has_room(before, step)
            continue
        advice = "leave one out" if step.quantizer or step.keeps_integers else f"put {step.key} before {before.key}"
        raise ValueError(f"{step.key} after {before.key}: integers can only be exported; {advice}")
    for index, step in enumerate(steps):
        if step.distill is None:
            continue
        if step.distill.into != "scales" and any(earlier.sparsify is not None for earlier in steps[:index]):
            advice = "leave sparsify out" if step.keeps_integers else "put distill before sparsify"
            raise ValueError(f"distill after sparsify trains what it set to zero; {advice}")
        if (index == 0) != (step.distill.student is not None):
            if index == 0:
                raise ValueError("distill as the first step has its teacher as student; prune before, or name one")
            made = steps[index - 1].key
            raise ValueError(f"distill with student {step.distill.student!r} drops what {made} made; leave it out")


def check_vocabulary(steps: Sequence[CompressStep]) -> None:
    """A vocabulary is cut once, and nothing that needs all of it comes after. Raises ValueError."""
    cut = [step.prune.vocabulary for step in steps if step.prune is not None and step.prune.vocabulary]
    if len(cut) > 1:
        raise ValueError(f"prune.vocabulary is given {len(cut)} times; cut it once, to {min(cut)}")
    cuts = [bool(step.prune is not None and step.prune.vocabulary) for step in steps]
    taught = [step.distill is not None and step.distill.answers == "teacher" for step in steps]
    if cut and any(taught[cuts.index(True) :]):
        raise ValueError("distill.answers: teacher writes tokens that prune.vocabulary may not keep; leave one out")


def _scales_meet_their_grid(steps: Sequence[CompressStep]) -> None:
    for before, after in pairwise([*steps, None]):
        if before is None or before.awq is None:
            continue
        grid = after.quantizer if after is not None else None
        keys = ("group_size", "sym") if grid is not None and grid.allocate else ("bits", "group_size", "sym")
        wanted = {key: getattr(before.awq, key) for key in keys}
        if grid is None or any(getattr(grid, key) != value for key, value in wanted.items()):
            said = ", ".join(f"{key}: {str(value).lower()}" for key, value in wanted.items())
            raise ValueError(f"awq scales for {said}; let an rtn or gptq step of that grid follow it")


def _has_room(before: CompressStep, step: CompressStep) -> None:
    """A checkpoint has one low-rank matrix beside each layer's integers."""
    fitted = before.quantizer is not None and before.quantizer.recover is not None
    if fitted and step.distill is not None and step.distill.into == "adapter":
        raise ValueError(
            f"distill.into adapter writes where {before.key}.recover does; leave one out, or train into scales"
        )
