"""Run llama.cpp on one job in a process of its own: it can abort, and its memory goes when it ends.

`python -m edgetune.export.gguf_convert JOB.json` and `python -m edgetune.export.gguf_probe JOB.json` are started by
`run_child`; the last line of their output is their result, as JSON, and lines of `tell` before it are their progress.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.errors import StageError
from edgetune.export.gguf_types import UNWEIGHED
from edgetune.progress import Report, silent

TOLD = "progress "  # what a line of progress begins with


def run_child(module: str, job: dict[str, Any], job_file: Path, progress: Report = silent) -> dict[str, Any]:
    """Run one job and give its result.

    Raises StageError in one line where the child fails or is killed by a signal.
    """
    job_file.write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # spinning threads crawl on a machine that is shared
    last = ""
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            [sys.executable, "-m", module, str(job_file)],
            stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=environment,
        ) as child,
    ):  # fmt: skip
        assert child.stdout is not None, "it is a pipe"
        for line in child.stdout:
            if line.startswith(TOLD):
                done, total, label = json.loads(line.removeprefix(TOLD))
                progress(done, total, label)
            elif line.strip():
                last = line
        code = child.wait()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    if code == 0:
        result: dict[str, Any] = json.loads(last)
        return result
    how = f"exit code {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
    raise StageError(f"{module} on {job.get('file')}: {how}; {said[-1] if said else 'it said nothing'}")


def convert(
    source: Artifact, file: Path, types: Mapping[str, str], moments: Mapping[str, NDArray[Any]], *, target: str,
    work: Path, progress: Report,
) -> int:  # fmt: skip
    """Write a GGUF file with a type for each tensor; give how many were weighed by their inputs.

    `moments` are [C] by GGUF name, `target` is what the header says, `work` a folder for what the child reads.
    Raises StageError.
    """
    used = {name: values for name, values in moments.items() if types.get(name, "F32") not in UNWEIGHED}
    if used:
        arrays: dict[str, Any] = {name: np.asarray(values, np.float32) for name, values in used.items()}
        np.savez(work / "moments.npz", **arrays)
    job = {
        "source": str(source.path), "file": str(file), "types": dict(types), "target": target,
        "moments": str(work / "moments.npz") if used else None, "threads": n_cpus(),
    }  # fmt: skip
    run_child("edgetune.export.gguf_convert", job, work / "convert.json", progress)
    return len(used)


def tell(done: int, total: int, label: str) -> None:
    """Report a child's progress to what started it."""
    sys.stdout.write(f"{TOLD}{json.dumps([done, total, label])}\n")
    sys.stdout.flush()


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
