"""What each choice of bits could keep of the training, and the allocation that is held to it."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from edgetune import pipeline, plan
from edgetune.artifact import Artifact, Store, draft
from edgetune.compress import quantize, sensitivity, update_kept, update_left
from edgetune.compress.allocate import admissible, layer_schemes, linear_groups
from edgetune.compress.checkpoint import read_config
from edgetune.compress.scheme import Scheme
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError, RecipeError, UnsupportedError
from edgetune.graph import stage_names
from edgetune.recipe import Rtn
from edgetune.recipe_quantize import Allocate
from edgetune.stages import Stages
from edgetune.steps import Steps
from tests.test_pipeline import make_recipe

ROWS = CalibrationSet(np.random.default_rng(0).integers(0, 512, (2, 16)))
CHANGED = "model.layers.1.mlp.up_proj"  # of the group of gate_proj
FIRST = "model.layers.1.mlp.gate_proj"


def config(budget: float, keep: float | None, choices: Any = (2, 4, 8)) -> Rtn:
    return Rtn(group_size=32, allocate=Allocate(budget=budget, choices=list(choices), keep_update=keep))


@pytest.fixture(scope="module")
def trained(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model with one layer changed by less than a step of 2 and of 4 bits, and by more than one of 8."""
    folder = tmp_path_factory.mktemp("trained")
    with draft(folder / "model", kind="model", stage="test/1", config={}, parents=[tiny_model]) as pending:
        for name in tiny_model.manifest.files:
            shutil.copyfile(tiny_model.path / name, pending.path / name)
        state = load_file(tiny_model.path / "model.safetensors")
        weight = state[f"{CHANGED}.weight"]
        step = float(weight.abs().amax()) * 2 / 255
        weight[::2] += 1.5 * step
        save_file(state, pending.path / "model.safetensors", metadata={"format": "pt"})
    return pending.artifact


def losses(model: Artifact) -> dict[str, dict[int | str, float]]:
    return {first: {2: 3.0, 4: 2.0, 8: 1.0} for first in linear_groups(read_config(model.path))}


def test_the_share_is_what_update_left_says_of_the_integers(
    tiny_model: Artifact, trained: Artifact, tmp_path: Path
) -> None:
    asked = config(6, 0.5)
    evidence = update_kept.run(asked, tiny_model, trained, tmp_path / "kept")
    assert evidence.identity == update_kept.planned_identity(asked, tiny_model.identity, trained.identity)
    assert evidence.identity == update_kept.planned_identity(config(4, 0.1), tiny_model.identity, trained.identity)
    assert evidence.identity != update_kept.planned_identity(
        config(4, 0.1, (4, 8)), tiny_model.identity, trained.identity
    )
    found = update_kept.read(evidence)
    assert {first: of for first, of in found.items() if first != FIRST} == {
        first: {2: 1.0, 4: 1.0, 8: 1.0} for first in found if first != FIRST
    }
    for bits in (2, 4, 8):
        made = quantize.run(Rtn(bits=bits, group_size=32), trained, tmp_path / str(bits))  # type: ignore[arg-type]
        left = update_left.read(update_left.run(tiny_model, trained, made, tmp_path / f"left{bits}"))
        assert found[FIRST][bits] == pytest.approx(1 - left[CHANGED], abs=2e-4)
    assert found[FIRST][4] < 0.1 < 0.9 < found[FIRST][8]
    (evidence.path / update_kept.FILE).write_text("[]")
    with pytest.raises(ArtifactError, match=r"update_kept\.json is damaged"):
        update_kept.read(evidence)


def test_half_a_step_of_each_group_counts() -> None:
    weight = torch.tensor([[1.0, -1.0, 4.0, -4.0]])
    change = torch.tensor([[0.4, 0.0, 0.4, 1.2]])
    assert update_kept.kept_share(weight, change, Scheme(2, 2)) == pytest.approx(1 / 3 if 0.4 >= 1 / 3 else 0)
    assert update_kept.kept_share(weight, change, Scheme(3, 2)) == pytest.approx(2 / 3)
    assert update_kept.kept_share(weight, torch.zeros(1, 4), Scheme(3, 2)) == 1


def test_a_layer_gets_what_keeps_its_update(tiny_model: Artifact, trained: Artifact, tmp_path: Path) -> None:
    model_config = read_config(trained.path)
    kept = update_kept.read(update_kept.run(config(6, 0.5), tiny_model, trained, tmp_path / "kept"))
    cheap = {first: dict(of) for first, of in losses(trained).items()}
    cheap[FIRST] = {2: 0.1, 4: 0.1, 8: 0.1}  # by its divergence alone it would get the fewest bits
    plain = layer_schemes(config(6, None), model_config, cheap)
    assert plain[CHANGED].bits == 2
    held = layer_schemes(config(6, 0.5), model_config, cheap, kept)
    assert held[CHANGED].bits == held[FIRST].bits == 8
    assert sum(scheme.bits == 8 for scheme in held.values()) <= sum(scheme.bits == 8 for scheme in plain.values()) + 2
    with pytest.raises(
        UnsupportedError, match=rf"keep_update=0\.99: of {FIRST} no choice keeps more than 0(\.\d+)?; lower"
    ):
        admissible(config(6, 0.99, (2, 4)), model_config, {first: {2: of[2], 4: of[4]} for first, of in kept.items()})
    with pytest.raises(
        UnsupportedError, match=r"budget=3: the smallest choices that keep 0\.5 of the update take [\d.]+"
    ):
        admissible(config(3, 0.5), model_config, kept)


def test_the_checkpoint_is_held_to_it(
    tiny_model: Artifact, trained: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(6, 0.5)
    monkeypatch.setattr(sensitivity, "measure", lambda *_, **__: losses(trained))
    measured = sensitivity.run(asked, trained, tmp_path / "measured", measured=ROWS)
    assert measured.identity == sensitivity.planned_identity(config(3, None), trained.identity, None, ROWS.digest)
    kept = update_kept.run(asked, tiny_model, trained, tmp_path / "kept")
    made = quantize.run(asked, trained, tmp_path / "made", sensitivity=measured, kept=kept)
    assert made.identity == quantize.planned_identity(
        asked, trained.identity, None, measured.identity, kept.identity
    )  # fmt: skip
    assert (made.manifest.scheme or {})["bits_of"][CHANGED] == 8


def test_a_recipe_refuses_before_it_measures(tmp_path: Path, tiny_model: Artifact, trained: Artifact) -> None:
    def step(budget: float, keep: float) -> dict[str, Any]:
        rows = {"n_samples": 2, "n_tokens": 16}
        asked = {"budget": budget, "choices": [2, 4, 8], "rows": rows, "keep_update": keep}
        return {"compress": [{"rtn": {"group_size": 32, "allocate": asked}}]}

    candidates = {"held": step(6, 0.5), "small": step(3, 0.5)}
    with pytest.raises(
        RecipeError, match=r"candidates\.held: allocate\.keep_update compares with the base, but nothing"
    ):
        make_recipe(tmp_path, tiny_model.path, adapt=None, candidates=candidates)
    pruned = {"held": {"compress": [{"prune": {"layers": 1}}, *candidates["held"]["compress"]]}}
    with pytest.raises(RecipeError, match=r"but prune changes the weights before; leave it out"):
        make_recipe(tmp_path, tiny_model.path, candidates=pruned)
    recipe = make_recipe(tmp_path, tiny_model.path, candidates=candidates)
    store = Store(tmp_path / "store")
    stages = Stages(store, tmp_path / "run", Console(file=io.StringIO()))
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), stages)
    line.prepare()
    steps = Steps(recipe, stages, line.graph, tiny_model, trained)
    line.graph.base = tiny_model.identity
    line.graph.__dict__["model"] = trained.identity  # as if trained
    steps.run("small", recipe.candidates["small"])
    (failure,) = stages.failures
    assert "budget=3: the smallest choices that keep 0.5" in failure.reason
    (made,) = steps.run("held", recipe.candidates["held"]) or []
    assert made.identity == line.graph.shipped(recipe.candidates["held"])
    ran = [stage["name"] for stage in stages.done if not stage["done_before"]]
    assert ran[1:4] == [
        "small: update kept by choice", "held: sensitivity of layers", "held: rtn 6 bits g32 sym"
    ]  # fmt: skip
    named = [name for name in stage_names(recipe) if "kept" in name or "sensitivity" in name]
    assert named == ["held: update kept by choice", "held: sensitivity of layers"]


def test_a_key_that_is_not_set_does_not_show() -> None:
    assert "keep_update" not in config(4, None).model_dump()["allocate"]
    assert config(4, 0.5).model_dump()["allocate"]["keep_update"] == 0.5
