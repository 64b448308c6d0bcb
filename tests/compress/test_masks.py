"""Zeros: the kernels against slow oracles, and the stage end to end on the tiny Llama."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

from edgetune.artifact import Artifact
from edgetune.compress import chain
from edgetune.compress.architectures import linear_shapes
from edgetune.compress.hessian import Hessian, output_loss
from edgetune.compress.layerwise import load_model
from edgetune.compress.masks import Pattern, dead_columns, magnitude, sparsegpt, wanda
from edgetune.compress.sparsify import _solver, check, planned_identity, run
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import RecipeError, StageError, UnsupportedError
from edgetune.recipe import Candidate, parse_as
from edgetune.recipe_sparsify import Sparsify
from tests.compress.test_kernels import problem
from tests.compress.test_layerwise import brute_force
from tests.conftest import make_tiny_model
from tests.oracles import sparsegpt_float64

ROWS = CalibrationSet(np.random.default_rng(0).integers(0, 512, (12, 16)))
ANYWHERE, TWO_OF_FOUR, FOUR_OF_EIGHT = Pattern(0.5), Pattern(0.5, 4), Pattern(0.5, 8)
METHODS = ["magnitude", "wanda", "sparsegpt"]


def masked(method: str, W: Tensor, H: Tensor, pattern: Pattern) -> Tensor:
    if method == "magnitude":
        return magnitude(W, pattern)
    return wanda(W, H, pattern) if method == "wanda" else sparsegpt([W], H, pattern)[0][0]


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_magnitude_and_wanda_are_those_of_numpy(sparsity: float) -> None:
    W, H = problem(1)
    norms = np.sqrt(np.diag(H.numpy()))
    w = W.numpy()
    expected = w.copy()
    for row in expected:
        row[np.argsort(np.abs(row) * norms)[: round(sparsity * len(row))]] = 0
    assert np.array_equal(wanda(W, H, Pattern(sparsity)).numpy(), expected)
    assert not np.array_equal(magnitude(W, Pattern(sparsity)).numpy(), expected)
    smallest = np.sort(np.abs(w).ravel())[round(sparsity * w.size) - 1]
    assert np.array_equal(magnitude(W, Pattern(sparsity)).numpy(), np.where(np.abs(w) <= smallest, 0, w))


@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, FOUR_OF_EIGHT])
def test_groups_of_magnitude_and_wanda_are_those_of_numpy(pattern: Pattern) -> None:
    W, H = problem(2)
    for made, norms in ((magnitude(W, pattern), np.ones(64)), (wanda(W, H, pattern), np.sqrt(np.diag(H.numpy())))):
        expected = W.numpy().copy()
        for row in expected:
            for start in range(0, 64, pattern.group):
                part = slice(start, start + pattern.group)
                row[part][np.argsort(np.abs(row[part]) * norms[part])[: pattern.group // 2]] = 0
        assert np.array_equal(made.numpy(), expected)


@pytest.mark.parametrize("pattern", [Pattern(0.3), ANYWHERE, TWO_OF_FOUR, FOUR_OF_EIGHT])
@pytest.mark.parametrize("block_size", [16, 24, 128])
def test_sparsegpt_is_optimal_brain_surgery_column_by_column(pattern: Pattern, block_size: int) -> None:
    W, H = problem(3)
    H[5, :] = H[:, 5] = 0  # a dead column
    layers = [W[:5], W[5:]]  # each gives up its own share
    made, fallbacks = sparsegpt(layers, H, pattern, block_size=block_size)
    assert fallbacks == ()
    for layer, found in zip(layers, made, strict=True):
        expected = sparsegpt_float64.sparsegpt(
            layer.numpy(), H.numpy(), sparsity=pattern.sparsity, group=pattern.group, block_size=block_size, damp=0.01
        )
        assert np.array_equal(found.numpy() == 0, expected == 0)
        assert np.allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [TWO_OF_FOUR, FOUR_OF_EIGHT])
def test_each_group_has_exactly_its_zeros(method: str, pattern: Pattern) -> None:
    W, H = problem(4)
    W[3] = 0.25  # all alike
    zeros = (masked(method, W.float(), H.float(), pattern) == 0).reshape(len(W), -1, pattern.group).sum(-1)
    assert torch.equal(zeros, torch.full_like(zeros, pattern.group // 2))


@pytest.mark.parametrize("pattern", [ANYWHERE, TWO_OF_FOUR])
def test_what_knows_more_loses_less(pattern: Pattern) -> None:
    W, H = problem(5, R=32)
    losses = [output_loss(W - masked(method, W, H, pattern), H) for method in METHODS]
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.9 * losses[1]
    assert (masked("sparsegpt", W, H, pattern) == 0).double().mean() == 0.5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_dead_columns_go_first_and_no_more_than_was_asked(method: str) -> None:
    W, H = problem(6)
    H[:, 8:28] = H[8:28] = 0
    made = masked(method, W, H, ANYWHERE)
    assert (made == 0).double().mean() == 0.5
    assert not made[:, 8:28].any()
    assert dead_columns(H) == ("20 of 64 input columns were never active: their weights go first",)
    within = masked(method, W, H, TWO_OF_FOUR)[:, 8:28]
    assert (within != 0).double().mean() == 0.5
    assert torch.equal(within[within != 0], W[:, 8:28][within != 0])


def test_what_is_not_finite_is_refused() -> None:
    W, H = problem(7)
    H[2, 2] = torch.inf
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(StageError, match="the Hessian is not finite: an activation overflowed"):
            masked(method, W, H, ANYWHERE)


def test_a_weight_beyond_its_dtype_is_refused() -> None:
    config = {"model_type": "llama", "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1,
              "num_hidden_layers": 1}  # fmt: skip
    solve = _solver(Sparsify(pattern="2:4"), config, torch.float16)
    alike = Hessian(4)
    alike.add(torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).expand(64, 4))
    with pytest.raises(StageError, match=r"SparseGPT makes a weight that leaves torch\.float16; use wanda"):
        solve(["model.layers.0.mlp.down_proj"], torch.full((4, 4), 6e4), alike.H, None)


@pytest.mark.parametrize(
    "config",
    [
        Sparsify(method="magnitude", sparsity=0.25),
        Sparsify(method="wanda", sparsity=0.3),
        Sparsify(method="wanda", pattern="4:8"),
        Sparsify(sparsity=0.75),
        Sparsify(pattern="2:4"),
    ],
)
def test_from_model_to_model_of_the_same_shapes(config: Sparsify, tiny_model: Artifact, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    made = run(config, tiny_model, tmp_path / "out", calibration=ROWS, seed=3, progress=lambda *now: seen.append(now))
    assert seen == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    digest = ROWS.digest if config.method != "magnitude" else None
    manifest = made.manifest
    assert manifest.identity == planned_identity(config, tiny_model.identity, digest)
    assert (manifest.kind, manifest.seed, manifest.calibration) == ("model", 3, digest)
    before = AutoModelForCausalLM.from_pretrained(tiny_model.path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(made.path).state_dict()
    names = set(linear_shapes(load_model(tiny_model).config.to_dict()))
    assert set(manifest.notes["sparsity"]) == set(manifest.notes["relative_error"]) == names
    for name, weight in after.items():
        layer, was = name.removesuffix(".weight"), before[name]
        assert (weight.shape, weight.dtype) == (was.shape, was.dtype)
        if layer not in names:
            assert torch.equal(weight, was)
            continue
        zeros = float((weight == 0).double().mean())
        assert manifest.notes["sparsity"][layer] == pytest.approx(zeros, abs=1e-4)
        assert zeros == pytest.approx(config.sparsity, abs=0.01)
        assert torch.equal(weight, was.masked_fill(weight == 0, 0)) == (config.method != "sparsegpt")
        if config.group:
            assert ((weight == 0).reshape(len(weight), -1, config.group).sum(-1) == config.group // 2).all()
        assert 0 < manifest.notes["relative_error"][layer] < 1
    assert manifest.notes["mean_sparsity"] == pytest.approx(config.sparsity, abs=0.01)
    assert manifest.fallbacks == []


def test_layers_see_what_the_sparse_layers_before_give(tiny_model: Artifact, tmp_path: Path) -> None:
    made = run(Sparsify(method="wanda"), tiny_model, tmp_path / "out", calibration=ROWS)
    sparse, dense = load_model(made), load_model(tiny_model)
    name = "model.layers.1.mlp.down_proj"
    W = dense.get_submodule(name).weight.data
    kept = sparse.get_submodule(name).weight
    assert torch.equal(kept, wanda(W, brute_force(sparse, name), ANYWHERE))
    assert not torch.equal(kept, wanda(W, brute_force(dense, name), ANYWHERE))


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_a_walk_that_was_stopped_ends_in_the_same_bytes(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, config = make_tiny_model(tmp_path / "model", layers=3), Sparsify(method=method)
    whole = run(config, source, tmp_path / "whole", calibration=ROWS)

    def stop_after_two(done: int, _: int, __: str) -> None:
        if done == 2:
            raise _Killed

    with pytest.raises(_Killed):
        run(config, source, tmp_path / "cut", calibration=ROWS, progress=stop_after_two)
    kept = sorted((tmp_path / ".cut.work").iterdir())
    assert [file.name for file in kept] == ["model.layers.0.safetensors", "model.layers.1.safetensors"]
    kept[1].write_bytes(kept[1].read_bytes()[:-100])  # cut by the kill: done again
    solved = []
    collect = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, *X: (solved.append(1), collect(self, *X))[1])
    made = run(config, source, tmp_path / "cut", calibration=ROWS)
    assert made.digest == whole.digest
    assert len(solved) == (8 if method != "magnitude" else 0)  # two blocks of four Hessians, not three


def test_the_layer_that_is_not_finite_or_dead_is_named(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source.path)
    model.model.layers[0].input_layernorm.weight.data[3] = 0
    model.save_pretrained(tmp_path / "other")
    (source.path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    made = run(Sparsify(), source, tmp_path / "out", calibration=ROWS)
    line = "model.layers.0.self_attn.{}: 1 of 64 input columns were never active: their weights go first"
    assert made.manifest.fallbacks == [line.format(name) for name in ("q_proj", "k_proj", "v_proj")]
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "other")
    (source.path / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    for method in ("magnitude", "sparsegpt"):
        with pytest.raises(StageError, match=r"model\.layers\.1\.mlp\.up_proj has a weight that is not finite"):
            run(Sparsify(method=method), source, tmp_path / "no", calibration=ROWS)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_any_work(tiny_model: Artifact, tmp_path: Path) -> None:
    narrow = make_tiny_model(tmp_path / "narrow", hidden=20, heads=(2, 2))
    says = r"pattern 4:8: 8 does not divide in_features=20 of model\.layers\.0\.self_attn\.q_proj; use unstructured"
    with pytest.raises(UnsupportedError, match=says):
        run(Sparsify(pattern="4:8"), narrow, tmp_path / "out", calibration=ROWS)
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel cannot be compressed here"):
        check(Sparsify(), {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(UnsupportedError, match="wanda needs calibration rows and got none; give data, or use mag"):
        run(Sparsify(method="wanda"), tiny_model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("{sparsity: 0}", r"sparsify\.sparsity: .*greater than 0"),
        ("{sparsity: 1.0}", r"sparsify\.sparsity: .*less than 1"),
        (
            "{pattern: 2:4, sparsity: 0.6}",
            r"sparsify: pattern 2:4 makes half of the weights zero; remove sparsity: 0\.6",
        ),
        ("{pattern: 1:4}", r"sparsify\.pattern: Input should be 'unstructured', '2:4' or '4:8' \(found 64\)"),
        ("{method: magnitude, calibration: {}}", "sparsify: calibration is not read by method magnitude; remove it"),
        ("{method: wonder}", r"sparsify\.method: Input should be 'wanda', 'sparsegpt' or 'magnitude'"),
    ],
)
def test_settings_that_cannot_be_are_refused(step: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_as(Candidate, yaml.safe_load(f"compress: [{{sparsify: {step}}}]"), "candidate")


def test_patterns_need_no_quotes_and_integers_follow_zeros() -> None:
    given = yaml.safe_load("compress: [{sparsify: {pattern: 2:4}}, {awq: {}}, {gptq: {}}]")
    candidate = parse_as(Candidate, given, "candidate")
    assert chain.step_names(candidate) == ["sparsify sparsegpt 2:4", "awq", "gptq int4 g64 sym"]
    assert "rounding after it need not keep them" in (chain.about_zeros(candidate) or "")
    plain = Candidate.model_validate({"compress": [{"sparsify": {"sparsity": 0.3, "method": "magnitude"}}]})
    assert chain.step_names(plain) == ["sparsify magnitude 30%"]
    assert (chain.about_zeros(plain) or "rounding").endswith("multiply them like any weight")
    assert chain.about_zeros(Candidate()) is None
    assert Candidate.model_validate(candidate.model_dump(mode="json")) == candidate
    for after, says in (({"gptq": {}}, "put sparsify before gptq"), ({"rtn": {}}, "put sparsify before rtn")):
        with pytest.raises(RecipeError, match=says):
            parse_as(Candidate, {"compress": [after, {"sparsify": {}}]}, "candidate")
    with pytest.raises(RecipeError, match="distill after sparsify trains what it set to zero; put distill before"):
        parse_as(Candidate, {"compress": [{"sparsify": {}}, {"distill": {}}]}, "candidate")


def test_planning_loads_no_torch(tiny_model: Artifact) -> None:
    code = (
        "import json, sys; from edgetune.compress.sparsify import check; from edgetune.recipe import Sparsify; "
        "check(Sparsify(), json.load(open(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_model.path / "config.json")], check=True)
