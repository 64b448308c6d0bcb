"""Methods through the whole pipeline on the tiny Llama: apart, trained as a whole, preferred, with a measured merge."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgetune import pipeline, plan, single
from edgetune.artifact import Artifact, Store
from edgetune.errors import DataError, RecipeError
from edgetune.outcome import Outcome
from edgetune.recipe import Recipe
from edgetune.stages import Stages
from tests.test_pipeline import make_recipe, run

pytestmark = pytest.mark.usefixtures("known_speeds")
ADAPT = {"batch_size": 8, "max_steps": 4, "eval_steps": 2, "eval_rows": 4}
DPO = {"method": "dpo", "r": 4, "batch_size": 4, "max_steps": 2, "learning_rate": 1e-2}
GRPO = {
    "method": "grpo", "r": 4, "batch_size": 4, "generations": 2, "max_steps": 1, "max_new_tokens": 4,
    "rewards": [{"json_valid": {}}, {"length": {"characters": 10, "weight": 0.5}}],
}  # fmt: skip
CHECKPOINT = {"candidates": {"checkpoint": {"compress": [{"rtn": {"group_size": 32}}]}}}


def recipe_of(folder: Path, base: Artifact, **changes: Any) -> Recipe:
    quick: dict[str, Any] = {
        "bench": {"prompt_tokens": [4], "new_tokens": 2, "repeats": 1, "runs": 1, "warmup": 1, "threads": 1}
    }
    return make_recipe(folder, base.path, **quick | changes)


def write_pairs(folder: Path) -> str:
    pairs = folder / "pairs.jsonl"
    rows = [{"prompt": f"set it to {n}", "chosen": f'{{"level":{n}}}', "rejected": "no"} for n in range(8)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(pairs)


def planned_is_made(recipe: Recipe, tmp_path: Path, report: Any) -> None:
    planned = plan.plan(recipe, Store(tmp_path / "store"))
    assert {stage.name for stage in planned} == {stage["name"] for stage in report.stages}
    assert all(stage.done is not False for stage in planned)
    assert all(stage.cost.seconds > 0 for stage in planned)
    unmade = plan.plan(recipe, Store(tmp_path / "empty"))
    assert [stage.name for stage in unmade] == [stage.name for stage in planned]


def trained(recipe: Recipe, tmp_path: Path) -> pipeline.Pipeline:
    """Do what `edgetune adapt` does."""
    stages = Stages(Store(tmp_path / "store"), tmp_path / "run", Console(file=io.StringIO()))
    work = pipeline.Pipeline(recipe, plan.preflight(recipe), stages)
    work.prepare()
    work.adapt()
    return work


@pytest.mark.parametrize(
    ("adapt", "prefer", "made", "kind"),
    [
        (ADAPT | {"method": "prefix", "virtual_tokens": 4}, None, ["base", "adapt"], "adapter"),
        (ADAPT | {"method": "full", "learning_rate": 1e-3}, None, ["base", "adapt"], "model"),
        (ADAPT | {"r": 4, "merge": "auto"}, DPO, ["base", "adapt", "merge", "prefer", "merge preferred"], "model"),
        (None, GRPO, ["base", "prefer", "merge preferred"], "model"),
    ],
)
def test_each_chain_makes_what_is_planned(
    tmp_path: Path, tiny_model_wide: Artifact, adapt: Any, prefer: Any, made: list[str], kind: str
) -> None:
    recipe = recipe_of(tmp_path, tiny_model_wide, adapt=adapt, candidates={"plain": {}})
    if prefer is not None:
        rows = write_pairs(tmp_path) if prefer is DPO else recipe.data.train
        prefer = prefer | {"train": rows}
        recipe = recipe_of(tmp_path, tiny_model_wide, adapt=adapt, prefer=prefer, candidates={"plain": {}})
    work = trained(recipe, tmp_path)
    assert [stage["name"] for stage in work.stages.done] == made
    assert work.model.manifest.kind == kind
    planned = plan.plan(recipe, Store(tmp_path / "store"))
    assert [stage.name for stage in planned if stage.done] == made
    assert all(stage.cost.seconds > 0 and stage.cost.memory_mib > 0 for stage in planned)
    unmade = plan.plan(recipe, Store(tmp_path / "empty"))
    assert [stage.name for stage in unmade] == [stage.name for stage in planned]
    assert isinstance(single.generate(work.model.path, "hello", None, 3, 1), str)
    again = trained(recipe, tmp_path)
    assert all(stage["done_before"] for stage in again.stages.done)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"method": "prefix", "virtual_tokens": 4}, {"r": 4, "merge": "separate"}])
def test_an_adapter_stays_apart_and_answers(tmp_path: Path, tiny_model_wide: Artifact, method: dict[str, Any]) -> None:
    recipe = recipe_of(tmp_path, tiny_model_wide, adapt=ADAPT | method, candidates={"apart": {}})
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    assert [seam.hop for seam in report.seams] == ["base", "adapter kept apart", "apart: 16-bit"]
    base, apart = report.seams[0], report.seams[2]
    assert apart.nll_per_token != base.nll_per_token
    assert apart.kl_per_token == pytest.approx(0, abs=3e-5)  # what the reference pack's rounding may add
    adapter = Artifact.open(tmp_path / "run" / "candidates" / "apart")
    assert adapter.manifest.kind == "adapter"
    base_of_it = Store(tmp_path / "store").get(next(iter(adapter.manifest.parents)))
    assert base_of_it is not None
    (size,) = [check.value for verdict in report.verdicts for check in verdict.checks if check.budget == "size_mb"]
    assert size == pytest.approx((base_of_it.size_bytes + adapter.size_bytes) / 1e6)
    assert isinstance(single.generate(tmp_path / "run" / "candidates" / "apart", "hello", None, 3, 1), str)
    planned_is_made(recipe, tmp_path, report)


@pytest.mark.slow
def test_all_weights_trained_go_on_without_a_merge(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    recipe = recipe_of(tmp_path, tiny_model_wide, adapt=ADAPT | {"method": "full", "learning_rate": 1e-3}, **CHECKPOINT)
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    assert [seam.hop for seam in report.seams] == ["base", "trained", "checkpoint: rtn int4 g32 sym"]
    assert "merge" not in {stage["name"] for stage in report.stages}
    planned_is_made(recipe, tmp_path, report)


@pytest.mark.slow
def test_adapted_then_preferred_with_a_measured_merge(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    prefer = DPO | {"train": write_pairs(tmp_path)}
    adapt = ADAPT | {"r": 4, "alpha": 8, "merge": "auto"}
    recipe = recipe_of(tmp_path, tiny_model_wide, adapt=adapt, prefer=prefer, **CHECKPOINT)
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    assert [seam.hop for seam in report.seams] == [
        "on rows set aside: adapter on the nf4 base",
        "on rows set aside: base16",
        "on rows set aside: base4",
        "base",
        "adapter on the nf4 base",
        "adapted",
        "preferred adapter on the nf4 model",
        "preferred",
        "checkpoint: rtn int4 g32 sym",
    ]
    assert report.training["merged_into"] in ("base16", "base4")
    assert len(report.training["preference"]["loss"]) == 2
    assert report.training["tokens_per_s"]
    assert report.training["preference"]["tokens_per_s"]
    planned_is_made(recipe, tmp_path, report)


@pytest.mark.slow
def test_preferred_alone(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    prefer = GRPO | {"train": str(tmp_path / "train.jsonl")}
    recipe = recipe_of(tmp_path, tiny_model_wide, adapt=None, prefer=prefer, **CHECKPOINT)
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    hops = ["base", "preferred adapter on the nf4 model", "preferred", "checkpoint: rtn int4 g32 sym"]
    assert [seam.hop for seam in report.seams] == hops
    planned_is_made(recipe, tmp_path, report)


def test_what_fell_back_on_the_way_is_in_the_report(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    prefer = DPO | {"train": write_pairs(tmp_path), "max_length": 45, "merge": "auto"}
    adapt = ADAPT | {"r": 4, "eval_rows": 64, "merge": "base4"}
    recipe = recipe_of(tmp_path, tiny_model_wide, adapt=adapt, prefer=prefer, candidates={"plain": {}})
    longer = [{"prompt": "long " * 40, "chosen": "yes", "rejected": "no"}]
    with Path(prefer["train"]).open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in longer))
    for _ in range(2):  # made, then found in the store
        work = trained(recipe, tmp_path)
        found = Outcome(recipe, work.stages, work.work, work.trained, [], {})
        said = found.fallbacks()
        assert len(said) == 2
        assert said[0].startswith("adapt: eval_rows=64 is more than a fifth of the rows: ")
        assert said[1] == "prefer: 1 rows are longer than prefer.max_length=45 and left out"
        found.shipped["plain"] = work.trained.preferred  # which says it in its own manifest
        assert found.fallbacks() == said[:1]
    hops = [(hop, artifact.manifest.kind) for hop, _, artifact in work.trained.before(recipe)]
    assert hops == [
        ("base", "model"), ("adapter on the nf4 base", "adapter"), ("adapted", "model"),
        ("preferred adapter on the nf4 model", "adapter"),
    ]  # fmt: skip
    assert work.trained.under(recipe, work.trained.preferred) == (work.trained.adapted, True)
    assert [seam.hop for seam in work.trained.tried_merges()] == [
        f"preferred, on rows set aside: {name}" for name in ("adapter on the nf4 base", "base16", "base4")
    ]
    notes = work.trained.notes(tmp_path / "run")
    assert notes["merged_into"] == "base4"
    assert notes["preference"]["merged_into"] in ("base16", "base4")
    assert notes["preference"]["tokens_per_s"]


def test_preference_rows_are_checked_before_any_work(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    pairs = tmp_path / "pairs.jsonl"
    prefer = {"method": "dpo", "train": str(pairs)}
    recipe = recipe_of(tmp_path, tiny_model_wide, prefer=prefer, **CHECKPOINT)
    heldout = json.loads(Path(recipe.data.heldout).read_text().splitlines()[2])
    prompt = [{"role": "system", "content": heldout["instruction"]}, {"role": "user", "content": heldout["input"]}]
    pairs.write_text(json.dumps({"prompt": prompt, "chosen": "a", "rejected": "b"}) + "\n")
    with pytest.raises(DataError, match=r"heldout\.jsonl line 3 is also .*pairs\.jsonl line 1"):
        run(recipe, tmp_path)
    pairs.write_text('{"prompt": "x", "chosen": "a"}\n')
    with pytest.raises(DataError, match=r"pairs\.jsonl line 1"):
        run(recipe, tmp_path)
    rewarded = {"method": "grpo", "train": recipe.data.train, "rewards": [{"function": {"name": "nowhere:score"}}]}
    with pytest.raises(RecipeError, match=r"prefer\.rewards: nowhere:score: nowhere cannot be imported"):
        run(recipe_of(tmp_path, tiny_model_wide, prefer=rewarded, **CHECKPOINT), tmp_path)
    assert not (tmp_path / "store").exists()
