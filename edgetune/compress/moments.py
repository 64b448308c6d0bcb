"""The stage that measures each linear layer's mean squared inputs: llama.cpp's importance matrix."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact, draft, identity
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError
from edgetune.progress import Report, silent

STAGE = "compress.moments/1"
FILE = "moments.npz"


def planned_identity(source_identity: str, calibration_digest: str) -> str:
    """Identity of the evidence that `run` would make."""
    return identity(STAGE, {}, [source_identity], {"calibration": calibration_digest})


def run(
    source: Artifact, out: Path, *, calibration: CalibrationSet, device: str = "cpu", progress: Report = silent
) -> Artifact:
    """Write `moments.npz`: module name -> mean squared input [C], float32, over the calibration rows."""
    from edgetune.compress.layerwise import second_moments
    from edgetune.compress.streamed import open_model

    sources = {"calibration": calibration.digest}
    with draft(out, kind="evidence", stage=STAGE, config={}, parents=[source], sources=sources) as pending:
        found = second_moments(open_model(source), calibration.ids, work=pending.work, device=device, progress=progress)
        arrays = {name: tensor.numpy() for name, tensor in sorted(found.items())}
        np.savez(pending.path / FILE, **arrays)  # type: ignore[arg-type]
        pending.calibration = calibration.digest
    return pending.artifact


def read(evidence: Artifact) -> dict[str, NDArray[np.float32]]:
    """Read the moments. Raises ArtifactError where the file is damaged."""
    try:
        with np.load(evidence.path / FILE, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{evidence.path / FILE} is damaged: {said}") from error
