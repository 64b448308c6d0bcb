"""Distillation: divergences against float64, what the teacher said, the loss, resume after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgetune import devices
from edgetune.adapt.trainer import Rows, pack, pad
from edgetune.artifact import Artifact
from edgetune.compress import distill, teacher
from edgetune.compress.coach import Coach
from edgetune.compress.distill import hidden_loss, position_loss, taught
from edgetune.compress.divergence import EMPTY, bucket_log_probs, divergence, top_tokens
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import DataError, UnsupportedError
from edgetune.recipe_distill import Distill
from edgetune.runtime.engines.torch_engine import TorchEngine
from tests.compress.conftest import kill_distilling, make_trainer
from tests.conftest import make_tiny_model
from tests.oracles import students_float64 as oracle

CONFIG = Distill(
    batch_size=4, max_steps=6, eval_steps=2, eval_rows=4, learning_rate=5e-3, top_k=16, temperature=2.0, report_to=[]
)


@pytest.fixture(scope="module")
def said(tiny_model: Artifact, rows: list[Rendered], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return teacher.run(CONFIG, tiny_model, tmp_path_factory.mktemp("said") / "pack", rows=rows)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("skew", [0.0, 0.3])
@pytest.mark.parametrize("k", [5, 24])
def test_divergence_is_that_of_the_papers(reverse: bool, skew: float, k: int) -> None:
    torch.manual_seed(0)
    z, w = torch.randn(6, 24, dtype=torch.float64) * 3, torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    ids = top_tokens(z, k)
    log_p = bucket_log_probs(z, ids)
    found = divergence(log_p, bucket_log_probs(w, ids), reverse=reverse, skew=skew)
    for n in range(6):
        p, q = (oracle.bucketed(oracle.softmax(x[n].detach().numpy()), ids[n].tolist()) for x in (z, w))
        assert float(found[n].detach()) == pytest.approx(oracle.divergence(p, q, reverse=reverse, skew=skew), abs=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: divergence(log_p, bucket_log_probs(x, ids), reverse=reverse, skew=skew), (w,)
    )
    assert float(divergence(log_p, log_p, reverse=reverse, skew=skew).abs().max()) < 1e-12


def test_a_teacher_that_is_sure_leaves_the_divergence_finite() -> None:
    log_p = torch.tensor([[0.0, -torch.inf]])
    logits = torch.zeros(1, 4, requires_grad=True)
    for reverse in (False, True):
        loss = divergence(log_p, bucket_log_probs(logits, torch.tensor([[2]])), reverse=reverse)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert 0 < float(loss) <= -EMPTY
        assert torch.isfinite(gradient).all()
        assert gradient[0, 2] < 0


def test_the_loss_is_the_stated_mixture() -> None:
    torch.manual_seed(0)
    logits, other = torch.randn(5, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    labels, ids = torch.arange(5), top_tokens(other, 4)
    log_p = bucket_log_probs(other / 3, ids)
    found = position_loss(logits, labels, ids, log_p, temperature=3.0, reverse=True, skew=0.1, label_weight=0.25)
    for n in range(5):
        p = oracle.bucketed(oracle.softmax(other[n].numpy() / 3), ids[n].tolist())
        q = oracle.bucketed(oracle.softmax(logits[n].numpy() / 3), ids[n].tolist())
        wanted = 0.75 * 9 * oracle.divergence(p, q, reverse=True, skew=0.1)
        wanted += 0.25 * -np.log(oracle.softmax(logits[n].numpy())[n])
        assert float(found[n]) == pytest.approx(wanted, abs=1e-9)
    whole = position_loss(
        logits, labels, None, (other / 3).log_softmax(1), temperature=3.0, reverse=False, skew=0.0, label_weight=0.0
    )
    for n in range(5):
        p, q = oracle.softmax(other[n].numpy() / 3), oracle.softmax(logits[n].numpy() / 3)
        assert float(whole[n]) == pytest.approx(9 * oracle.divergence(p, q, reverse=False, skew=0.0), abs=1e-9)
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.allclose(hidden_loss(a, b), ((a - b) ** 2).mean(1) / (b**2).mean(1))
    each = [hidden_loss(a[n : n + 1], b[n : n + 1]) for n in range(3)]
    assert torch.allclose(hidden_loss(a, b), torch.cat(each))  # however positions are batched
    assert float(hidden_loss(b, b).sum()) == 0


def test_what_the_teacher_said_is_its_softmax(tiny_model: Artifact, rows: list[Rendered], said: Artifact) -> None:
    assert said.identity == teacher.planned_identity(CONFIG, tiny_model.identity, rows_digest(rows))
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float64)
    pack_ = teacher.read(said)
    for place in (0, 4, 19):
        row = rows[place]
        with torch.no_grad():
            logits = model(torch.tensor([row.ids])).logits[0].numpy() / CONFIG.temperature
        positions = [t for t, label in enumerate(row.labels) if label]
        ids, log_p = taught(pack_, [place])
        assert len(ids) == len(positions) == row.n_labels
        for n, t in enumerate(positions):
            p = oracle.softmax(logits[t - 1])
            wanted = oracle.bucketed(p, ids[n].tolist())
            np.testing.assert_allclose(np.exp(log_p[n].numpy()), wanted, rtol=0.05, atol=2e-3)  # bfloat16 on some CPUs
            assert int(ids[n, 0]) == int(logits[t - 1].argmax()) or wanted[0] > 0.9 * p.max()


def test_the_teacher_goes_on_after_a_kill(
    tiny_model: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "CHUNK_ROWS", 8)

    def stop(done: int, _: int, __: str) -> None:
        if done == 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher.run(CONFIG, tiny_model, tmp_path / "cut", rows=rows, progress=stop)
    work = tmp_path / ".cut.work"
    assert sorted(file.name for file in work.iterdir()) == ["0.npz", "8.npz"]
    (work / "8.npz").write_bytes((work / "8.npz").read_bytes()[:-40])
    scored: list[int] = []
    score = TorchEngine.score_rows
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "score_rows", lambda self, given: (scored.append(len(given)), score(self, given))[1])
        made = teacher.run(CONFIG, tiny_model, tmp_path / "cut", rows=rows)
    assert scored == [8, 4]
    whole, found = teacher.read(said), teacher.read(made)
    np.testing.assert_array_equal(found.starts, whole.starts)
    np.testing.assert_allclose(found.log_probs, whole.log_probs, atol=0.05)


@pytest.mark.parametrize("collate", [pack, pad])
def test_a_batch_meets_what_was_said_of_its_own_rows(
    collate: Any, tiny_model: Artifact, rows: list[Rendered], said: Artifact
) -> None:
    """The teacher itself, in the student's place, has no divergence from what it said, in any order of rows."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32)
    trainer = make_trainer(CONFIG.model_copy(update={"label_weight": 0.0}), model, rows, said)
    batch = collate([Rows(rows)[place] for place in (7, 3, 12)])
    with torch.no_grad():
        own = float(trainer.compute_loss(model, batch))
        others = float(trainer.compute_loss(model, batch | {"places": torch.tensor([3, 7, 12])}))
    assert abs(own) < others / 10


def test_hidden_states_of_a_batch_are_the_teachers(tiny_model: Artifact, rows: list[Rendered]) -> None:
    coach = Coach.load(tiny_model.path, "cpu", [1])
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float64)
    chosen = [7, 3, 12]
    with torch.no_grad():
        wanted = []
        for place in chosen:
            states = model.model(torch.tensor([rows[place].ids])).last_hidden_state[0]
            wanted.append(states[[t - 1 for t, label in enumerate(rows[place].labels) if label]])
    for collate in (pack, pad):
        batch = collate([Rows(rows)[place] for place in chosen])
        coach.read(batch)
        (found,) = coach.taps.states(batch["labels"][:, 1:] != -100)
        torch.testing.assert_close(found.double(), torch.cat(wanted), rtol=0.1, atol=0.1)  # bfloat16 on some CPUs
    assert torch.equal(coach.projection(64).weight, torch.eye(64))
    assert coach.projection(32).weight.shape == (64, 32)


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_a_student_learns_and_goes_on_after_a_kill_to_the_same_bytes(
    hidden_weight: float, tiny_model: Artifact, student: Artifact, rows: list[Rendered], said: Artifact,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = CONFIG.model_copy(update={"hidden_weight": hidden_weight, "divergence": "reverse", "skew": 0.1})

    def run(out: str, **kwargs: Any) -> Artifact:
        return distill.run(config, student, tiny_model, said, tmp_path / out, rows=rows, **kwargs)

    whole = run("whole")
    losses = [loss for _, loss in whole.manifest.notes["heldout_loss"]]
    assert losses[-1] < losses[0]
    assert whole.identity == distill.planned_identity(
        config, student.identity, tiny_model.identity, said.identity, rows_digest(rows), 0
    )
    with monkeypatch.context() as patch:
        kill_distilling(patch, step=5)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    steps: list[int] = []
    resumed = run("cut", progress=lambda done, total, label: steps.append(done))
    assert steps == [5, 6]
    assert resumed.manifest.files == whole.manifest.files
    assert resumed.manifest.notes == whole.manifest.notes
    _, info = AutoModelForCausalLM.from_pretrained(whole.path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]


def test_weights_are_float32_and_products_what_the_processor_is_fast_at(
    tiny_model: Artifact, student: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path
) -> None:
    seen: set[tuple[torch.dtype, torch.dtype]] = set()

    def spy(module: torch.nn.Module, _args: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            seen.add((module.weight.dtype, output.dtype))

    handle = torch.nn.modules.module.register_module_forward_hook(spy)
    try:
        config = CONFIG.model_copy(update={"max_steps": 1})
        distill.run(config, student, tiny_model, said, tmp_path / "student", rows=rows)
    finally:
        handle.remove()
    assert seen == {(torch.float32, devices.compute_dtype("cpu"))}


def test_another_tokenizer_and_rows_without_labels_are_refused(
    tiny_model: Artifact, student: Artifact, said: Artifact, rows: list[Rendered], tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", layers=1, hidden=32)
    golden = Golden.read(other.path)
    texts = [golden.texts[0].model_copy(update={"ids": [1]}), *golden.texts[1:]]
    golden.model_copy(update={"texts": texts}).write(other.path)
    with pytest.raises(UnsupportedError, match="another tokenizer than the teacher"):
        distill.run(CONFIG, other, tiny_model, said, tmp_path / "out", rows=rows)
    empty = Rendered((1, 2, 3), (False, False, False), 1, "", 1)
    with pytest.raises(DataError, match="no labelled token"):
        teacher.run(CONFIG, tiny_model, tmp_path / "out", rows=[empty] * 10)
