"""A child process that may import `tests.fakes`."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def fakes_in_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children find the tests package; they are started with -P, which hides the working directory."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
