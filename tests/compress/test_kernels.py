"""The kernels against an independent oracle and their own promises."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edgetune.compress.gptq import gptq_codes, gptq_quantize
from edgetune.compress.hessian import Hessian, damped_factor, inverse_factor, output_loss
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Scheme, check_group, find_grid
from edgetune.errors import StageError, UnsupportedError
from tests.oracles import gptq_float64


def problem(seed: int, R: int = 12, C: int = 64, n_inputs: int = 256) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs of uneven size, in float64."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(C, C, generator=g, dtype=torch.float64) / C**0.5
    X = torch.randn(n_inputs, C, generator=g, dtype=torch.float64) @ (
        mix * torch.linspace(0.2, 3, C)[torch.randperm(C, generator=g)]
    )
    hessian = Hessian(C, dtype=torch.float64)
    hessian.add(X)
    return torch.randn(R, C, generator=g, dtype=torch.float64), hessian.H


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "desc_act", "static_groups"),
    list(itertools.product((3, 4, 6), (16, -1), (True, False), (True, False), (True, False))),
)
def test_gptq_gives_the_codes_of_the_oracle(
    bits: int, group_size: int, sym: bool, desc_act: bool, static_groups: bool
) -> None:
    W, H = problem(bits + group_size)
    H[5, :] = H[:, 5] = 0  # a dead column
    expected = gptq_float64.gptq(
        W.numpy(), H.numpy(), bits=bits, group_size=group_size, sym=sym, damp_percent=0.01,
        desc_act=desc_act, static_groups=static_groups,
    )  # fmt: skip
    for block_size in (8, 24, 128):
        made = gptq_quantize(
            W, H, Scheme(bits, group_size, sym), block_size=block_size, desc_act=desc_act, static_groups=static_groups
        )
        found = made.quantized
        assert np.array_equal(found.q.numpy(), expected.q)
        assert np.array_equal(found.g_idx.numpy(), expected.g_idx)
        assert np.array_equal(found.scales.double().numpy(), expected.scale)
        assert np.array_equal(found.zero_point.double().numpy(), expected.zero_point)
        assert np.array_equal(found.dequantize(torch.float64).numpy(), expected.dequantized)
        assert made.fallbacks == ("1 of 64 input columns were never active: rounded to nearest",)


def test_codes_on_a_grid_that_is_given_are_those_of_the_same_grid() -> None:
    W, H = problem(3)
    made = gptq_quantize(W, H, Scheme(4, 16, False)).quantized
    scale = made.scales.double()
    for block_size in (8, 128):
        codes, said = gptq_codes(W, H, scale, scale * made.zero_point, 15, block_size=block_size)
        assert torch.equal(codes, made.q)
        assert said == ()
    scale[:, 0] = 0
    assert not gptq_codes(W, H, scale, scale * made.zero_point, 15)[0][:, :16].any()


def test_float32_agrees_with_float64_but_for_ties() -> None:
    W, H = problem(1, R=32, C=128)
    exact = gptq_quantize(W, H, Scheme(4, 32)).quantized.q
    single = gptq_quantize(W.float(), H.float(), Scheme(4, 32)).quantized.q
    assert (exact != single).double().mean() < 0.002


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31), bits=st.sampled_from((2, 3, 4, 5, 6, 8)), group_size=st.sampled_from((16, 32, -1)),
    sym=st.booleans(), desc_act=st.booleans(), search=st.booleans(),
)  # fmt: skip
def test_gptq_never_loses_to_rounding(
    seed: int, bits: int, group_size: int, sym: bool, desc_act: bool, search: bool
) -> None:
    W, H = problem(seed, R=16)
    scheme = Scheme(bits, group_size, sym)
    solved = gptq_quantize(W, H, scheme, desc_act=desc_act, search=search).quantized
    rounded = rtn_quantize(W, scheme, search=search)
    assert torch.equal(solved.scales, rounded.scales)  # static groups: the same grid, so only the codes differ
    assert output_loss(W - solved.dequantize(torch.float64), H) <= output_loss(W - rounded.dequantize(torch.float64), H)


def test_the_loss_is_that_of_the_damped_hessian() -> None:
    W, H = problem(3)
    result = gptq_quantize(W, H, Scheme(4, 16), damp_percent=0.02)
    damped = H + 0.02 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    assert result.loss == pytest.approx(output_loss(W - result.quantized.dequantize(torch.float64), damped), rel=1e-9)


def test_stacked_layers_are_solved_as_if_alone() -> None:
    W, H = problem(4, R=24)
    parts = [(0, 8), (8, 10), (10, 24)]
    for desc_act, static_groups in itertools.product((True, False), repeat=2):
        stacked = gptq_quantize(W, H, Scheme(4, 16), desc_act=desc_act, static_groups=static_groups).quantized
        for start, stop in parts:
            alone = gptq_quantize(W[start:stop], H, Scheme(4, 16), desc_act=desc_act, static_groups=static_groups)
            part = stacked.rows(start, stop)
            for name in ("q", "scales", "zero_point", "g_idx"):
                assert torch.equal(getattr(part, name), getattr(alone.quantized, name)), name


def test_static_groups_leave_g_idx_plain_and_dynamic_ones_do_not() -> None:
    W, H = problem(5)
    plain = torch.arange(64, dtype=torch.int32) // 16
    assert torch.equal(gptq_quantize(W, H, Scheme(4, 16)).quantized.g_idx, plain)
    moved = gptq_quantize(W, H, Scheme(4, 16), static_groups=False).quantized.g_idx
    assert not torch.equal(moved, plain)
    assert torch.equal(moved.bincount(), torch.full((4,), 16))


def test_rounding_is_nearest_on_its_grid() -> None:
    W = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    for sym in (True, False):
        made = rtn_quantize(W, Scheme(4, 8, sym))
        scale, zero = made.scales.float()[:, made.g_idx.long()], made.zero_point[:, made.g_idx.long()]
        points = scale[..., None] * (torch.arange(16) - zero[..., None])  # [R, C, 16]
        assert torch.equal((points - W[..., None]).abs().argmin(-1), made.q.long())
        assert (made.zero_point == 8).all() or not sym


@given(low=st.floats(-4, 4), width=st.floats(0, 4), bits=st.sampled_from((2, 3, 4, 5, 6, 8)), sym=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_zero_points_never_reach_the_code_that_v1_cannot_store(low: float, width: float, bits: int, sym: bool) -> None:
    W = torch.linspace(low, low + width, 8, dtype=torch.float64).reshape(1, 8)
    scale, zero = find_grid(W, Scheme(bits, -1, sym))
    assert 1 <= zero.item() <= 2**bits - 1
    assert scale.item() == scale.half().item() > 0
    made = rtn_quantize(W, Scheme(bits, -1, sym)).dequantize(torch.float64)
    assert (made - W).abs().max() <= scale.item() * (1.0 if sym else 0.75) + 1e-7


def test_the_search_never_raises_the_squared_error() -> None:
    W = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    for sym in (True, False):
        by_range, searched = (rtn_quantize(W, Scheme(4, 32, sym), search=s).dequantize() for s in (False, True))
        before, after = ((made - W).square().sum(1) for made in (by_range, searched))
        assert (after <= before).all()
        assert after.sum() < 0.97 * before.sum()


def test_zero_rows_stay_zero() -> None:
    for sym in (True, False):
        made = rtn_quantize(torch.zeros(4, 16), Scheme(4, 8, sym))
        assert not made.dequantize().any()


def test_hessian_is_the_same_in_any_batches() -> None:
    X = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    whole, parts = Hessian(8), Hessian(8)
    whole.add(X)
    for part in (X[:7].reshape(1, 7, 8), X[7:8], X[8:].reshape(2, 11, 8)):
        parts.add(part)
    assert torch.allclose(whole.H, 2 / 30 * X.T @ X, atol=1e-6)
    assert torch.allclose(whole.H, parts.H, atol=1e-6)


@pytest.mark.parametrize("C", [8, 192, 200, 1600])
def test_products_by_panels_are_those_of_the_whole(C: int) -> None:
    rng = torch.Generator().manual_seed(C)
    X, E = (torch.randn(n, C, generator=rng, dtype=torch.float64) for n in (40, 5))
    hessian = Hessian(C, dtype=torch.float64)
    for part in X.split(25):
        hessian.add(part)
    H = 2 / 40 * X.T @ X
    assert torch.allclose(hessian.H, H, rtol=1e-12, atol=1e-12)
    assert output_loss(E, H) == pytest.approx(float(torch.trace(E @ H @ E.T)), rel=1e-10)


def test_the_factor_is_that_of_the_damped_hessian() -> None:
    _, H = problem(6)
    M = damped_factor(H, 0.01).upper
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    assert torch.equal(M, M.triu())
    assert torch.allclose(M @ M.T, damped, rtol=1e-12, atol=1e-12)
    U = inverse_factor(H, 0.01).upper
    assert torch.equal(U, U.triu())
    assert torch.allclose(U.T @ U, torch.linalg.inv(damped), rtol=1e-8, atol=1e-12)


def test_more_damping_is_a_fallback_that_is_said() -> None:
    H = torch.eye(8, dtype=torch.float64)
    H[0, 1] = H[1, 0] = 1.05  # not positive definite until some 5 percent are added
    factor = damped_factor(H, 0.01)
    assert factor.damp_percent == pytest.approx(0.1)
    assert factor.fallbacks == ("the Hessian needed damp_percent=0.1, 0.01 was asked",)
    H[0, 1] = H[1, 0] = 5.0
    with pytest.raises(StageError, match=r"not positive definite, even with damp_percent=1; give more"):
        damped_factor(H, 0.01)
    H[2, 2] = torch.nan
    with pytest.raises(StageError, match="not finite"):
        damped_factor(H, 0.01)


def test_a_group_that_does_not_fit_names_layer_and_way_out() -> None:
    name = "model.layers.3.mlp.down_proj"
    with pytest.raises(UnsupportedError) as caught:
        check_group(name, 576, 128)
    assert str(caught.value) == f"group_size=128 does not divide in_features=576 of {name}; use 32, 64, 96 or -1"
    with pytest.raises(UnsupportedError, match=r"use -1$"):
        check_group(name, 7, 32)
    check_group(name, 576, -1)
    check_group(name, 576, 64)
    with pytest.raises(UnsupportedError):
        check_group(name, 576, 0)


def test_a_weight_beyond_float16_scales_is_refused() -> None:
    with pytest.raises(StageError, match="beyond float16"):
        rtn_quantize(torch.full((2, 8), 1e7), Scheme(4))


def test_bits_per_weight_counts_the_grid() -> None:
    assert Scheme(4, 64).bits_per_weight(576) == 4 + 20 / 64
    assert Scheme(8, -1).bits_per_weight(96) == 8 + 24 / 96
    assert Scheme(4, 64).bits_per_weight(576, zero_points=False) == 4 + 16 / 64
