"""Attention within packed rows against torch's own, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from edgetune.packed import SHORT, Layout, attention


def separate(heads: torch.Tensor, n_query: int, n_key: int, layout: Layout) -> torch.Tensor:
    """Attend row by row in float64, each behind the prefix."""
    prefix, own = torch.split(heads, [layout.n_prefix, len(heads) - layout.n_prefix])
    results = []
    for number, row in enumerate(torch.split(own, list(layout.lengths))):
        q, k, v = torch.split(torch.cat([prefix, row]).transpose(0, 1), [n_query, n_key, n_key])
        k, v = (x.repeat_interleave(n_query // n_key, dim=0) for x in (k, v))
        found = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=0.3)[0]
        results.append(found.transpose(0, 1)[0 if number == 0 else layout.n_prefix :])
    return torch.cat(results)


@pytest.mark.parametrize("n_prefix", [0, 1, 7])
@pytest.mark.parametrize("n_filling", [0, 5])
@pytest.mark.parametrize("lengths", [(1,), (5, 2, 9), (SHORT + 3, 4)])
def test_values_and_gradients_are_those_of_separate_rows(
    n_prefix: int, lengths: tuple[int, ...], n_filling: int
) -> None:
    n_query, n_key, size = 6, 2, 8
    draw = torch.Generator().manual_seed(n_prefix)
    heads = torch.randn(n_prefix + sum(lengths), n_query + 2 * n_key, size, generator=draw, dtype=torch.float64)
    heads.requires_grad_()
    n_tokens = len(heads) + n_filling
    layout = Layout.of(n_prefix, lengths, n_tokens=n_tokens)
    assert layout.positions().shape == (1, n_tokens)
    filled = torch.cat([heads, torch.randn(n_filling, *heads.shape[1:], generator=draw, dtype=torch.float64)])
    found, expected = attention(filled, n_query, n_key, layout, 0.3), separate(heads, n_query, n_key, layout)
    assert len(found) == n_tokens
    found = found[: len(heads)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # softmax is float32
    weight = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    gradients = [torch.autograd.grad((x * weight).sum(), heads)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_under_autocast_rows_attend_in_bfloat16_forward_and_back() -> None:
    """Rotated queries and keys are float32 there while values are not; the way back knows nothing of autocast."""
    draw = torch.Generator().manual_seed(0)
    heads = torch.randn(12, 10, 8, generator=draw, requires_grad=True)
    layout = Layout.of(2, (6, 4), n_tokens=12)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(heads, 6, 2, layout, 0.3)
    assert found.dtype == torch.bfloat16
    expected = attention(heads, 6, 2, layout, 0.3)
    gradients = [torch.autograd.grad(x.float().square().sum(), heads)[0] for x in (found, expected)]
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(*gradients, rtol=0.05, atol=0.05)
