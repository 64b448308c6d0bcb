"""Training tests compare numbers, so they compute in 32 bits on every machine, those with fast bfloat16 included."""

from __future__ import annotations

import pytest
import torch

from edgetune.adapt import base


@pytest.fixture(autouse=True)
def _thirty_two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "compute_dtype", lambda device: torch.float32)
