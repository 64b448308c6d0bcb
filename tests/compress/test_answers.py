"""Answers that are not the rows' own: what the student samples (GKD), and what the teacher writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgetune.adapt.trainer import Rows, pad
from edgetune.artifact import Artifact
from edgetune.compress import answers, distill, teacher
from edgetune.compress.on_policy import Sampler, draw, sample
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import ArtifactError, DataError
from edgetune.recipe_distill import Distill
from edgetune.runtime.engine import greedy
from edgetune.runtime.engines.torch_engine import TorchEngine
from tests.compress.conftest import NOTHING, kill_distilling, make_trainer
from tests.oracles import students_float64 as oracle

CONFIG = Distill(batch_size=4, max_steps=6, eval_steps=2, eval_rows=4, learning_rate=5e-3, top_k=16, report_to=[])
SAMPLED = CONFIG.model_copy(update={"on_policy": 0.5, "temperature": 2.0})


@pytest.fixture(scope="module")
def said(tiny_model: Artifact, rows: list[Rendered], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return teacher.run(SAMPLED, tiny_model, tmp_path_factory.mktemp("said") / "pack", rows=rows)


@pytest.fixture
def ending(tiny_model: Artifact, monkeypatch: pytest.MonkeyPatch) -> frozenset[int]:
    """Half of all tokens end what the teacher writes: a random model's answers end nowhere else."""
    stop = list(range(2, 512, 2))
    golden = Golden.read(tiny_model.path).model_copy(update={"stop_ids": stop})
    monkeypatch.setattr(answers, "Golden", SimpleNamespace(read=lambda folder: golden))
    return frozenset(stop)


def test_tokens_are_drawn_as_their_probabilities_say() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 7, dtype=torch.float64) * 2
    p = oracle.softmax(logits[0].numpy())
    numbers = torch.rand(4000, dtype=torch.float64)
    found = draw(logits.expand(len(numbers), -1), numbers)
    assert found.tolist() == [oracle.drawn(p, float(number)) for number in numbers]
    np.testing.assert_allclose(found.bincount(minlength=7) / len(numbers), p, atol=0.02)
    sure = torch.full((2, 5), -torch.inf)
    sure[:, 3] = 0
    assert draw(sure, torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)).tolist() == [3, 3]


def test_answers_are_sampled_together_as_each_alone(student: Artifact) -> None:
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float64).eval()
    prompts, stop = [[5, 6, 7], [9, 30, 31, 32, 33, 34], [40, 41]], [2]
    numbers = np.random.default_rng(0).random((3, 24))
    free = sample(model, prompts, numbers, 1.5, stop)
    stop = [2, free[0][2]]
    found = sample(model, prompts, numbers, 1.5, stop)
    for prompt, given, answer in zip(prompts, numbers, found, strict=True):
        wanted: list[int] = []
        while len(wanted) < 24 and (not wanted or wanted[-1] not in stop):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *wanted]])).logits[0, -1].numpy()
            wanted.append(oracle.drawn(oracle.softmax(logits / 1.5), given[len(wanted)]))
        assert answer == wanted
    assert found[0] == free[0][:3]
    # A temperature near 0 is greedy.
    engine = TorchEngine.load(student.path, n_ctx=64, n_threads=1)
    assert sample(model, prompts, numbers, 1e-4, [2]) == [greedy(engine, p, frozenset({2}), 24) for p in prompts]
    engine.close()


def test_steps_of_the_share_are_spread_and_their_answers_follow_from_seed_step_and_row(
    student: Artifact, rows: list[Rendered]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32).eval()
    plain = replace(rows[5], start=1)
    sampler = Sampler([*rows, plain], 0.3, 1.0, 8, [2], 0)
    assert [step for step in range(20) if sampler.is_due(step)] == [3, 6, 9, 13, 16, 19]
    assert not any(replace(sampler, share=0.0).is_due(step) for step in range(50))
    assert all(replace(sampler, share=1.0).is_due(step) for step in range(50))
    together = sampler.answered(model, [7, 3, 20], 3)
    assert together == [*sampler.answered(model, [7], 3), *sampler.answered(model, [3], 3), plain]
    row, found = rows[3], together[1]
    assert found.ids[: row.start] == row.ids[: row.start]
    assert found.labels == (*row.labels[: row.start], *[True] * (len(found.ids) - row.start))
    assert row.start < len(found.ids) <= row.start + 8
    for other in (sampler.answered(model, [7], 4), replace(sampler, seed=1).answered(model, [7], 3)):
        assert other[0].ids != together[0].ids


def test_the_teacher_judges_what_was_sampled_over_the_whole_vocabulary(
    tiny_model: Artifact, student: Artifact, rows: list[Rendered], said: Artifact
) -> None:
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32)
    trainer = make_trainer(SAMPLED, model, rows, said, coach=NOTHING.coach(tiny_model, "cpu"))
    trainer.state.global_step = 1
    given = [pad([Rows(rows)[place] for place in places]) for places in ((7, 3), (12,))]
    batches, n_labels = trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))
    assert model.training
    assert int(n_labels) == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    trainer.state.global_step = 2
    assert trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))[0] == given
    with torch.no_grad():
        found = sum(float(trainer.compute_loss(model, batch, num_items_in_batch=1)) for batch in batches)
    models = [AutoModelForCausalLM.from_pretrained(one.path, dtype=torch.float64) for one in (tiny_model, student)]
    wanted = 0.0
    for place in (7, 3, 12):
        (row,) = Sampler(rows, 0.5, 1.0, 8, [2], 0).answered(model.eval(), [place], 1)
        with torch.no_grad():
            logits = [one(torch.tensor([row.ids])).logits[0].numpy() / 2.0 for one in models]
        for at in (t - 1 for t, label in enumerate(row.labels) if label):
            p, q = (oracle.softmax(one[at]) for one in logits)
            wanted += 4.0 * oracle.divergence(p, q, reverse=False, skew=0.0)  # and no share of the labels
    assert found == pytest.approx(wanted, rel=0.02)  # the teacher may be in bfloat16


@pytest.mark.parametrize("micro", [None, 2])
def test_a_student_that_samples_goes_on_after_a_kill_to_the_same_bytes(
    micro: int | None, tiny_model: Artifact, student: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = SAMPLED.model_copy(update={"micro_batch_size": micro, "max_new_tokens": 12, "divergence": "reverse"})
    sampled: list[tuple[int, tuple[int, ...]]] = []
    answered = Sampler.answered

    def watched(self: Sampler, model: Any, places: list[int], step: int) -> list[Rendered]:
        found = answered(self, model, places, step)
        sampled.extend((step, row.ids) for row in found)
        return found

    monkeypatch.setattr(Sampler, "answered", watched)

    def run(out: str) -> Artifact:
        return distill.run(config, student, tiny_model, said, tmp_path / out, rows=rows)

    whole = run("whole")
    seen, sampled[:] = list(sampled), []
    assert sorted({step for step, _ in seen}) == [1, 3, 5]
    assert len(seen) == 12
    losses = [loss for _, loss in whole.manifest.notes["heldout_loss"]]
    assert losses[-1] < losses[0]
    with monkeypatch.context() as patch:
        kill_distilling(patch, step=5)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    sampled.clear()
    assert run("cut").manifest.files == whole.manifest.files
    assert sampled == [one for one in seen if one[0] >= 4]


def test_the_teacher_writes_what_the_student_learns(
    tiny_model: Artifact, student: Artifact, rows: list[Rendered], ending: frozenset[int], tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"answers": "teacher", "max_new_tokens": 6})
    plain = replace(rows[0], start=1)
    given, digest = [*rows, plain], rows_digest([*rows, plain])
    written = answers.run(config, tiny_model, tmp_path / "answers", rows=given)
    assert written.identity == answers.planned_identity(config, tiny_model.identity, digest)
    found = answers.read(written, given)
    engine = TorchEngine.load(tiny_model.path, n_ctx=128, n_threads=1)
    kept = 0
    for row, new in zip(rows, found, strict=False):
        answer = greedy(engine, row.ids[: row.start], ending, 6)
        if answer[-1] not in ending:
            kept += 1
            assert new == row
            continue
        assert new.ids == (*row.ids[: row.start], *answer)
        assert new.labels == (*row.labels[: row.start], *[True] * len(answer))
        assert new.target_text == engine.detokenize(answer)
    engine.close()
    assert kept < len(rows)
    assert found[len(rows)] == plain
    notes = written.manifest.notes
    assert (notes["answers"], notes["rows"]) == (len(rows) - kept, len(given))
    assert written.manifest.fallbacks[0].startswith(f"{kept + 1} of {len(given)} rows keep their own answer")

    said = teacher.run(config, tiny_model, tmp_path / "said", rows=given, answers=written)
    assert said.identity == teacher.planned_identity(config, tiny_model.identity, digest, answers=written.identity)
    assert teacher.read(said).starts[-1] == sum(row.n_labels for row in found)
    made = distill.run(config, student, tiny_model, said, tmp_path / "made", rows=given, answers=written)
    assert made.identity == distill.planned_identity(
        config, student.identity, tiny_model.identity, said.identity, digest, 0, written.identity
    )
    (written.path / answers.FILE).write_text('{"place": 0}\n')
    with pytest.raises(ArtifactError, match=r"answers\.jsonl is damaged"):
        answers.read(written, given)


def test_the_teacher_goes_on_writing_after_a_kill(
    tiny_model: Artifact, rows: list[Rendered], ending: frozenset[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "CHUNK_ROWS", 8)
    config = CONFIG.model_copy(update={"answers": "teacher", "max_new_tokens": 6})
    whole = answers.run(config, tiny_model, tmp_path / "whole", rows=rows)

    def stop(done: int, total: int, label: str) -> None:
        assert (total, label) == (20, "answers")
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers.run(config, tiny_model, tmp_path / "cut", rows=rows, progress=stop)
    asked: list[int] = []
    write = TorchEngine.continue_rows

    def counted(self: TorchEngine, prompts: Any, *args: Any) -> list[list[int]]:
        asked.append(len(prompts))
        return write(self, prompts, *args)

    monkeypatch.setattr(TorchEngine, "continue_rows", counted)
    made = answers.run(config, tiny_model, tmp_path / "cut", rows=rows)
    assert asked == [4]
    assert made.manifest.files == whole.manifest.files


def test_an_answer_may_have_any_line_separator(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    line = {"place": 3, "line": 4, "ids": [5, 2], "text": "one\u2028two\u2029three\x85four"}
    (tmp_path / answers.FILE).write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    found = answers.read(Artifact(tmp_path, tiny_model.manifest), rows)
    assert found[3].target_text == line["text"]


def test_answers_that_never_end_are_refused(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"answers": "teacher", "max_new_tokens": 1})
    with pytest.raises(DataError, match=r"none of the teacher's 20 answers ends within 1 tokens; set a larger"):
        answers.run(config, tiny_model, tmp_path / "answers", rows=rows)
    assert answers.most_new_tokens(CONFIG, rows) == max(len(row.ids) - row.start for row in rows)
