"""Trainer callbacks: progress with tokens/s, checkpoints that say when they are whole, blocks freed one by one."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState

from edgetune.adapt import processes
from edgetune.adapt.allocator import give_back, resident_bytes
from edgetune.artifact import require_space, write_text
from edgetune.errors import StageError
from edgetune.progress import Report

SEAL = "complete"
CHECKPOINT_BYTES = 3 * 12  # of a trained parameter: two are kept and one is written, each with weight and two moments


class CheckpointSeal(TrainerCallback):  # type: ignore[misc]
    """Marks a checkpoint after its last file is on disk, and names its files: half a one must not be resumed from."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        processes.wait()  # each writes the state of its own random numbers
        if not processes.is_first():
            return
        for file in sorted(folder.iterdir()):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        write_text(folder / SEAL, "".join(f"{file.name}\n" for file in sorted(folder.iterdir())))


def last_sealed_checkpoint(work: Path) -> str | None:
    """Give the newest whole checkpoint, and remove those that a kill cut short while it wrote or removed them."""
    whole = []
    for folder in work.glob("checkpoint-*"):
        if _is_whole(folder):
            whole.append(str(folder))
        else:
            shutil.rmtree(folder)
    return max(whole, key=step_of, default=None)


def _is_whole(folder: Path) -> bool:
    seal = folder / SEAL
    return seal.is_file() and all((folder / name).exists() for name in seal.read_text(encoding="utf-8").splitlines())


def step_of(checkpoint: str | None) -> int:
    """Give the optimizer step that a checkpoint was made after; 0 without one."""
    return int(checkpoint.rsplit("-", 1)[1]) if checkpoint is not None else 0


def require_checkpoints(trainer: Trainer, work: Path) -> None:
    """Raise DiskSpaceError where its checkpoints will not fit beside what is in `work`, which gives way to them."""
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    there = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    require_space(work, CHECKPOINT_BYTES * trained - there)


def go_on(trainer: Trainer, work: Path) -> None:
    """Train, from the last whole checkpoint where a kill left one; a training that had ended there is only read.

    Raises DiskSpaceError where there is no room for checkpoints.
    """
    require_checkpoints(trainer, work)
    if not processes.is_first():
        processes.wait()  # until the first one has removed what a kill cut short
    checkpoint = last_sealed_checkpoint(work)
    if processes.is_first():
        processes.wait()
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)) if checkpoint else None
    if state is None or not _had_ended(state):
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    trainer.state = state  # the Trainer itself would take one step more
    if trainer.args.load_best_model_at_end and state.best_global_step:
        best = work / f"checkpoint-{state.best_global_step}"  # the path that is stored may be of another mount
        if not _is_whole(best):
            raise StageError(f"{best}, the best checkpoint, is gone; remove {work} and train again")
        state.best_model_checkpoint = str(best)
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(checkpoint)


def _had_ended(state: TrainerState) -> bool:
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return bool(state.global_step >= state.max_steps or control.get("should_training_stop"))


class ProgressReport(TrainerCallback):  # type: ignore[misc]
    """Reports each step with loss and tokens/s of real (unpadded) tokens."""

    def __init__(self, progress: Report, tokens_per_step: float) -> None:
        self.progress = progress
        self.tokens_per_step = tokens_per_step
        self.loss = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.began, self.first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}, "

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        done = state.global_step - self.first
        rate = done * self.tokens_per_step / (time.monotonic() - self.began)
        self.progress(state.global_step, state.max_steps, f"{self.loss}{rate:.0f} tokens/s")


def tensorboard(report_to: Sequence[str], folder: Path | None) -> list[TrainerCallback]:
    """Give the callback that writes curves into `folder`, where the recipe wants it and there is one."""
    if "tensorboard" not in report_to or folder is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder)))]


class SpeedLog(TrainerCallback):  # type: ignore[misc]
    """Writes tokens/s by step to a file of the run, for its report: a manifest holds no times."""

    def __init__(self, file: Path, made: str, tokens_per_step: float, sampled: int = 0) -> None:
        self._file, self._made, self._tokens = file, made, tokens_per_step
        self._sampled = sampled  # answers a step whose length is known when they are there

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._curve = [point for point in read_speed(self._file, self._made) if point[0] <= state.global_step]
        self._last = (state.global_step, time.monotonic())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        step, now = state.global_step, time.monotonic()
        tokens = self._tokens + self._sampled * logs.get("completions/mean_length", 0.0)
        self._curve.append([step, round(tokens * (step - self._last[0]) / (now - self._last[1]), 1)])
        self._last = (step, now)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._file, json.dumps({"identity": self._made, "tokens_per_s": self._curve}) + "\n")


def read_speed(file: Path, made: str) -> list[list[float]]:
    """Give what was written while the artifact of that identity was trained; nothing where another one was."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    curve: list[list[float]] = found["tokens_per_s"] if found.get("identity") == made else []
    return curve


class KeptWithin(TrainerCallback):  # type: ignore[misc]
    """Gives freed memory back where a step left the process with more than `limit` bytes.

    Batches differ in length, so that what one frees has holes which the next does not fit into.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if (resident_bytes() or 0) > self._limit:
            give_back()
            self._limit = max(self._limit, 1.2 * (resident_bytes() or 0))  # what is in use is not given back


class GradualUnfreezing(TrainerCallback):  # type: ignore[misc]
    """Trains the last block first and one more each `every` steps, embeddings last (arXiv:1801.06146, section 3.3)."""

    def __init__(self, causal: Any, every: int) -> None:
        embeddings = list(causal.get_input_embeddings().parameters())
        blocks: list[list[nn.Parameter]] = [list(block.parameters()) for block in causal.get_decoder().layers]
        inside = {id(p) for group in (embeddings, *blocks) for p in group}
        blocks[-1] += [p for p in causal.parameters() if id(p) not in inside]  # the last norm, a head of its own
        self._groups = [*reversed(blocks), embeddings]
        self._every = every

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        free = 1 + state.global_step // self._every
        for place, group in enumerate(self._groups):
            for parameter in group:
                parameter.requires_grad_(place < free)
