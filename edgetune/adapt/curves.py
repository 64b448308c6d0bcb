"""What a training's log tells: its curves, and whether it diverged."""

from __future__ import annotations

import math
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import TrainerState

from edgetune.errors import StageError


def diverged(trainer: Trainer) -> list[str]:
    """Say where the loss became no number, if it did. Raises StageError where no weights of before were kept."""
    state, keys = trainer.state, ("loss", "eval_loss")
    at = [e["step"] for e in state.log_history if any(key in e and not math.isfinite(e[key]) for key in keys)]
    if not at:
        return []
    if trainer.args.load_best_model_at_end and state.best_global_step:
        return [f"training diverged at step {min(at)}: the weights of step {state.best_global_step} are kept"]
    raise StageError(f"training diverged at step {min(at)}: its loss is no number; lower learning_rate")


def history(state: TrainerState) -> dict[str, Any]:
    """Curves by step, without times: the manifest must not change from run to run."""
    return {
        "steps": state.global_step,
        "loss": curve(state, "loss"),
        "heldout_loss": curve(state, "eval_loss"),
        "heldout_exact_match": curve(state, "eval_exact_match"),
        "learning_rate": [[e["step"], e["learning_rate"]] for e in state.log_history if "learning_rate" in e],
        "gradient_norm": curve(state, "grad_norm"),
    }


def curve(state: TrainerState, key: str) -> list[list[float]]:
    """Steps and values of one key of the log, where they are numbers."""
    return [[e["step"], round(float(e[key]), 6)] for e in state.log_history if key in e and math.isfinite(e[key])]
