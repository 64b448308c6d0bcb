"""Fixtures of the exports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgetune.errors import EdgetuneError, StageError
from edgetune.export import gguf_adapter, gguf_child, gguf_convert, gguf_probe, gguf_verify
from edgetune.export.gguf_child import run_child
from edgetune.progress import Report, silent


def run_here(module: str, job: dict[str, Any], job_file: Path, progress: Report = silent) -> dict[str, Any]:
    """Do a job of llama.cpp in this process, on one thread: two would spin, for want of a child's OMP_WAIT_POLICY."""
    jobs = {gguf_convert.__name__: gguf_convert.convert, gguf_probe.__name__: gguf_probe.probe}
    if module not in jobs:
        return run_child(module, job, job_file, progress)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_convert, "tell", progress)
        patch.setattr(gguf_probe, "n_cpus", lambda: 1)
        try:
            result: dict[str, Any] = json.loads(json.dumps(jobs[module](json.loads(json.dumps(job))) or {}))
        except EdgetuneError as error:
            raise StageError(f"{module} on {job.get('file')}: exit code 1; {error}") from error
    return result


@pytest.fixture(scope="module")
def children_here() -> Iterator[None]:
    """Spare a test the start of llama.cpp's children, which test_gguf.py and the pipelines do start."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (gguf_adapter, gguf_child, gguf_verify):
            patch.setattr(module, "run_child", run_here)
        yield
