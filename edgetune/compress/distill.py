"""Distilling the Knowledge in a Neural Network (arXiv:1503.02531): a student learns a teacher's distributions.

The loss of a labelled position is a share of cross-entropy on its label and, for the rest, temperature^2 times a
divergence (`divergence.py`) from what the teacher said of it (`teacher.py`). With `hidden_weight` the student's hidden
states, through learned projections, are also drawn to the teacher's (TinyBERT, arXiv:1909.10351, section 3.1), and with
`relation_weight` how its tokens relate (`relations.py`). With `answers: teacher` the teacher writes what is learned
(`answers.py`), and in the steps of `on_policy` the student does (`on_policy.py`): there the loss is the divergence
alone, over the whole vocabulary, from what the teacher says at once (`coach.py`).
All weights are trained, by adapt's trainer, in float32 whose products are bfloat16 where a processor is fast at it;
with `into` what `into.py` trains of a checkpoint of integers.
Shapes: N labelled positions, C hidden size, K kept tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgetune.adapt import methods, out_of_memory
from edgetune.adapt.curves import diverged, history
from edgetune.adapt.trainer import CompletionTrainer, LabelledHead, Rows, Split, make_trainer
from edgetune.artifact import Artifact, draft, identity, require_space
from edgetune.compress import answers as answering
from edgetune.compress import into, pairing
from edgetune.compress import teacher as teaching
from edgetune.compress.checkpoint import read_config
from edgetune.compress.coach import Coach, Taps
from edgetune.compress.divergence import bucket_log_probs, divergence
from edgetune.compress.layerwise import load_whole
from edgetune.compress.on_policy import Sampler
from edgetune.compress.relations import relation_loss, rows_of
from edgetune.compress.teacher_pack import TeacherPack
from edgetune.data.checks import refuse_untaught
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import UnsupportedError
from edgetune.progress import Report, silent
from edgetune.recipe_distill import Distill
from edgetune.sources import copy_tokenizer

STAGE = "compress.distill/4"
PROJECTION = "distill_projection"
AS_BEFORE = "training brought the integers no nearer to the teacher on the rows set aside: they are as they were"


def planned_identity(
    config: Distill, student: str, teacher: str, said: str, rows: str, seed: int, *answers: str
) -> str:
    """Give the identity of the student that `run` would make, from those of its parents and the digest of its rows."""
    return identity(STAGE, _config(config, seed), [student, teacher, said, *answers], {"rows": rows})


def run(
    config: Distill,
    student: Artifact,
    teacher: Artifact,
    said: Artifact,
    out: Path,
    *,
    rows: Sequence[Rendered],
    kept_tokens: Sequence[int] | None = None,
    answers: Artifact | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
    log_folder: Path | None = None,
) -> Artifact:
    """Train all weights of a `model` artifact on what the teacher says, and write it as a `model` artifact.

    With `config.into` the student is a `gptq` artifact, whose integers stay, and what is written is one of its format.
    `said` is what `teacher.run` wrote for the same rows and `answers`, which `answers.run` wrote to them. `kept_tokens`
    are the teacher's ids that the student has, in the order of the student's, where its vocabulary was pruned: `rows`
    are in the student's ids. A run that was killed goes on from its last whole checkpoint, to the same bytes on the
    same machine. Raises UnsupportedError where the two have other tokenizers or do not fit what is compared, DataError
    where there are too few rows.
    """
    if kept_tokens is None:
        check_tokenizers(student, teacher)
    of_tokenizer = teacher if kept_tokens is None else student
    golden, sources = Golden.read(of_tokenizer.path), {"rows": rows_digest(rows)}
    parents = [student, teacher, said, *([answers] if answers is not None else [])]
    learned = answering.read(answers, rows) if answers is not None else rows
    refuse_untaught(learned, golden.stop_ids)
    data = Split.of(config, learned, seed)
    insides = Insides.of(config, student, teacher)
    sampler = Sampler(
        learned, config.on_policy, config.sample_temperature,
        answering.most_new_tokens(config, learned) if config.on_policy else 0, golden.stop_ids, seed,
    )  # fmt: skip
    integers = config.into is not None
    # Three checkpoints: of float32 weights and two moments; or of what is not quantized, and of little that is trained.
    require_space(out.parent, (4 if integers else 18) * student.size_bytes)
    with draft(
        out, kind="gptq" if integers else "model", stage=STAGE, config=_config(config, seed), parents=parents,
        sources=sources, versions=_versions(),
    ) as pending:  # fmt: skip

        def build(config: Distill, progress: Report) -> DistillTrainer:
            torch.manual_seed(seed)
            model: Any = (
                into.attach(config, student.path, device) if integers else load_whole(student.path, torch.float32)
            )
            model.to(device).train()
            coach = insides.coach(teacher, device, kept_tokens) if config.compares or config.on_policy else None
            if coach is not None and config.hidden_weight:
                size = int(model.config.hidden_size)
                setattr(model, PROJECTION, nn.ModuleList(coach.projection(size) for _ in insides.blocks).to(device))
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=config.learning_rate,
                weight_decay=config.weight_decay, fused=True,
            )  # fmt: skip
            head = LabelledHead(methods.causal_of(model).get_output_embeddings())
            return make_trainer(
                DistillTrainer, config, model, head, data, optimizer,
                work=pending.work, device=device, seed=seed, progress=progress, log_folder=log_folder,
                mixed=not integers, distill=config, said=teaching.read(said), sampler=sampler, coach=coach,
                insides=insides,
            )  # fmt: skip

        trainer, ran_out = out_of_memory.train(build, config, pending.work, progress)
        lost = diverged(trainer)
        model = trainer.model
        pending.notes.update(history(trainer.state))
        if config.hidden_weight:
            delattr(model, PROJECTION)
        if integers:
            before, is_best = into.keep_better(trainer)
            pending.notes["before"] = {config.best_by: float(f"{before:.6g}")}
            lost += [AS_BEFORE] if is_best else []
            pending.scheme = into.write(config, model, student, pending.path)
        else:
            model.to(device="cpu", dtype=_stored_dtype(student)).save_pretrained(pending.path)
            copy_tokenizer(of_tokenizer.path, pending.path)
            golden.write(pending.path)
        hold(pending.path)
        pending.seed = seed
        pending.fallbacks.extend([*data.fallbacks, *ran_out, *lost])
        pending.notes["rows"] = {"train": len(data.train), "early_stopping": len(data.evaluate)}
        if integers:
            pending.notes["trained_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
            pending.notes |= {key: value for key, value in student.manifest.notes.items() if key == "vllm"}
        else:
            pending.notes["parameters"] = sum(p.numel() for p in model.parameters())
    return pending.artifact


def check_tokenizers(student: Artifact, teacher: Artifact) -> None:
    """Raise UnsupportedError where the same text would be other ids: then no probability can be compared."""
    ours, theirs = ([text.ids for text in Golden.read(one.path).texts] for one in (student, teacher))
    if ours != theirs:
        raise UnsupportedError(
            f"student {student.path} has another tokenizer than the teacher {teacher.path}; choose one of its family"
        )


@dataclass(frozen=True)
class Insides:
    """What of a student is compared with its teacher beside their logits."""

    blocks: list[tuple[int, int]]  # (student's, teacher's) whose states are compared
    n_heads: int  # relation heads; 0 where no relations are compared

    @classmethod
    def of(cls, config: Distill, student: Artifact, teacher: Artifact) -> Insides:
        """Read it off both models' `config.json`. Raises UnsupportedError where they do not fit."""
        ours, theirs = read_config(student.path), read_config(teacher.path)
        return cls(
            pairing.paired_blocks(config, ours, theirs) if config.hidden_weight else [],
            pairing.relation_heads(config, ours, theirs) if config.relation_weight else 0,
        )

    def taps(self, student: nn.Module) -> Taps:
        return Taps(student, [block for block, _ in self.blocks], relations=bool(self.n_heads))

    def coach(self, teacher: Artifact, device: str, kept_tokens: Sequence[int] | None = None) -> Coach:
        blocks = [block for _, block in self.blocks]
        return Coach.load(teacher.path, device, blocks, relations=bool(self.n_heads), kept_tokens=kept_tokens)


class DistillTrainer(CompletionTrainer):
    """The trainer with the loss of this file."""

    def __init__(
        self, *args: Any, distill: Distill, said: TeacherPack, sampler: Sampler, coach: Coach | None, insides: Insides,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._config, self._said, self._sampler = distill, said, sampler
        self._coach, self._insides, self._taps = coach, insides, insides.taps(self._causal)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Let the student answer the rows of the next step where it is one of `on_policy`."""
        batches, n_labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        step = self.state.global_step
        if not self._sampler.is_due(step):
            return batches, n_labels
        self.model.eval()
        with self.compute_loss_context_manager():
            batches = [self._answered(batch["places"].tolist(), step) for batch in batches]
        self.model.train()
        return batches, self._get_num_items_in_batch(batches, device)

    def _answered(self, places: list[int], step: int) -> dict[str, Tensor]:
        rows = Rows(self._sampler.answered(self.model, places, step))
        batch: dict[str, Tensor] = self.data_collator([rows[index] for index in range(len(rows))])
        return batch | {"sampled": torch.ones(len(rows))}

    def summed_loss(self, logits: Tensor, labels: Tensor, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        config, live = self._config, "sampled" in inputs
        if live:
            assert self._coach is not None, "a teacher stands by where answers are sampled"
            judged = self._coach.judge(inputs, keep)
            ids, log_p = None, (judged / config.temperature).log_softmax(1)
        else:
            ids, log_p = taught(self._said, inputs["places"].tolist(), logits.device)
        loss = position_loss(
            logits, labels, ids, log_p, temperature=config.temperature, reverse=config.divergence == "reverse",
            skew=config.skew, label_weight=0.0 if live else config.label_weight,
        ).sum()  # fmt: skip
        if self._coach is None or not config.compares:
            return loss
        if not live:
            self._coach.read(inputs)
        return loss + self._compared(self._coach.taps, inputs, keep)

    def _compared(self, theirs: Taps, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Give the summed loss between hidden states, mean over blocks, and between relations."""
        ours, config, loss = self._taps, self._config, torch.zeros((), device=keep.device)
        if self._insides.blocks:
            pairs = zip(ours.states(keep), theirs.states(keep), getattr(self._causal, PROJECTION), strict=True)
            losses = [hidden_loss(projection(x), y).sum() for x, y, projection in pairs]
            loss = loss + config.hidden_weight * torch.stack(losses).mean()
        if self._insides.n_heads:
            related = relation_loss(
                ours.projections(), theirs.projections(), rows_of(inputs, keep), self._insides.n_heads
            )
            loss = loss + config.relation_weight * related.sum()
        ours.forget()
        theirs.forget()
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
    ids: Tensor | None,
    log_p: Tensor,
    *,
    temperature: float,
    reverse: bool,
    skew: float,
    label_weight: float,
) -> Tensor:
    """Give the loss of each position [N] from logits [N, V], labels [N], and what the teacher says at `temperature`.

    That is log-probabilities of the tokens `ids` and of all others, [N, K + 1], or without `ids` of all tokens, [N, V].
    """
    logits_q = logits / temperature
    log_q = logits_q.log_softmax(1) if ids is None else bucket_log_probs(logits_q, ids)
    # A gradient at a temperature is smaller by its square (arXiv:1503.02531, section 2).
    taught = temperature**2 * divergence(log_p, log_q, reverse=reverse, skew=skew)
    if not label_weight:
        return taught
    labelled = functional.cross_entropy(logits, labels, reduction="none")
    return (1 - label_weight) * taught + label_weight * labelled


def hidden_loss(projected: Tensor, states: Tensor) -> Tensor:
    """Give each position's squared distance [N] between hidden states [N, C], in units of the teacher's own square.

    Both are means over the channels of that position alone, so that it does not matter which positions come together.
    """
    return (projected - states).square().mean(1) / states.square().mean(1).clamp(min=1e-12)


def _stored_dtype(student: Artifact) -> torch.dtype:
    return getattr(torch, read_config(student.path).get("dtype") or "bfloat16")  # type: ignore[no-any-return]


def _config(config: Distill, seed: int) -> dict[str, Any]:
    """What the student depends on; where the log goes and how the recipe calls the student do not belong to it."""
    return {**config.model_dump(mode="json", exclude={"report_to", "student"}), "seed": seed}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
