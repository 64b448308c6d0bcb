"""Kernels and walks are compared with float64, so they compute in 32 bits also where bfloat16 is fast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, TrainerCallback

from edgetune.adapt.trainer import LabelledHead, Split
from edgetune.artifact import Artifact
from edgetune.compress import distill, layerwise, pieces, teacher
from edgetune.compress.coach import Coach
from edgetune.compress.distill import DistillTrainer, Insides
from edgetune.compress.on_policy import Sampler
from edgetune.data.formats import Row
from edgetune.data.render import Rendered, render
from edgetune.progress import silent
from edgetune.recipe_distill import Distill
from tests.conftest import make_tiny_model

NOTHING = Insides([], 0)


@pytest.fixture(autouse=True)
def _thirty_two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layerwise, pieces):
        monkeypatch.setattr(module, "compute_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def rows(tiny_model: Artifact) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    made = []
    for n in range(20):
        turns = [("user", f"set the light to {n} percent"), ("assistant", f'{{"level":{n}}}')]
        turns += [("user", "what"), ("assistant", f"{n}")] if n % 3 == 0 else []  # labels in two places
        made.append(render(Row(tuple(turns), None, n + 1), tokenizer, [2]))
    return made


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_tiny_model(tmp_path_factory.mktemp("student") / "model", seed=5, layers=1, hidden=32)


def make_trainer(
    config: Distill, model: Any, rows: list[Rendered], said: Artifact, insides: Insides = NOTHING,
    coach: Coach | None = None,
) -> DistillTrainer:  # fmt: skip
    """Build the trainer of a distillation that is not run."""
    if coach is not None and insides.blocks:
        size = int(model.config.hidden_size)
        setattr(model, distill.PROJECTION, torch.nn.ModuleList(coach.projection(size) for _ in insides.blocks))
    return distill.make_trainer(
        DistillTrainer, config, model, LabelledHead(model.get_output_embeddings()), Split.of(config, rows, 0),
        torch.optim.AdamW(model.parameters()), work=Path("unused"), device="cpu", seed=0, progress=silent,
        log_folder=None, distill=config, said=teacher.read(said), coach=coach, insides=insides,
        sampler=Sampler(rows, config.on_policy, config.sample_temperature, 8, [2], 0),
    )  # fmt: skip


def kill_distilling(patch: pytest.MonkeyPatch, *, step: int) -> None:
    """Let every distillation die at the end of that step."""
    make_trainer = distill.make_trainer

    class Dies(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args, state, control, **_):  # type: ignore[no-untyped-def]
            if state.global_step == step:
                raise KeyboardInterrupt

    def dying(*args: object, **kwargs: object) -> object:
        trainer = make_trainer(*args, **kwargs)  # type: ignore[arg-type]
        trainer.add_callback(Dies())
        return trainer

    patch.setattr(distill, "make_trainer", dying)
