"""A pruned vocabulary through the pipeline: rows, calibration, teacher, scores and times are in the new ids."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from edgetune import pipeline, plan
from edgetune.artifact import Artifact, Store
from edgetune.compress import teacher
from edgetune.compress.distill import Coach, taught
from edgetune.compress.teacher_pack import PackBuilder
from edgetune.data.golden import Golden
from edgetune.errors import EdgetuneError
from edgetune.stages import Stages
from edgetune.steps import Steps
from tests.test_chain import DISTILL, GPTQ
from tests.test_pipeline import make_recipe, run

N = 300
PRUNE = {"vocabulary": N}


def prepared(recipe: Any, tmp_path: Path) -> pipeline.Pipeline:
    stages = Stages(Store(tmp_path / "store"), tmp_path / "run", Console(file=io.StringIO()))
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), stages)
    line.prepare()
    return line


def test_named_tokens_take_their_place_and_the_rest_is_all_others() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 40)).astype(np.float32)
    named = np.array([1, 4, 9, 16, 25, 36])
    builder = PackBuilder()
    builder.add(logits, 3, named)
    pack = builder.build("w", "s")
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert pack.n_vocab == 6
    for row in range(5):
        best = np.argsort(-p[row, named])[:3]
        assert pack.ids[row].tolist() == best.tolist()
        np.testing.assert_allclose(np.exp(pack.log_probs[row]), p[row, named[best]], rtol=1e-5)
        assert np.exp(pack.tail[row]) == pytest.approx(1 - p[row, named[best]].sum(), rel=1e-4)


def test_a_student_of_fewer_tokens_is_taught_and_quantized(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    steps = [{"prune": PRUNE}, {"distill": DISTILL | {"hidden_weight": 1}}, {"gptq": GPTQ}]
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates={"a": {"compress": steps}})
    line = prepared(recipe, tmp_path)
    made = Steps(recipe, line.stages, line.graph, line.base, line.adapt()).run("a", recipe.candidates["a"])
    assert not line.stages.failures, line.stages.failures
    assert made is not None
    assert [one.identity for one in made] == line.graph.steps(recipe.candidates["a"])
    cut = line.graph.cut(N)
    assert cut is not None
    assert cut.same_rows
    assert all(Golden.read(one.path) == Golden.read(made[0].path) for one in made)
    assert line.graph.calibration(recipe.candidates["a"].compress[2].gptq.calibration, N).ids.max() < N  # type: ignore[union-attr]
    words = Store(tmp_path / "store").get(list(made[1].manifest.parents)[2])
    assert words is not None
    pack = teacher.read(words)
    assert pack.n_vocab == N
    for place in (0, 7):
        before, after = line.work.train[place], cut.work.train[place]
        assert [cut.kept[token] for token in after.ids] == list(before.ids)
        named, _ = taught(pack, [place])
        assert len(named) == after.n_labels
        assert int(named.max()) < N
    ids, whole = (torch.tensor([work.train[0].ids]) for work in (cut.work, line.work))
    keep = torch.ones(1, ids.shape[1] - 1, dtype=torch.bool)
    states = []
    for one, kept in ((ids, cut.kept), (whole, None)):
        coach = Coach.load(line.base.path, "cpu", [1], kept_tokens=kept)
        coach.read({"input_ids": one, "attention_mask": torch.ones_like(one)})
        states += coach.taps.states(keep)
    assert torch.equal(*states)


def test_bits_are_chosen_in_the_tokens_that_are_left(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    allocate = {"budget": 6, "choices": [4, 8], "rows": {"n_samples": 2, "n_tokens": 16}}
    steps = [{"prune": PRUNE}, {"gptq": GPTQ | {"allocate": allocate}}]
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates={"a": {"compress": steps}})
    line = prepared(recipe, tmp_path)
    candidate = recipe.candidates["a"]
    made = Steps(recipe, line.stages, line.graph, line.base, line.adapt()).run("a", candidate)
    assert not line.stages.failures, line.stages.failures
    assert made is not None
    assert [one.identity for one in made] == line.graph.steps(candidate)
    rows = line.graph.measured(candidate.compress[1], N)
    assert rows is not None
    assert rows.ids.max() < N
    assert set(made[1].manifest.scheme["bits_of"].values()) == {4, 8}  # type: ignore[index]


@pytest.mark.slow
def test_what_is_scored_is_compared_row_by_row_and_by_no_probability(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    task = {"name": "levels", "kind": "generation", "metrics": ["exact_match"], "max_new_tokens": 4}
    tasks = [task | {"rows": str(tmp_path / "heldout.jsonl")}]
    recipe = make_recipe(
        tmp_path, tiny_model_wide.path, adapt=None, candidates={"a": {"compress": [{"prune": PRUNE}]}}, tasks=tasks
    )
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    before, after = report.accuracy
    assert before.workload == after.workload
    assert all(row.kl is None and row.n_agree is None for row in after.rows)
    assert after.text is None
    for was, now in zip(before.rows, after.rows, strict=True):
        assert (was.n_tokens, was.exact) == (now.n_tokens, now.exact)
        assert now.nll < was.nll  # the same logits, and fewer others to share with
    assert [task.workload for task in report.tasks] == [report.tasks[0].workload] * 2
    assert any(check.budget.startswith("exact_match") for verdict in report.verdicts for check in verdict.checks)
    assert {one.subject.name for one in report.latency} == {"reference", "a"}


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"prune": {"vocabulary": 100}}], r"candidates\.a: prune\.vocabulary=100: 259 tokens must stay"),
        ([{"prune": {"vocabulary": 512}}], r"candidates\.a: prune\.vocabulary=512 removes nothing, the model has 512"),
        (
            [{"prune": {"vocabulary": 260}}, {"distill": DISTILL}],
            r"candidates\.a: prune\.vocabulary=260 lacks \d+ tokens that training rows use",
        ),
    ],
)
def test_what_a_vocabulary_cannot_be_is_refused_before_training(
    steps: Any, says: str, tmp_path: Path, tiny_model_wide: Artifact
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates={"a": {"compress": steps}})
    with pytest.raises(EdgetuneError, match=says):
        prepared(recipe, tmp_path)
