"""Kernels and walks are compared with float64, so they compute in 32 bits also where bfloat16 is fast."""

from __future__ import annotations

import pytest
import torch

from edgetune.compress import layerwise


@pytest.fixture(autouse=True)
def _thirty_two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "compute_dtype", lambda device: torch.float32)
