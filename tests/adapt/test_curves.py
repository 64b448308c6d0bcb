"""What a training's log tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers.trainer_callback import TrainerState

from edgetune.adapt.curves import diverged, history
from edgetune.errors import StageError

LOG = [{"step": 2, "loss": 1.5}, {"step": 2, "eval_loss": 1.25}, {"step": 4, "loss": float("nan")}]


def trainer(state: TrainerState, *, keeps_best: bool = True) -> Any:
    return SimpleNamespace(state=state, args=SimpleNamespace(load_best_model_at_end=keeps_best))


def test_weights_of_before_a_divergence_are_kept_and_said() -> None:
    state = TrainerState(global_step=4, log_history=LOG, best_global_step=2)
    assert diverged(trainer(state)) == ["training diverged at step 4: the weights of step 2 are kept"]
    assert history(state)["loss"] == [[2, 1.5]]
    assert diverged(trainer(TrainerState(log_history=LOG[:2]))) == []


@pytest.mark.parametrize(("best", "keeps_best"), [(None, True), (2, False)])
def test_without_such_weights_it_is_refused(best: int | None, keeps_best: bool) -> None:
    state = TrainerState(log_history=LOG, best_global_step=best)
    with pytest.raises(StageError, match="training diverged at step 4: its loss is no number; lower learning_rate"):
        diverged(trainer(state, keeps_best=keeps_best))
