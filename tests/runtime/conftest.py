"""A child process that may import `tests.fakes`."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.runtime import latency


@pytest.fixture
def fakes_in_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let children find the tests package; they are started with -P, which hides the working directory.

    Fakes sleep and keep no thread awake, so nothing waits before they are timed.
    """
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(latency, "PAUSE_S", 0)
