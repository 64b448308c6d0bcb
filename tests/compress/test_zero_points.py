"""Zero points that are learned with the scales: against float64, in the walk, and in the stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetune.artifact import Artifact
from edgetune.compress import layerwise
from edgetune.compress.checkpoint import read_layers
from edgetune.compress.quantize import check, planned_identity, run
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Quantized, Scheme
from edgetune.compress.tune import Tuned, tune_scales
from edgetune.compress.zero_points import STEP, Reach, shown_and_held
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import DataError, RecipeError, UnsupportedError
from edgetune.recipe import CompressStep, Gptq, parse_as
from edgetune.recipe_export import Calibration
from edgetune.recipe_quantize import Tune
from tests.compress.test_kernels import problem
from tests.oracles import zero_points_float64

ROWS = CalibrationSet(np.random.default_rng(2).integers(0, 512, (8, 16)))
BASE: dict[str, Any] = {"bits": 2, "group_size": 32, "sym": False}
TUNE: dict[str, Any] = {"steps": 8, "learning_rate": 0.02, "zeros": True}


def off_centre(seed: int, bits: int = 2) -> tuple[Quantized, Tensor, list[Tensor]]:
    """A layer with float64 scales whose zero points are wrong by one, its weight, and five batches [B, T, C]."""
    W, _ = problem(seed, R=12)
    rng = torch.Generator().manual_seed(seed)
    scheme = Scheme(bits, 16, sym=False)
    fitted = rtn_quantize(W, scheme)
    zero = (fitted.zero_point + 1).clamp(1, scheme.max_code)
    levels = (W / fitted.scales.double()[:, fitted.g_idx.long()]).round()
    q = (levels + zero[:, fitted.g_idx.long()]).clamp(0, scheme.max_code)
    layer = Quantized(q.to(torch.uint8), fitted.scales.double(), zero, fitted.g_idx)
    return layer, W, [torch.randn(2, 20, W.shape[1], generator=rng, dtype=torch.float64) for _ in range(5)]


def tuned(layer: Quantized, W: Tensor, inputs: list[Tensor], bits: int, **kwargs: Any) -> tuple[Tuned, Quantized, int]:
    def outputs(weights: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
        return inputs[i] @ weights["a"].T, inputs[i] @ W.T

    reach = {"a": Reach.of(layer, W, Scheme(bits).max_code)}
    found = tune_scales({"a": layer}, outputs, len(inputs), reach=reach, **kwargs)
    made, n_moved = found.applied({"a": layer}, reach)
    return found, made["a"], n_moved


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2, 3])
def test_learned_grids_are_those_of_plain_adam_in_float64(seed: int, bits: int) -> None:
    layer, W, inputs = off_centre(seed, bits)
    given: dict[str, Any] = {"steps": 8, "learning_rate": 0.02}
    found, made, n_moved = tuned(layer, W, inputs, bits, **given)
    flat = [X.flatten(0, 1).numpy() for X in inputs]
    q, zero = layer.q.double().numpy(), layer.zero_point.double().numpy()
    expected = zero_points_float64.tuned(
        q, layer.scales.numpy(), zero, layer.g_idx.numpy(), [flat[i] for i in (0, 1, 2, 4)], [flat[3]], W.numpy(),
        top=2**bits - 1, zero_step=STEP, **given,
    )  # fmt: skip
    assert np.array_equal(made.zero_point.numpy(), expected.zero_point)
    assert np.array_equal(made.q.numpy(), expected.codes)
    assert np.allclose(made.scales.double().numpy(), expected.scale, rtol=2**-10)  # stored as float16
    assert found.before == pytest.approx(expected.errors[0], rel=1e-9)
    assert found.after == pytest.approx(expected.errors[1], rel=2e-3)
    assert n_moved == (expected.zero_point != zero).sum() > 0
    assert found.after < 0.9 * found.before


def test_what_the_zero_points_are_tried_with_is_what_is_stored() -> None:
    layer, W, _ = off_centre(4)
    reach = Reach.of(layer, W, 3)
    same = reach.moved(layer, layer.zero_point.double())
    assert torch.equal(same.q, layer.q)
    assert torch.equal(same.zero_point, layer.zero_point)
    zeros = layer.zero_point.double() - 0.9
    made = reach.moved(layer, zeros)
    tried = reach.levels(zeros) * layer.scales[:, layer.g_idx.long()]
    assert torch.allclose(made.dequantize(torch.float64), tried, rtol=1e-6)
    assert int(made.zero_point.min()) >= 1
    assert (W - tried).square().sum() < (W - layer.dequantize(torch.float64)).square().sum()


def test_inside_the_range_codes_move_with_the_zero_point() -> None:
    W = torch.tensor([[-1.0, 0.0, 1.0, 2.0]]).double()
    layer = rtn_quantize(W, Scheme(4, 4, sym=False))
    reach = Reach.of(layer, W, 15)
    zeros = layer.zero_point.double().requires_grad_()
    inside = layer.q.clone()
    inside[0, :] = 7
    middle = Reach.of(Quantized(inside, layer.scales, layer.zero_point, layer.g_idx), W, 15)
    (gradient,) = torch.autograd.grad(middle.levels(zeros).sum(), zeros)
    assert float(gradient) == 0
    (gradient,) = torch.autograd.grad(reach.levels(zeros - 2).sum(), zeros)  # the lowest two are out of reach
    assert float(gradient) < 0


def test_no_zero_point_is_kept_that_is_worse_on_rows_held_out() -> None:
    layer, W, inputs = off_centre(5)
    half = Quantized(layer.q, layer.scales.half(), layer.zero_point, layer.g_idx)
    made = half.dequantize(torch.float64)
    shown, held = shown_and_held(len(inputs))

    def outputs(weights: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
        return inputs[i] @ weights["a"].double().T, inputs[i] @ (made if i in held else W).T

    reach = {"a": Reach.of(half, W, 3)}
    found = tune_scales({"a": half}, outputs, len(inputs), steps=8, learning_rate=0.02, reach=reach)
    assert found.before == found.after == pytest.approx(0, abs=1e-12)
    kept, n_moved = found.applied({"a": half}, reach)
    assert n_moved == 0
    assert torch.equal(kept["a"].q, half.q)
    assert torch.equal(kept["a"].scales, half.scales)
    assert (shown, held) == ([0, 1, 2, 4], [3])
    assert shown_and_held(2) == ([0], [1])
    with pytest.raises(DataError, match="calibration rows that it does not learn from"):
        shown_and_held(1)


def test_the_stage_learns_zero_points(tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 32)  # 2 rows at once
    made = run(Gptq(**BASE, tune=Tune(**TUNE)), tiny_model, tmp_path / "made", calibration=ROWS)
    plain = run(Gptq(**BASE), tiny_model, tmp_path / "plain", calibration=ROWS)
    noted = made.manifest.notes["tuned"]
    assert all(after <= before for before, after, _ in noted.values())
    ours, theirs = read_layers(made.path), read_layers(plain.path)
    first = [name for name in ours if name.startswith("model.layers.0.")]
    moved = sum(int((ours[name].zero_point != theirs[name].zero_point).sum()) for name in first)
    assert moved == noted["model.layers.0"][2]
    for name in first:
        still = (ours[name].zero_point == theirs[name].zero_point)[:, ours[name].g_idx.long()]
        assert torch.equal(ours[name].q[still], theirs[name].q[still])
        assert int(ours[name].zero_point.min()) >= 1
        assert int(ours[name].zero_point.max()) <= 3


def test_a_cut_walk_ends_in_the_same_bytes(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 32)
    config = Gptq(**BASE, tune=Tune(**TUNE))

    class CutError(Exception):
        pass

    def cut(done: int, *_: object) -> None:
        if done == 1:
            raise CutError

    whole = run(config, tiny_model, tmp_path / "whole", calibration=ROWS)
    with pytest.raises(CutError):
        run(config, tiny_model, tmp_path / "cut", calibration=ROWS, progress=cut)
    assert run(config, tiny_model, tmp_path / "cut", calibration=ROWS).digest == whole.digest


def test_what_cannot_be_done_is_refused(tiny_model: Artifact) -> None:
    with pytest.raises(RecipeError, match="symmetric groups have one zero point for all; set sym: false"):
        parse_as(CompressStep, {"gptq": {"tune": {"zeros": True}}}, "step")
    sizes = json.loads((tiny_model.path / "config.json").read_bytes())
    few = Gptq(**BASE, tune=Tune(**TUNE), calibration=Calibration(n_samples=8, n_tokens=256))
    with pytest.raises(UnsupportedError, match=r"8 are learned from at once; raise calibration.n_samples=8 above that"):
        check(few, sizes)
    check(few.model_copy(update={"calibration": Calibration(n_samples=9, n_tokens=256)}), sizes)


def test_unset_it_is_in_no_identity() -> None:
    assert set(Tune().model_dump()) == {"steps", "learning_rate"}
    asked = [Gptq(**BASE, tune=Tune(zeros=zeros)) for zeros in (False, True)]
    assert asked[0].model_dump() == Gptq(**BASE, tune=Tune()).model_dump()
    assert planned_identity(asked[0], "model", "rows") != planned_identity(asked[1], "model", "rows")
