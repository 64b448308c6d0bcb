"""Training that runs out of memory goes on with fewer rows at once, as many a step, from its last step.

Gradients that could not be computed leave weights and optimizer as the last step left them, and those are saved first;
elsewhere (in the optimizer, while rows are evaluated) it is the last whole checkpoint that training goes on from. Which
rows make a step does not depend on how many of them are computed at once, so the training stays the same up to
rounding, but for KTO, whose KL term compares the rows that are computed at once. An attempt that failed is let go as a
whole, base and optimizer with it, before the next one is built.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from edgetune.adapt import processes
from edgetune.adapt.allocator import give_back, kept_memory
from edgetune.adapt.callbacks import SEAL, go_on, last_sealed_checkpoint, step_of
from edgetune.artifact import write_text
from edgetune.errors import StageError
from edgetune.progress import Report
from edgetune.recipe_training import Prefer, Training

T = TypeVar("T", bound=Trainer)
C = TypeVar("C", bound=Training | Prefer)
# The CPU allocator elsewhere than on Linux; oneDNN, which has no other words for a scratchpad that it cannot have.
SAID = ("not enough memory", "could not create a primitive")
FILE = "out-of-memory.json"  # in the work folder: a kill does not make it run out once more


def train(
    build: Callable[[C, Report], T], config: C, work: Path, progress: Report, *, least: int = 1, evaluates: bool = True
) -> tuple[T, list[str]]:
    """Build a trainer and train, with ever fewer rows at once while memory runs out; gives it and what happened.

    `build` is called with the config of an attempt, and with where to report to. With `evaluates` the rows that are
    evaluated at once are halved, too. Raises StageError where `least` rows at once are too many.
    """
    file = work / FILE
    happened: list[list[int]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    while True:
        rows = happened[-1][1] if happened else config.micro_batch_size or config.batch_size
        failed, step = _attempt(build, config, rows, len(happened), work, progress, evaluates=evaluates)
        if isinstance(failed, Trainer):
            return failed, [_said(*halved, batch=config.batch_size) for halved in happened]
        gc.collect()
        give_back()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        fewer = fewer_rows(rows, config.batch_size)
        if step is None or fewer < least or processes.count() > 1:
            raise StageError(_refusal(failed, step, rows, least))
        happened.append([rows, fewer, step, step_of(last_sealed_checkpoint(work))])
        write_text(file, json.dumps(happened) + "\n")


def fewer_rows(rows: int, batch: int) -> int:
    """Give the most rows, half of `rows` at most, that divide a batch evenly; 0 below one row."""
    return next((n for n in range(rows // 2, 0, -1) if batch % n == 0), 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that a device, torch's allocator of the CPU, or Python found no memory."""
    from accelerate.utils.memory import should_reduce_batch_size

    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or (isinstance(error, RuntimeError) and any(said in str(error) for said in SAID))
    )


def _attempt(
    build: Callable[[C, Report], T], config: C, rows: int, halvings: int, work: Path, progress: Report, *,
    evaluates: bool,
) -> tuple[T, int] | tuple[str, int | None]:  # fmt: skip
    """Train with so many rows at once. Gives the trainer, or why memory ran out; and the step, None while loading.

    An exception holds the frames that it went through, and they hold the model: none leaves this function.
    """
    trainer: T | None = None
    computing = Computing()
    if halvings:
        config = cast("C", config.model_copy(update={"micro_batch_size": rows}))

    def report(done: int, total: int, label: str) -> None:
        progress(done, total, f"{label}, {rows} rows at once since memory ran out" if halvings else label)

    try:
        trainer = build(config, report)
        if evaluates:
            trainer.args.per_device_eval_batch_size = max(1, trainer.args.per_device_eval_batch_size >> halvings)
        trainer.add_callback(computing)
        gc.collect()
        give_back()  # what loading left: else it stays for the whole training, or not, as it happens
        with kept_memory():
            go_on(trainer, work)
            processes.wait()
        return trainer, trainer.state.global_step
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if trainer is None:
        return why, None
    if computing.gradients:
        _save(trainer, work)
    return why, trainer.state.global_step


class Computing(TrainerCallback):  # type: ignore[misc]
    """Knows whether gradients are computed: until they are, weights and optimizer are those of the last step."""

    gradients = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.gradients = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.gradients = False


def _save(trainer: Trainer, work: Path) -> None:
    """Write a sealed checkpoint of the last step, where there is none and memory lasts for it."""
    step = trainer.state.global_step
    if step == 0 or processes.count() > 1 or (work / f"checkpoint-{step}" / SEAL).exists():
        return
    trainer.model.zero_grad(set_to_none=True)
    gc.collect()
    give_back()
    try:
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    except (RuntimeError, MemoryError) as error:  # what is not sealed is not gone on from
        if not is_out_of_memory(error):
            raise


def _said(rows: int, fewer: int, step: int, begins: int, *, batch: int) -> str:
    where = "" if begins == step else f" from step {begins}"
    return (
        f"out of memory with {rows} rows at once after step {step}: went on{where} with {fewer} at once and "
        f"{batch // fewer} accumulated, still {batch} a step"
    )


def _refusal(why: str, step: int | None, rows: int, least: int) -> str:
    if step is None:
        return (
            f"out of memory while the base was loaded ({why}); hold it in 4 bits (method: qlora) or take a smaller one"
        )
    if processes.count() > 1:
        return f"out of memory with {rows} rows at once in each process ({why}); set a smaller micro_batch_size"
    at_once = "one row" if least == 1 else f"{rows} rows, fewer than which the method cannot take,"
    return (
        f"out of memory with {at_once} at once after step {step} ({why}); shorten the rows (max_length), "
        "hold the base in 4 bits (method: qlora), or set gradient_checkpointing: true"
    )
