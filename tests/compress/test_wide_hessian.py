"""A wide Hessian is factored in pieces, as a narrow one is at once."""

from __future__ import annotations

import pytest
import torch

from edgetune.compress import hessian


@pytest.mark.parametrize("n", [50, 193, 700])
def test_a_wide_hessian_is_factored_in_place(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    X = torch.randn(2 * n, n, generator=torch.Generator().manual_seed(0))
    H = 2 / len(X) * X.T @ X
    H[3], H[:, 3] = 0, 0
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    small = hessian.inverse_factor(H[order][:, order], 0.01)
    monkeypatch.setattr(hessian, "WHOLE", 10)
    monkeypatch.setattr(hessian, "STEP", 64)
    wide = hessian.inverse_factor(H, 0.01, order)
    assert torch.allclose(wide.upper, small.upper, rtol=1e-9, atol=1e-12)
    assert wide.fallbacks == small.fallbacks == (f"1 of {n} input columns were never active: rounded to nearest",)
    damped = hessian.inverse_factor(-1e-3 * torch.eye(n) + torch.ones(n, n), 1e-4)  # not positive definite as it is
    assert damped.fallbacks == ("the Hessian needed damp_percent=0.01, 0.0001 was asked",)
