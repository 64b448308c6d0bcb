"""Seconds of an optimizer step, measured: the trainer's own steps on models of the shape that are a few blocks deep.

Embeddings, head, loss and the optimizer take what they take once, a block what it takes for each block; two depths tell
both. Weights and tokens are random, and rows are as long as the mean row, since batches are made of rows of one length.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, EarlyStoppingCallback, TrainerCallback

from edgetune.adapt import methods, sft
from edgetune.adapt.allocator import kept_memory
from edgetune.adapt.ewc import N_ROWS, N_TOKENS, general_rows
from edgetune.adapt.trainer import CompletionTrainer, Rows, Split, make_trainer
from edgetune.data.render import Rendered
from edgetune.progress import silent
from edgetune.recipe_training import Adapt
from edgetune.training_memory import Lengths

DEPTHS = (1, 3)  # blocks
SECONDS, MOST, WARM = 1.0, 12, 1  # of steps at each depth; steps at most, and of them those that make kernels
MOST_FLOP = 1e12  # of a pass at the lesser depth: more rows are measured by fewer


@dataclass(frozen=True)
class StepTime:
    """Seconds of a pass forward and back over the rows at once, and of what follows when the gradients are there."""

    pass_s: float
    update_s: float

    def step_s(self, config: Adapt) -> float:
        """Give the seconds of an optimizer step."""
        return config.batch_size // (config.micro_batch_size or config.batch_size) * self.pass_s + self.update_s


def measure(config: Adapt, model_config: dict[str, Any], lengths: Lengths, device: str) -> StepTime:
    """Measure this machine on the rows at once of a recipe, in some seconds; weights are drawn, none is read."""
    micro = config.micro_batch_size or config.batch_size
    few, many = (_shallow(config, model_config, depth, lengths, device) for depth in DEPTHS)
    more = (int(model_config["num_hidden_layers"]) - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    pass_s, update_s = (a + more * max(b - a, 0.0) for a, b in zip(few, many, strict=True))
    return StepTime(pass_s * micro / _n_rows(micro, model_config, lengths), update_s)


def _n_rows(micro: int, model_config: dict[str, Any], lengths: Lengths) -> int:
    """Give how many rows are measured: those at once, or as many as take no more than some seconds."""
    weights = 4 * int(model_config["hidden_size"]) * int(model_config["intermediate_size"])
    return max(1, min(micro, int(MOST_FLOP / (4 * weights * max(lengths.mean[0], 1)))))


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Times passes and updates, and ends a training that has lasted long enough."""

    def __init__(self, device: str) -> None:
        self.passes: list[float] = []
        self.updates: list[float] = []
        self._gpu = device.startswith("cuda")

    def _now(self) -> float:
        if self._gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = self._now()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._updating = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.passes.append(self._updating - self._began)
        self.updates.append(self._now() - self._updating)
        if len(self.passes) > WARM and sum(self.passes[WARM:]) > SECONDS:
            control.should_training_stop = True


def _shallow(
    config: Adapt, model_config: dict[str, Any], depth: int, lengths: Lengths, device: str
) -> tuple[float, float]:
    """Train a model of that depth for some steps; gives the median seconds of a pass and of an update."""
    n_rows = _n_rows(config.micro_batch_size or config.batch_size, model_config, lengths)
    config = config.model_copy(
        update={"batch_size": n_rows, "micro_batch_size": None, "max_steps": MOST, "report_to": []}
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        AutoModelForCausalLM.from_config(_cut(model_config, depth), dtype=torch.bfloat16).save_pretrained(folder)
        vocabulary = int(model_config["vocab_size"])
        rows = _rows(n_rows * MOST, lengths, vocabulary)
        general = [place % vocabulary for place in range(N_ROWS * N_TOKENS)]
        model, head = sft.attach(config, folder, device)
        trainer = make_trainer(
            CompletionTrainer, config, model, head, Split(Rows(rows), Rows(rows[:1]), 1.0, []),
            methods.make_optimizer(config, model), work=folder, device=device, seed=0, progress=silent, log_folder=None,
            pull=sft.pull_of(config, model, general_rows(general) if config.ewc else [], 0),
        )  # fmt: skip
        clock = _Clock(device)
        trainer.add_callback(clock)
        trainer.remove_callback(EarlyStoppingCallback)
        trainer.args.eval_strategy = trainer.args.save_strategy = "no"
        trainer.args.load_best_model_at_end = False
        with kept_memory():
            trainer.train()
    return statistics.median(clock.passes[WARM:]), statistics.median(clock.updates[WARM:])


def _cut(model_config: dict[str, Any], depth: int) -> Any:
    """Give a config with so many blocks; lists that say something of each block are cut with it."""
    n = int(model_config["num_hidden_layers"])
    cut = {k: v[:depth] if isinstance(v, list) and len(v) == n else v for k, v in model_config.items()}
    return AutoConfig.for_model(**cut | {"num_hidden_layers": depth})


def _rows(n: int, lengths: Lengths, vocabulary: int) -> list[Rendered]:
    """Draw rows of mean length behind what all rows begin with."""
    draw, (tokens, labels) = random.Random(0), lengths.mean
    own, shared = max(round(tokens), 2), [draw.randrange(vocabulary) for _ in range(lengths.shared)]
    learned = min(max(round(labels), 1), own - 1)
    mask = (*[False] * (lengths.shared + own - learned), *[True] * learned)
    rows = []
    for line in range(n):
        ids = (*shared, *(draw.randrange(vocabulary) for _ in range(own)))
        rows.append(Rendered(ids, mask, len(ids) - learned, "", line))
    return rows
