"""Distilling the Knowledge in a Neural Network (arXiv:1503.02531): a student learns a teacher's distributions.

The loss of a labelled position is a share of cross-entropy on its label and, for the rest, temperature^2 times a
divergence (`divergence.py`) from what the teacher said of it (`teacher.py`). With `hidden_weight` the student's last
hidden state, through a learned projection, is also drawn to the teacher's (TinyBERT, arXiv:1909.10351, section 3.1).
All weights are trained, by adapt's trainer. Shapes: N labelled positions, C hidden size, K kept tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt import out_of_memory
from edgetune.adapt.trainer import CompletionTrainer, LabelledHead, Split, history, make_trainer
from edgetune.artifact import Artifact, draft, identity, require_space
from edgetune.compress import teacher as teaching
from edgetune.compress.divergence import bucket_log_probs, divergence
from edgetune.compress.teacher_pack import TeacherPack
from edgetune.data.checks import refuse_untaught
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import UnsupportedError
from edgetune.packed import Layout, packed_attention
from edgetune.progress import Report, silent
from edgetune.recipe import Distill
from edgetune.sources import copy_tokenizer

STAGE = "compress.distill/2"
PROJECTION = "distill_projection"


def planned_identity(config: Distill, student: str, teacher: str, said: str, rows: str, seed: int) -> str:
    """Give the identity of the student that `run` would make, from those of its parents and the digest of its rows."""
    return identity(STAGE, _config(config, seed), [student, teacher, said], {"rows": rows})


def run(
    config: Distill,
    student: Artifact,
    teacher: Artifact,
    said: Artifact,
    out: Path,
    *,
    rows: Sequence[Rendered],
    kept_tokens: Sequence[int] | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
    log_folder: Path | None = None,
) -> Artifact:
    """Train all weights of a `model` artifact on what the teacher says, and write it as a `model` artifact.

    `said` is what `teacher.run` wrote for the same rows. `kept_tokens` are the teacher's ids that the student has, in
    the order of the student's, where its vocabulary was pruned: `rows` are in the student's ids. A run that was killed
    goes on from its last whole checkpoint, to the same bytes on the same machine. Raises UnsupportedError where the two
    have other tokenizers, DataError where there are too few rows.
    """
    from transformers import AutoModelForCausalLM

    if kept_tokens is None:
        check_tokenizers(student, teacher)
    of_tokenizer = teacher if kept_tokens is None else student
    golden = Golden.read(of_tokenizer.path)
    refuse_untaught(rows, golden.stop_ids)
    data = Split.of(config, rows, seed)
    require_space(out.parent, 18 * student.size_bytes)  # three checkpoints of float32 weights and two moments
    with draft(
        out, kind="model", stage=STAGE, config=_config(config, seed), parents=[student, teacher, said],
        sources={"rows": rows_digest(rows)}, versions=_versions(),
    ) as pending:  # fmt: skip

        def build(config: Distill, progress: Report) -> DistillTrainer:
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32, local_files_only=True)
            model.to(device).train()
            coach = Coach.load(teacher.path, device, kept_tokens) if config.hidden_weight else None
            if coach is not None:
                setattr(model, PROJECTION, coach.projection(int(model.config.hidden_size)).to(device))
            optimizer = torch.optim.AdamW(
                model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
            )
            return make_trainer(
                DistillTrainer, config, model, LabelledHead(model.get_output_embeddings()), data, optimizer,
                work=pending.work, device=device, seed=seed, progress=progress, log_folder=log_folder,
                distill=config, said=teaching.read(said), coach=coach,
            )  # fmt: skip

        trainer, ran_out = out_of_memory.train(build, config, pending.work, progress)
        model = trainer.model
        if config.hidden_weight:
            delattr(model, PROJECTION)
        model.to(device="cpu", dtype=_stored_dtype(student)).save_pretrained(pending.path)
        copy_tokenizer(of_tokenizer.path, pending.path)
        golden.write(pending.path)
        hold(pending.path)
        pending.seed = seed
        pending.fallbacks.extend([*data.fallbacks, *ran_out])
        pending.notes.update(history(trainer.state))
        pending.notes["rows"] = {"train": len(data.train), "early_stopping": len(data.evaluate)}
        pending.notes["parameters"] = sum(p.numel() for p in model.parameters())
    return pending.artifact


def check_tokenizers(student: Artifact, teacher: Artifact) -> None:
    """Raise UnsupportedError where the same text would be other ids: then no probability can be compared."""
    ours, theirs = ([text.ids for text in Golden.read(one.path).texts] for one in (student, teacher))
    if ours != theirs:
        raise UnsupportedError(
            f"student {student.path} has another tokenizer than the teacher {teacher.path}; choose one of its family"
        )


class Coach:
    """The teacher beside the student, for its hidden states."""

    def __init__(self, model: Any, kept_tokens: Tensor | None = None) -> None:
        self._model, self._kept = model, kept_tokens

    @classmethod
    def load(cls, folder: Path, device: str, kept_tokens: Sequence[int] | None = None) -> Coach:
        """Load the teacher frozen, in the dtype that the device computes fast; `kept_tokens` as `run` takes them."""
        from edgetune.adapt.base import load_base

        kept = None if kept_tokens is None else torch.tensor(kept_tokens, device=device)
        return cls(load_base(folder, device, four_bit=False).eval(), kept)

    def projection(self, student_size: int) -> nn.Linear:
        """Give the learned map from the student's hidden states to the teacher's; the identity where sizes agree."""
        size = int(self._model.config.hidden_size)
        projection = nn.Linear(student_size, size, bias=False)
        if size == student_size:
            nn.init.eye_(projection.weight)
        return projection

    @torch.no_grad()
    def states(self, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Give the last hidden states [N, C] at the labelled positions of a batch, as `LabelledHead` picks them."""
        decoder, ids = self._model.get_decoder(), inputs["input_ids"]
        if self._kept is not None:
            ids = self._kept[ids]
        if "lengths" in inputs:
            n_prefix, *lengths = inputs["lengths"].tolist()
            layout = Layout.of(n_prefix, lengths, keep.device, n_tokens=ids.shape[1])
            with packed_attention(self._model):
                found = decoder(input_ids=ids, position_ids=layout.positions(), packed=layout, use_cache=False)
        else:
            found = decoder(input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False)
        states: Tensor = found.last_hidden_state[:, :-1][keep]
        return states.float()


class DistillTrainer(CompletionTrainer):
    """The trainer with the loss of this file."""

    def __init__(self, *args: Any, distill: Distill, said: TeacherPack, coach: Coach | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config, self._said, self._coach = distill, said, coach

    def summed_loss(self, logits: Tensor, labels: Tensor, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        config = self._config
        ids, log_p = taught(self._said, inputs["places"].tolist(), logits.device)
        loss = position_loss(
            logits, labels, ids, log_p, temperature=config.temperature, reverse=config.divergence == "reverse",
            skew=config.skew, label_weight=config.label_weight,
        ).sum()  # fmt: skip
        if self._coach is not None:
            assert self.head.states is not None, "the head has just run"
            projected = getattr(self._causal, PROJECTION)(self.head.states)
            loss = loss + config.hidden_weight * hidden_loss(projected, self._coach.states(inputs, keep)).sum()
        return loss


def taught(said: TeacherPack, places: Sequence[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Give the teacher's tokens [N, K] and log-probabilities [N, K + 1] at the labelled positions of some rows."""
    spans = [slice(int(said.starts[place]), int(said.starts[place + 1])) for place in places]
    ids = np.concatenate([said.ids[span] for span in spans]).astype(np.int64)
    log_p = np.concatenate([np.column_stack([said.log_probs[span], said.tail[span]]) for span in spans])
    return torch.from_numpy(ids).to(device), torch.from_numpy(log_p).to(device)


def position_loss(
    logits: Tensor,
    labels: Tensor,
    ids: Tensor,
    log_p: Tensor,
    *,
    temperature: float,
    reverse: bool,
    skew: float,
    label_weight: float,
) -> Tensor:
    """Give the loss of each position [N] from logits [N, V], labels [N], and the teacher's buckets at `temperature`."""
    log_q = bucket_log_probs(logits / temperature, ids)
    # A gradient at a temperature is smaller by its square (arXiv:1503.02531, section 2).
    taught = temperature**2 * divergence(log_p, log_q, reverse=reverse, skew=skew)
    if not label_weight:
        return taught
    labelled = functional.cross_entropy(logits, labels, reduction="none")
    return (1 - label_weight) * taught + label_weight * labelled


def hidden_loss(projected: Tensor, states: Tensor) -> Tensor:
    """Give each position's squared distance [N] between hidden states [N, C], in units of the teacher's own square."""
    return (projected - states).square().mean(1) / states.square().mean().clamp(min=1e-12)


def _stored_dtype(student: Artifact) -> torch.dtype:
    from edgetune.compress.checkpoint import read_config

    return getattr(torch, read_config(student.path).get("dtype") or "bfloat16")  # type: ignore[no-any-return]


def _config(config: Distill, seed: int) -> dict[str, Any]:
    """What the student depends on; where the log goes and how the recipe calls the student do not belong to it."""
    return {**config.model_dump(mode="json", exclude={"report_to", "student"}), "seed": seed}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
