"""What GPTQ may do beyond its paper: weighted grids, GPTAQ's correction, fast Hessians; kernels, walk and stage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetune.artifact import Artifact
from edgetune.compress import layerwise
from edgetune.compress.architectures import SHARED_INPUTS
from edgetune.compress.checkpoint import read_layers
from edgetune.compress.gptaq import corrected
from edgetune.compress.gptq import gptq_quantize
from edgetune.compress.hessian import Hessian, damped_factor, output_loss
from edgetune.compress.layerwise import load_model, quantize_blocks
from edgetune.compress.quantize import planned_identity, run
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import SEARCH, Quantized, Scheme
from edgetune.data.calibration import CalibrationSet
from edgetune.recipe import Gptq
from tests.compress.test_kernels import problem
from tests.compress.test_layerwise import with_results
from tests.oracles import gptq_float64

ROWS = CalibrationSet(np.random.default_rng(1).integers(0, 512, (8, 16)))
ALL = {"grid": "weighted", "correction": 0.5, "hessian": "bfloat16"}


@pytest.mark.parametrize(("sym", "static_groups"), list(itertools.product((True, False), repeat=2)))
def test_weighted_grids_and_codes_are_those_of_the_oracle(sym: bool, static_groups: bool) -> None:
    W, H = problem(11)
    H[5, :] = H[:, 5] = 0  # a dead column weighs nothing
    expected = gptq_float64.gptq(
        W.numpy(), H.numpy(), bits=4, group_size=16, sym=sym, damp_percent=0.01, desc_act=True,
        static_groups=static_groups, factors=SEARCH,
    )  # fmt: skip
    made = gptq_quantize(W, H, Scheme(4, 16, sym), static_groups=static_groups, search=True, weighted=True).quantized
    assert np.array_equal(made.scales.double().numpy(), expected.scale)
    assert np.array_equal(made.zero_point.double().numpy(), expected.zero_point)
    assert np.array_equal(made.q.numpy(), expected.q)
    plain = gptq_quantize(W, H, Scheme(4, 16, sym), static_groups=static_groups, search=True).quantized
    assert not torch.equal(plain.scales, made.scales)


def test_weighted_grids_lose_less_where_columns_do_not_covary() -> None:
    W, H = problem(12, R=64)
    H = H.diagonal().diag()  # the weights are then the whole truth
    plain, weighted = (
        gptq_quantize(W, H, Scheme(4, 32, sym=False), search=True, weighted=weighted).quantized
        for weighted in (False, True)
    )
    losses = [output_loss(W - made.dequantize(torch.float64), H) for made in (plain, weighted)]
    assert losses[1] < 0.95 * losses[0]


def shown(seed: int = 0, C: int = 32, n: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [R, C], what the float model shows it [N, C], and what the quantized one does, in float64."""
    rng = torch.Generator().manual_seed(seed)
    floats = torch.randn(n, C, generator=rng, dtype=torch.float64) @ torch.randn(
        C, C, generator=rng, dtype=torch.float64
    )
    seen = floats + 0.3 * torch.randn(n, C, generator=rng, dtype=torch.float64) * floats.std(0)
    return torch.randn(10, C, generator=rng, dtype=torch.float64), floats, seen


def moments(floats: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """H and the cross moments, each in two batches."""
    H, cross = (Hessian(seen.shape[1], dtype=torch.float64) for _ in range(2))
    for part in (slice(0, 50), slice(50, None)):
        H.add(seen[part])
        cross.add(seen[part], floats[part] - seen[part])
    return H.H, cross.H


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_the_corrected_weight_is_that_of_least_squares(share: float) -> None:
    W, floats, seen = shown()
    H, cross = moments(floats, seen)
    damp = 0.01 * float(H.diagonal().mean())
    expected = gptq_float64.gptaq_target(W.numpy(), floats.numpy(), seen.numpy(), damp, share)
    found = corrected(W, cross, damped_factor(H, 0.01).upper, share)
    assert np.allclose(found.numpy(), expected, rtol=1e-8, atol=1e-10)


def test_the_correction_brings_the_output_nearer_to_the_float_models() -> None:
    W, floats, seen = shown(1)
    H, cross = moments(floats, seen)
    before, whole = W.clone(), Scheme(4, 32)
    losses = []
    for share in (0.0, 0.5, 1.0):
        made = gptq_quantize(W, H, whole, cross=cross, correction=share).quantized.dequantize(torch.float64)
        losses.append(float((seen @ made.T - floats @ W.T).square().mean()))
    assert torch.equal(W, before)  # the caller's weight is left alone
    assert losses[2] < losses[1] < losses[0]
    alone = gptq_quantize(W, H, whole).quantized
    none = gptq_quantize(W, H, whole, cross=cross, correction=0.0).quantized
    assert torch.equal(alone.q, none.q)


def test_fast_hessians_are_exact_where_inputs_are_bfloat16() -> None:
    X = torch.randn(512, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = torch.backends.mkldnn.matmul.fp32_precision
    fast = Hessian(96, fast=True)
    fast.add(X[:200])
    fast.add(X[200:])
    exact = 2 / len(X) * X.double().T @ X.double()
    assert (fast.H - exact).abs().max() < 1e-6 * exact.abs().max()  # a bfloat16 result would be off by some 2e-3
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_cross_moments_are_of_the_float_and_the_quantized_models_inputs(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 64)  # 4 rows at once
    found: list[Tensor] = []

    def solve(
        _: object, weight: Tensor, hessian: Tensor | None, cross: Tensor | None
    ) -> tuple[Quantized, tuple[str, ...]]:
        assert hessian is not None
        assert cross is not None
        found.append(cross.clone())
        return rtn_quantize(weight, Scheme(3, 32)), ()

    results = quantize_blocks(load_model(tiny_model), ROWS.ids, solve, work=tmp_path, key="k", both=True)
    model = with_results(tiny_model, results)
    names = [f"model.layers.{i}.{group[0]}" for i in range(2) for group in SHARED_INPUTS]
    floats, seen = inputs_of(load_model(tiny_model), names), inputs_of(model, names)
    assert len(found) == len(names)
    for name, cross in zip(names, found, strict=True):
        X = seen[name]
        expected = 2 / len(X) * (floats[name] - X).T @ X
        assert torch.allclose(cross, expected, rtol=1e-3, atol=1e-5 * float(X.square().mean())), name
    assert not found[0].any()  # nothing is quantized ahead of the first layers
    assert all(cross.any() for cross in found[1:])


def inputs_of(model: Any, names: list[str]) -> dict[str, Tensor]:
    """Each layer's inputs [N, C] by plain hooks and one forward of the whole model."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found.__setitem__(name, args[0].flatten(0, 1))
        )
        for name in names
    ]
    with torch.no_grad():
        model(torch.from_numpy(ROWS.ids))
    for handle in handles:
        handle.remove()
    return found


def test_a_cut_walk_of_two_models_ends_in_the_same_bytes(tiny_model: Artifact, tmp_path: Path) -> None:
    config = Gptq(group_size=32, sym=False, **ALL)

    class CutError(Exception):
        pass

    def cut(done: int, *_: object) -> None:
        if done == 1:
            raise CutError

    whole = run(config, tiny_model, tmp_path / "whole", calibration=ROWS)
    with pytest.raises(CutError):
        run(config, tiny_model, tmp_path / "cut", calibration=ROWS, progress=cut)
    assert run(config, tiny_model, tmp_path / "cut", calibration=ROWS).digest == whole.digest
    plain = run(Gptq(group_size=32, sym=False), tiny_model, tmp_path / "plain", calibration=ROWS)
    assert any(
        not torch.equal(ours.q, theirs.q)
        for ours, theirs in zip(read_layers(whole.path).values(), read_layers(plain.path).values(), strict=True)
    )
    for layer in read_layers(whole.path).values():  # exporters want each column in its group's place
        assert torch.equal(layer.g_idx, torch.arange(layer.q.shape[1], dtype=torch.int32) // 32)


def test_unset_options_are_in_no_identity() -> None:
    assert not set(ALL) & set(Gptq().model_dump())
    unset = Gptq(grid="plain", correction=0.0, hessian="float32")
    assert planned_identity(unset, "model", "rows") == planned_identity(Gptq(), "model", "rows")
    for key, value in ALL.items():
        assert planned_identity(Gptq(**{key: value}), "model", "rows") != planned_identity(Gptq(), "model", "rows")
