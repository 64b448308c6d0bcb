"""Supervised fine-tuning, with every method of `adapt.method`; plain text rows make it continued pretraining.

peft holds the adapter, bitsandbytes the 4-bit base, `trainer.py` the loop and the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune import training_memory
from edgetune.adapt import methods, out_of_memory, processes
from edgetune.adapt.callbacks import GradualUnfreezing, KeptWithin, SpeedLog
from edgetune.adapt.curves import diverged, history
from edgetune.adapt.ewc import N_TOKENS, Consolidation, general_rows
from edgetune.adapt.pull import Pull
from edgetune.adapt.trainer import CompletionTrainer, LabelledHead, Rows, Split, make_trainer
from edgetune.artifact import Artifact, identity, json_digest
from edgetune.compress.checkpoint import read_config
from edgetune.data.checks import refuse_untaught
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.data.provenance import Mixture
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import DataError, UnsupportedError
from edgetune.progress import Report, silent
from edgetune.recipe_training import Adapt
from edgetune.sources import copy_tokenizer

STAGE, PREFIX_STAGE = "adapt.sft/6", "adapt.sft/7"
SPEED = "adapt-speed.json"  # in the folder of the logs


def planned_identity(
    config: Adapt, source_identity: str, rows: Sequence[Rendered], seed: int, general: Sequence[int] = (), *,
    golden: Golden, mixture: Mixture | None = None,
) -> str:  # fmt: skip
    """Identity of the adapter that `run` would make."""
    sources = _sources(config, rows, general, golden, mixture)
    return identity(_stage(config), _config(config, seed), [source_identity], sources)


def run(
    config: Adapt,
    source: Artifact,
    out: Path,
    *,
    rows: Sequence[Rendered],
    golden: Golden,
    mixture: Mixture | None = None,
    general: Sequence[int] = (),
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
    log_folder: Path | None = None,
) -> Artifact:
    """Train an adapter on rendered rows and write it as an `adapter` artifact.

    `golden` and `mixture`, the rows' origin, are stored with it; `general` is text that `ewc` guards, as token ids. A
    run that was killed goes on from its last whole checkpoint, to the same bytes on the same machine; one that runs out
    of memory, with fewer rows at once. Raises DataError where too few rows remain beside those set aside for early
    stopping.
    """
    refuse_untaught(rows, golden.stop_ids)
    data = Split.of(config, rows, seed)
    guarded = general_rows(general) if config.ewc else []
    if config.ewc and not guarded:
        raise DataError(f"adapt.ewc wants {N_TOKENS} tokens of general text, found {len(general)}; give data.general")
    asked, full = config, config.method == "full"
    device = processes.own_device(device)
    if not processes.is_first():
        progress, log_folder = silent, None
    if config.memory_gb is not None:
        shape = training_memory.Shape.of(read_config(source.path))
        lengths = training_memory.lengths_of(rows)
        own = config.model_copy(update={"batch_size": config.batch_size // processes.count()})
        own = training_memory.fitted(own, shape, lengths, device, training_memory.number_bytes(device))
        config = own.model_copy(update={"batch_size": config.batch_size})
    made = planned_identity(asked, source.identity, rows, seed, general, golden=golden, mixture=mixture)
    with processes.drafted(
        out,
        kind="model" if full else "adapter",
        stage=_stage(asked),
        config=_config(asked, seed),
        parents=[source],
        sources=_sources(asked, rows, general, golden, mixture),
    ) as pending:

        def build(config: Adapt, progress: Report) -> CompletionTrainer:
            torch.manual_seed(seed)  # peft draws the adapter's first values from the global generator
            model, head = attach(config, source.path, device)
            if config.method == "prefix":
                methods.begin_with(model, first_tokens(data.train, config.virtual_tokens))
            trainer = make_trainer(
                CompletionTrainer, config, model, head, data, methods.make_optimizer(config, model), work=pending.work,
                device=device, seed=seed, progress=progress, log_folder=log_folder,
                pull=pull_of(config, model, guarded, seed),
            )  # fmt: skip
            if config.memory_gb is not None:
                at_once = min(training_memory.EVAL_ROWS, config.micro_batch_size or config.batch_size)
                trainer.args.per_device_eval_batch_size = at_once
            if (usual := _usual_bytes(config, source, rows, device)) is not None:
                trainer.add_callback(KeptWithin(usual))
            if config.unfreeze_steps is not None:
                trainer.add_callback(GradualUnfreezing(model, config.unfreeze_steps))
            if log_folder is not None:
                trainer.add_callback(SpeedLog(log_folder / SPEED, made, data.mean_tokens * config.batch_size))
            return trainer

        trainer, ran_out = out_of_memory.train(build, config, pending.work, progress)
        lost = diverged(trainer)
        if processes.is_first():
            if full:
                trainer.model.to(torch.bfloat16).save_pretrained(pending.path)
                copy_tokenizer(source.path, pending.path)
            else:
                methods.save_adapter(trainer.model, pending.path, source.identity)
            golden.write(pending.path)
            if full:
                hold(pending.path)
            if mixture is not None:
                mixture.write(pending.path)
        if mixture is not None:
            pending.notes["mixture"] = mixture.summary
        pending.seed = seed
        pending.fallbacks.extend([*data.fallbacks, *ran_out, *lost])
        pending.notes.update(history(trainer.state))
        pending.notes["rows"] = {"train": len(data.train), "early_stopping": len(data.evaluate)}
        pending.notes["trained_parameters"] = sum(
            p.numel() for g in trainer.optimizer.param_groups for p in g["params"]
        )
        if config.memory_gb is not None:
            pending.notes["fitted"] = training_memory.said(config)
        if ran_out:
            pending.notes["memory"] = "; ".join(ran_out)
    processes.wait()
    return Artifact.open(out)


def attach(config: Adapt, folder: Path, device: str) -> tuple[nn.Module, LabelledHead]:
    """Load the base as its method trains it, and let its head see labelled positions only."""
    model = methods.attach(config, folder, device)
    return model, LabelledHead(methods.causal_of(model).get_output_embeddings())


def first_tokens(rows: Rows, n: int) -> list[int]:
    """Give the first `n` tokens of the rows, one after the other, and again from the first where they have fewer."""
    return list(islice((token for index in cycle(range(len(rows))) for token in rows[index]["input_ids"]), n))


def _usual_bytes(config: Adapt, source: Artifact, rows: Sequence[Rendered], device: str) -> float | None:
    """Give what a CPU training has resident when half of its kernels are made; None on a GPU and for unknown shapes."""
    if device.startswith("cuda"):
        return None
    try:
        shape = training_memory.Shape.of(read_config(source.path))
    except UnsupportedError:
        return None
    own = config.model_copy(update={"batch_size": config.batch_size // processes.count()})
    lengths, width = training_memory.lengths_of(rows), training_memory.number_bytes(device)
    predicted = training_memory.peak_bytes(own, shape, lengths, device, width)
    return predicted - training_memory.kernel_bytes(own, lengths, device, width) / 2


def pull_of(
    config: Adapt, model: nn.Module, guarded: Sequence[Sequence[int]], seed: int
) -> Callable[[], Tensor] | None:
    """What holds the weights to the base, as far as the recipe asks for it."""
    pulls: list[Callable[[], Tensor]] = []
    if config.l2:
        pulls.append(Pull(model, config.l2))
    if config.ewc:
        pulls.append(Consolidation(model, config.ewc, guarded, seed))
    return (lambda: torch.stack([pull() for pull in pulls]).sum()) if len(pulls) > 1 else next(iter(pulls), None)


def _stage(config: Adapt) -> str:
    return PREFIX_STAGE if config.method == "prefix" else STAGE


def _sources(
    config: Adapt, rows: Sequence[Rendered], general: Sequence[int], golden: Golden, mixture: Mixture | None
) -> dict[str, str]:
    guarded = {"general": json_digest(general_rows(general))} if config.ewc else {}
    origin = {"mixture": json_digest(mixture.model_dump(mode="json"))} if mixture is not None else {}
    told = golden.model_dump(mode="json", exclude_defaults=True)
    return {"rows": rows_digest(rows), "golden": json_digest(told), **origin, **guarded}


def _config(config: Adapt, seed: int) -> dict[str, Any]:
    """What the adapter depends on: where the log goes and what becomes of it later do not belong to it."""
    return {**config.model_dump(exclude={"report_to", "merge"}), "seed": seed}
