"""Supervised fine-tuning with LoRA (arXiv:2106.09685) and QLoRA (arXiv:2305.14314).

peft holds the adapter, bitsandbytes the 4-bit base, `trainer.py` the loop and the loss.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.adapt.base import load_base
from edgetune.adapt.callbacks import last_sealed_checkpoint
from edgetune.adapt.lora_linear import use_fused_layers
from edgetune.adapt.trainer import CompletionTrainer, LabelledHead, history, make_trainer, rows_digest, split
from edgetune.artifact import Artifact, draft, identity
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered
from edgetune.progress import Report, silent
from edgetune.recipe import Adapt

STAGE = "adapt.sft/2"


def planned_identity(config: Adapt, source_identity: str, rows: Sequence[Rendered], seed: int) -> str:
    """Identity of the adapter that `run` would make."""
    return identity(STAGE, _config(config, seed), [source_identity], {"rows": rows_digest(rows)})


def run(
    config: Adapt,
    source: Artifact,
    out: Path,
    *,
    rows: Sequence[Rendered],
    golden: Golden,
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
    log_folder: Path | None = None,
) -> Artifact:
    """Train an adapter on rendered rows and write it as an `adapter` artifact.

    `golden` is stored with it. A run that was killed goes on from its last whole checkpoint, to the same bytes on the
    same machine. Raises DataError where too few rows remain beside those set aside for early stopping.
    """
    data = split(rows, config.eval_rows, seed)
    with draft(
        out,
        kind="adapter",
        stage=STAGE,
        config=_config(config, seed),
        parents=[source],
        sources={"rows": rows_digest(rows)},
    ) as pending:
        torch.manual_seed(seed)  # peft draws the adapter's first values from the global generator
        model, head = attach(config, source.path, device)
        trainer = make_trainer(
            CompletionTrainer, config, model, head, data, make_optimizer(config, model), work=pending.work,
            device=device, seed=seed, progress=progress, log_folder=log_folder,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last_sealed_checkpoint(pending.work))
        save_adapter(model, pending.path, source.identity)
        golden.write(pending.path)
        pending.seed = seed
        pending.fallbacks.extend(data.fallbacks)
        pending.notes.update(history(trainer.state))
        pending.notes["rows"] = {"train": len(data.train), "early_stopping": len(data.evaluate)}
        pending.notes["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return pending.artifact


def attach(config: Adapt, folder: Path, device: str) -> tuple[nn.Module, LabelledHead]:
    """Load the base and put a fresh adapter on all its linear layers."""
    from peft import LoraConfig, get_peft_model

    base = load_base(folder, config.method, device)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    use_fused_layers(lora, keep_dense=config.keep_dense)
    model = get_peft_model(base, lora)
    return model, LabelledHead(base.get_output_embeddings())


def make_optimizer(config: Adapt, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW in which B may learn faster than A (LoRA+, arXiv:2402.12354)."""
    from peft.optimizers import create_loraplus_optimizer

    optimizer: torch.optim.Optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=config.learning_rate, loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay, fused=True,
    )  # fmt: skip
    return optimizer


def save_adapter(model: nn.Module, folder: Path, base_identity: str) -> None:
    """Write adapter weights and config; the config names the base by its identity, not by a path."""
    model.save_pretrained(folder)  # type: ignore[operator]
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_identity
    config["target_modules"] = sorted(config["target_modules"])  # peft writes a set: its order changes between runs
    path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _config(config: Adapt, seed: int) -> dict[str, Any]:
    """What the adapter depends on: where the log goes and how a step is cut do not belong to it."""
    return {**config.model_dump(exclude={"report_to"}), "seed": seed}
