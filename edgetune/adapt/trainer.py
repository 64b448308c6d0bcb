"""The one trainer: Hugging Face's loop, with the output head at labelled positions only.

A prompt's logits are most of the head's work and teach nothing. Adapting and distilling share it; they differ in what
is trained and in the loss of a position.

Shapes: B rows, T tokens, N labelled positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_callback import TrainerState

from edgetune.adapt.callbacks import CheckpointSeal, ProgressReport
from edgetune.adapt.fused_decoder import FusedDecoder
from edgetune.artifact import json_digest
from edgetune.data.render import Rendered
from edgetune.devices import has_fast_bfloat16
from edgetune.errors import DataError
from edgetune.packed import Layout, can_pack, common_prefix, packed_attention
from edgetune.progress import Report
from edgetune.recipe import Training

IGNORE = -100
T = TypeVar("T", bound="CompletionTrainer")


class LabelledHead:
    """Lets the output head see labelled positions only, through a forward pre-hook."""

    def __init__(self, head: nn.Module) -> None:
        self._keep: Tensor | None = None
        self.states: Tensor | None = None  # [N, C], what the head read last
        head.register_forward_pre_hook(self._select)

    def _select(self, _head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._keep is None:
            return None
        self.states = args[0][:, :-1][self._keep]  # [B, T, C] -> [N, C]
        return (self.states,)

    @contextmanager
    def only(self, keep: Tensor) -> Iterator[None]:
        """Within the block, logits are [N, V]: those of the positions where keep [B, T-1] is true."""
        self._keep = keep
        try:
            yield
        finally:
            self._keep = None


class CompletionTrainer(Trainer):  # type: ignore[misc]
    """Hugging Face's Trainer with the loss at labelled positions only."""

    def __init__(self, *args: Any, head: LabelledHead, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head = head
        peft = hasattr(self.model, "get_base_model")
        self._causal = self.model.get_base_model() if peft else self.model  # peft's layers stay inside
        self._fused = FusedDecoder.of(self._causal)
        self.model_accepts_loss_kwargs = True  # the loss is a sum over the whole optimizer step's labels

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        keep = labels != IGNORE
        logits = self._packed(model, inputs, keep) if "lengths" in inputs else self._padded(model, inputs, keep)
        loss = self.summed_loss(logits.float(), labels[keep], inputs, keep)
        if num_items_in_batch is None:
            loss = loss / keep.sum()
        else:
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, {"logits": logits}) if return_outputs else loss

    def summed_loss(self, logits: Tensor, labels: Tensor, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Give the loss summed over labelled positions, from logits [N, V] and labels [N]; a subclass may give its own.

        `inputs` is the batch, `keep` [B, T - 1] where its labels are.
        """
        return functional.cross_entropy(logits, labels, reduction="sum")

    def _packed(self, model: nn.Module, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Logits [N, V] of the labelled positions of packed rows."""
        n_prefix, *lengths = inputs["lengths"].tolist()
        ids, layout = inputs["input_ids"], Layout.of(n_prefix, lengths, keep.device)
        if self._fused is not None:
            states = self._fused.states(ids, layout)[:-1]
            return cast("Tensor", self._causal.get_output_embeddings()(states[keep[0]]))
        with self.head.only(keep), packed_attention(self._causal):
            logits: Tensor = model(
                input_ids=ids, position_ids=layout.positions(), packed=layout, use_cache=False
            ).logits
        return logits

    def _padded(self, model: nn.Module, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        with self.head.only(keep):
            logits: Tensor = model(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).logits
        return logits


def pack(rows: Sequence[dict[str, Any]], share_prefix: bool = True) -> dict[str, Tensor]:
    """Lay rows end to end behind the unlabelled tokens that all of them begin with.

    Gives input_ids and labels [1, S], lengths [1 + B] of the prefix and of each row's own part, and places [B].
    """
    n_prefix = 0
    if share_prefix and len(rows) > 1:  # one unlabelled token is left to each row: it predicts the first label
        limit = min(next(i for i, label in enumerate(row["labels"]) if label != IGNORE) for row in rows) - 1
        n_prefix = common_prefix([row["input_ids"] for row in rows], limit)
    ids = rows[0]["input_ids"][:n_prefix]
    labels = [IGNORE] * n_prefix
    for row in rows:
        ids = ids + row["input_ids"][n_prefix:]
        labels += [IGNORE, *row["labels"][n_prefix + 1 :]]  # nothing of its own row comes before the first token
    lengths = [n_prefix, *(len(row["input_ids"]) - n_prefix for row in rows)]
    return {
        "input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "lengths": torch.tensor(lengths),
        "places": torch.tensor([row["place"] for row in rows]),
    }  # fmt: skip


def pad(rows: Sequence[dict[str, Any]], token: int = 0) -> dict[str, Tensor]:
    """Pad rows on the right, for models that cannot be packed.

    Gives input_ids, labels and attention_mask [B, T], and places [B].
    """
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), longest), token),
        "attention_mask": torch.zeros((len(rows), longest), dtype=torch.long),
        "labels": torch.full((len(rows), longest), IGNORE),
        "places": torch.tensor([row["place"] for row in rows]),
    }
    for index, row in enumerate(rows):
        n = len(row["input_ids"])
        batch["input_ids"][index, :n] = torch.tensor(row["input_ids"])
        batch["attention_mask"][index, :n] = 1
        batch["labels"][index, 1:n] = torch.tensor(row["labels"][1:])
    return batch


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rendered rows as the Trainer wants them; `places` say where each stands in the whole data."""

    def __init__(self, rows: Sequence[Rendered], places: Sequence[int] | None = None) -> None:
        self.column_names = ["input_ids", "labels", "place"]
        self._rows = [
            {
                "input_ids": list(r.ids),
                "labels": [t if k else IGNORE for t, k in zip(r.ids, r.labels, strict=True)],
                "place": place,
            }
            for place, r in zip(places or range(len(rows)), rows, strict=True)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


@dataclass(frozen=True)
class Split:
    """Rows to train on, and rows set aside for early stopping."""

    train: Rows
    evaluate: Rows
    mean_tokens: float  # of a training row
    fallbacks: list[str]


def refuse_unlabelled(rows: Sequence[Rendered]) -> None:
    """Raise DataError where a row teaches nothing."""
    if any(row.n_labels == 0 for row in rows):
        raise DataError("a training row has no labelled token; it would teach nothing")


def split(rows: Sequence[Rendered], eval_rows: int, seed: int) -> Split:
    """Set rows aside, at most a fifth. Raises DataError where a row teaches nothing or too few are left."""
    refuse_unlabelled(rows)
    n_eval = min(eval_rows, len(rows) // 5)
    if n_eval == 0:
        raise DataError(f"{len(rows)} training rows are too few: give at least 5")
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    aside, left = order[:n_eval], order[n_eval:]
    said = f"eval_rows={eval_rows} is more than a fifth of the rows: {n_eval} are used"
    return Split(
        Rows([rows[i] for i in left], left),
        Rows([rows[i] for i in aside], aside),
        sum(len(rows[i].ids) for i in left) / len(left),
        [said] if n_eval < eval_rows else [],
    )


def rows_digest(rows: Sequence[Rendered]) -> str:
    """Digest of token ids and label masks."""
    return json_digest([[list(row.ids), [int(k) for k in row.labels]] for row in rows])


def make_trainer(
    kind: type[T],
    config: Training,
    model: nn.Module,
    head: LabelledHead,
    data: Split,
    optimizer: torch.optim.Optimizer,
    *,
    work: Path,
    device: str,
    seed: int,
    progress: Report,
    log_folder: Path | None,
    **kwargs: Any,
) -> T:
    """Build a trainer of that kind: length-grouped batches, cosine schedule, early stopping, sealed checkpoints.

    `kwargs` are the kind's own.
    """
    micro = config.micro_batch_size or config.batch_size
    accumulation = config.batch_size // micro
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(len(data.train) / (micro * accumulation)))
    every = min(config.eval_steps, steps)
    arguments = TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(config.warmup_ratio * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=torch.device(device).type == "cuda" and has_fast_bfloat16(device),
        use_cpu=torch.device(device).type == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        # Windows of the logged loss end at checkpoints: one that a kill cut could not be told again.
        logging_steps=max(n for n in range(1, 11) if every % n == 0),
        train_sampling_strategy="group_by_length",
        report_to=[name for name in config.report_to if name != "tensorboard"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        seed=seed,
        log_level="error",
    )
    callbacks: list[Any] = [
        CheckpointSeal(),
        ProgressReport(progress, tokens_per_step=data.mean_tokens * config.batch_size),
        EarlyStoppingCallback(early_stopping_patience=config.patience),
    ]
    if "tensorboard" in config.report_to and log_folder is not None:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        callbacks.append(TensorBoardCallback(SummaryWriter(str(log_folder))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = kind(
            model,
            arguments,
            data_collator=pack if can_pack(model) and arguments.world_size == 1 else pad,
            train_dataset=data.train,
            eval_dataset=data.evaluate,
            callbacks=callbacks,
            optimizers=(optimizer, None),
            head=head,
            **kwargs,
        )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer


def history(state: TrainerState) -> dict[str, Any]:
    """Loss curves by step, without times: the manifest must not change from run to run."""
    train = [[e["step"], round(e["loss"], 6)] for e in state.log_history if "loss" in e]
    held = [[e["step"], round(e["eval_loss"], 6)] for e in state.log_history if "eval_loss" in e]
    rate = [[e["step"], e["learning_rate"]] for e in state.log_history if "learning_rate" in e]
    return {"steps": state.global_step, "loss": train, "heldout_loss": held, "learning_rate": rate}
