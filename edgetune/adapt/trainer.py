"""The one trainer: Hugging Face's loop, with the output head at labelled positions only.

A prompt's logits are most of the head's work and teach nothing. Adapting and distilling share it; they differ in what
is trained and in the loss of a position.

Shapes: B rows, T tokens, N labelled positions, C hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from edgetune.adapt import methods, processes
from edgetune.adapt.allocator import give_back
from edgetune.adapt.callbacks import CheckpointSeal, ProgressReport, tensorboard
from edgetune.adapt.fused_decoder import FusedDecoder
from edgetune.adapt.order import GroupedByLength
from edgetune.data.checks import apart
from edgetune.data.render import Rendered
from edgetune.devices import has_fast_bfloat16
from edgetune.errors import DataError
from edgetune.packed import TOKENS, Layout, can_pack, multiple, packed_attention, shared_start
from edgetune.progress import Report
from edgetune.recipe_training import Training

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
    """Hugging Face's Trainer with the loss at labelled positions only, and exact match where rows are evaluated."""

    def __init__(self, *args: Any, head: LabelledHead, pull: Callable[[], Tensor] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head, self.pull = head, pull
        self._causal = methods.causal_of(self.model)
        self._fused = None if methods.is_prefix(self.model) else FusedDecoder.of(self._causal)
        if self._fused is not None:
            self._fused.checkpointing = self.args.gradient_checkpointing
        # of an evaluation: summed loss, labels, rows that come out exactly, and all
        self._watched = torch.zeros(4, dtype=torch.float64)
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
        summed = self.summed_loss(logits.float(), labels[keep], inputs, keep)
        if num_items_in_batch is None:
            loss = summed / keep.sum()
        else:
            loss = summed / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        if not model.training:
            wrong = logits.detach().argmax(-1) != labels[keep]
            found = (summed.item(), keep.sum().item(), *exact_rows(wrong, inputs, keep))
            self._watched += torch.tensor(found, dtype=torch.float64)
        elif self.pull is not None:
            loss = loss + self.pull() / getattr(self, "current_gradient_accumulation_steps", 1)
        return (loss, {"logits": logits}) if return_outputs else loss

    def summed_loss(self, logits: Tensor, labels: Tensor, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Give the loss summed over labelled positions, from logits [N, V] and labels [N]; a subclass may give its own.

        `inputs` is the batch, `keep` [B, T - 1] where its labels are.
        """
        return functional.cross_entropy(logits, labels, reduction="sum")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Group rows by length over the rows of a step in all processes, so that a step reads the same ones."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        n_rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GroupedByLength(n_rows, self.train_dataset.lengths, self.args.seed, lambda: self.state)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Give all rows to each process: shares are filled up with copies, which would count twice."""
        if self.args.world_size == 1:
            return super().get_eval_dataloader(eval_dataset)
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return torch.utils.data.DataLoader(rows, self.args.eval_batch_size, collate_fn=self.data_collator)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Give the mean loss of all labels, and the share of rows whose every label is the likeliest token.

        The Trainer's own loss is a mean over batches, which another number of rows at once would change. Blocks of an
        evaluation are larger than a step's and of no use to one: what is free goes back before and after.
        """
        self._watched.zero_()
        give_back()
        output = super().evaluation_loop(*args, **kwargs)
        give_back()
        loss, labels, exact, rows = self.accelerator.reduce(self._watched.to(self.args.device)).tolist()
        output.metrics.update(eval_loss=loss / labels, eval_exact_match=exact / rows)
        return output

    def _packed(self, model: nn.Module, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Logits [N, V] of the labelled positions of packed rows."""
        n_prefix, *lengths = inputs["lengths"].tolist()
        ids = inputs["input_ids"]
        layout = Layout.of(n_prefix, lengths, keep.device, n_tokens=ids.shape[1])
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


def exact_rows(wrong: Tensor, inputs: dict[str, Tensor], keep: Tensor) -> tuple[int, int]:
    """Count rows without a wrong label, and all rows: wrong [N] at the positions where keep [B, T-1] is true."""
    if "lengths" in inputs:
        n_prefix, *lengths = inputs["lengths"].tolist()
        row_of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(keep.device)
        rows = row_of[keep[0].nonzero().flatten() + 1 - n_prefix]  # position p predicts token p + 1
        n_rows = len(lengths)
    else:
        rows, n_rows = keep.nonzero()[:, 0], len(keep)
    errors = torch.zeros(n_rows, device=keep.device).index_add_(0, rows, wrong.float())
    return int((errors == 0).sum()), n_rows


def pack(rows: Sequence[dict[str, Any]], share_prefix: bool = True) -> dict[str, Tensor]:
    """Lay rows end to end behind the unlabelled tokens that all of them begin with.

    Gives input_ids and labels [1, S], filled up to a multiple of TOKENS, lengths [1 + B] of the prefix and of each
    row's own part, and places [B].
    """
    n_prefix = 0
    if share_prefix and len(rows) > 1:  # one unlabelled token is left to each row: it predicts the first label
        limit = min(next(i for i, label in enumerate(row["labels"]) if label != IGNORE) for row in rows) - 1
        n_prefix = shared_start([row["input_ids"] for row in rows], limit)
    ids = rows[0]["input_ids"][:n_prefix]
    labels = [IGNORE] * n_prefix
    for row in rows:
        ids = ids + row["input_ids"][n_prefix:]
        labels += [IGNORE, *row["labels"][n_prefix + 1 :]]  # nothing of its own row comes before the first token
    lengths = [n_prefix, *(len(row["input_ids"]) - n_prefix for row in rows)]
    n_filling = multiple(len(ids), TOKENS) - len(ids)
    ids, labels = ids + [0] * n_filling, labels + [IGNORE] * n_filling
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
    """Rendered rows as the Trainer wants them, each made when it is asked for; `places` choose some of them."""

    def __init__(self, rows: Sequence[Rendered], places: Sequence[int] | None = None) -> None:
        self.column_names = ["input_ids", "labels", "place"]
        self._rows, self._places = rows, range(len(rows)) if places is None else places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(self._rows[place].ids) for place in self._places]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._rows[place := self._places[index]]
        labels = [token if learned else IGNORE for token, learned in zip(row.ids, row.labels, strict=True)]
        return {"input_ids": list(row.ids), "labels": labels, "place": place}


@dataclass(frozen=True)
class Split:
    """Rows to train on, and rows set aside that training is watched by."""

    train: Rows
    evaluate: Rows
    mean_tokens: float  # of a training row
    fallbacks: list[str]

    @classmethod
    def of(cls, config: Training, rows: Sequence[Rendered], seed: int) -> Split:
        """Set rows aside, and leave copies of them out of training. Raises DataError where too few rows remain."""
        aside, others = set_aside(config, rows, seed)
        train = apart(rows, others, aside)
        if not train:
            raise DataError(
                f"all {len(others)} training rows are copies of the {len(aside)} rows that are set aside to watch "
                "training; give more different rows"
            )
        fallbacks = []
        if len(aside) < config.eval_rows:
            fallbacks.append(f"eval_rows={config.eval_rows} is more than a fifth of the rows: {len(aside)} are used")
        if len(train) < len(others):
            fallbacks.append(
                f"{len(others) - len(train)} copies of rows set aside for early stopping were left out of training"
            )
        return cls(
            Rows(rows, train),
            Rows(rows, aside),
            sum(len(rows[i].ids) for i in train) / len(train),
            fallbacks,
        )


def set_aside(config: Training, rows: Sequence[Rendered], seed: int) -> tuple[list[int], list[int]]:
    """Draw the places of the rows that training is watched by, and give them and the others.

    Raises DataError where none remain.
    """
    n_eval = min(config.eval_rows, len(rows) // 5)
    if n_eval == 0:
        raise DataError(f"{len(rows)} training rows are too few: give at least 5")
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    return order[:n_eval], order[n_eval:]


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
    mixed: bool = False,
    **kwargs: Any,
) -> T:
    """Build a trainer of that kind: length-grouped batches, cosine schedule, early stopping, sealed checkpoints.

    `mixed` has a CPU compute products of float32 weights in bfloat16 where that is native, as a GPU always does.
    `kwargs` are the kind's own.
    """
    micro, accumulation = processes.share(config.batch_size, config.micro_batch_size)
    steps = config.max_steps or math.ceil(config.epochs * math.ceil(len(data.train) / config.batch_size))
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
        gradient_checkpointing=config.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if config.gradient_checkpointing else None,
        ddp_find_unused_parameters=False,
        bf16=(mixed or torch.device(device).type == "cuda") and has_fast_bfloat16(device),
        use_cpu=torch.device(device).type == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        metric_for_best_model=f"eval_{config.best_by}",
        greater_is_better=config.best_by == "exact_match",
        # Windows of the logged loss end at checkpoints: one that a kill cut could not be told again.
        logging_steps=max(n for n in range(1, 11) if every % n == 0),
        train_sampling_strategy="group_by_length",
        report_to=[name for name in config.report_to if name != "tensorboard"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        logging_nan_inf_filter=False,
        seed=seed,
        log_level="error",
    )
    processes.hold_to(arguments, device)
    callbacks: list[Any] = [
        CheckpointSeal(),
        ProgressReport(progress, tokens_per_step=data.mean_tokens * config.batch_size),
        EarlyStoppingCallback(early_stopping_patience=config.patience),
        *tensorboard(config.report_to, log_folder),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer = kind(
            model,
            arguments,
            data_collator=pack if arguments.world_size == 1 and _packs(model, config) else pad,
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


def _packs(model: nn.Module, config: Training) -> bool:
    """Whether rows may be packed; a prefix goes before each row of a padded batch.

    Modules that are computed once more on the way back no longer know then that their rows were packed.
    """
    if config.gradient_checkpointing and FusedDecoder.of(methods.causal_of(model)) is None:
        return False
    return can_pack(model) and not methods.is_prefix(model)
