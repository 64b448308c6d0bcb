"""Run llama.cpp on one job in a process of its own: it can abort, and its memory goes when it ends.

`python -m edgetune.export.gguf_quantize JOB.json` and `python -m edgetune.export.gguf_probe JOB.json` are started by
`run_child`; the last line of their output is their result, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgetune.errors import StageError


def run_child(module: str, job: dict[str, Any], job_file: Path) -> dict[str, Any]:
    """Run one job and give its result.

    Raises StageError in one line where the child fails or is killed by a signal.
    """
    job_file.write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # spinning threads crawl on a machine that is shared
    done = subprocess.run(
        [sys.executable, "-m", module, str(job_file)],
        capture_output=True, text=True, errors="replace", check=False, env=environment,
    )  # fmt: skip
    if done.returncode == 0:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    how = f"exit code {done.returncode}"
    if done.returncode < 0:
        how = f"killed by {signal.Signals(-done.returncode).name}"
    raise StageError(f"{module} on {job.get('file')}: {how}; {said[-1] if said else 'it said nothing'}")


def read_job() -> dict[str, Any]:
    """Read the job that this child was started with."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def answer(result: dict[str, Any]) -> None:
    """Print a child's result."""
    sys.stdout.write("\n" + json.dumps(result) + "\n")
    sys.stdout.flush()


def n_cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
