"""What each ggml type costs each group of layers: KL(float model || the same with this group alone in that type).

llama.cpp's quantizer rounds every layer to each type once, weighed by the importance matrix; the divergences are
measured as `compress.sensitivity` measures those of bits. GPTQ's choice of codes is left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune import backends
from edgetune.artifact import Artifact, draft, identity, require_space, write_text
from edgetune.compress import moments as moments_stage
from edgetune.errors import ArtifactError
from edgetune.export.gguf_allocation import offered
from edgetune.export.gguf_child import convert
from edgetune.export.gguf_families import change, family, gguf_name
from edgetune.export.gguf_types import fitting, n_bytes
from edgetune.export.gguf_write import Weights, artifact_weights, read_config, tensors, written_shapes
from edgetune.progress import Report, silent

if TYPE_CHECKING:
    from torch import Tensor

    from edgetune.compress.layerwise import Solve
    from edgetune.data.calibration import CalibrationSet
    from edgetune.recipe_export import AllocateTypes

STAGE = "export.gguf_sensitivity/1"
FILE = "sensitivity.json"


class _Rounded:
    """Weights [R, C] as a file gives them back."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def dequantize(self) -> Tensor:
        return self._weight


def planned_identity(config: AllocateTypes, source_identity: str, moments_identity: str, measured_digest: str) -> str:
    """Give the identity of the evidence that `run` would make."""
    return identity(STAGE, _config(config), [source_identity, moments_identity], {"measured": measured_digest})


def run(
    config: AllocateTypes,
    source: Artifact,
    out: Path,
    *,
    moments: Artifact,
    measured: CalibrationSet,
    device: str = "cpu",
    progress: Report = silent,
) -> Artifact:
    """Write `sensitivity.json` of a `model` artifact; a run that was killed goes on after its last finished block.

    `moments` is the evidence of its mean squared inputs. The whole model is in memory.
    Raises StageError where llama.cpp fails.
    """
    from edgetune.compress.layerwise import load_model
    from edgetune.compress.sensitivity import measure

    versions = {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
    versions |= {name: backends.version(name) or "" for name in ("gguf", "llama_cpp")}
    with draft(
        out, kind="evidence", stage=STAGE, config=_config(config), parents=[source, moments],
        sources={"measured": measured.digest}, versions=versions,
    ) as pending:  # fmt: skip
        kept = pending.work / FILE
        done = read_losses(kept) if kept.is_file() else {}
        try:
            rounded = _round(config.choices, source, moments_stage.read(moments), pending.work, progress)
            found = measure(
                load_model(source), measured.ids, rounded, fits=offered, done=done,
                keep=lambda so_far: write_text(kept, json.dumps(so_far)), device=device, progress=progress,
            )  # fmt: skip
        finally:
            _clear(pending.work)
        write_text(pending.path / FILE, json.dumps(found, indent=1) + "\n")
    return pending.artifact


def read(evidence: Artifact) -> dict[str, dict[str, float]]:
    """Read what was measured: first layer of a group -> type -> nats. Raises ArtifactError where it is damaged."""
    try:
        return read_losses(evidence.path / FILE)
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{evidence.path / FILE} is damaged: {str(error).splitlines()[0]}") from error


def read_losses(file: Path) -> dict[str, dict[str, float]]:
    stored = json.loads(file.read_bytes())
    return {name: {kind: float(nats) for kind, nats in of.items()} for name, of in stored.items()}


def _round(
    kinds: Sequence[str], source: Artifact, moments: Mapping[str, NDArray[np.float32]], work: Path, progress: Report
) -> dict[str, Solve[Any]]:
    """Write a file of each type, and give what reads layers back from it."""
    model_config = read_config(source.path)
    weights, of = artifact_weights(source, model_config), family(model_config)
    weighed = {gguf_name(f"{module}.weight", of): values for module, values in moments.items()}
    shapes = written_shapes(weights, model_config)
    types = {
        kind: {
            name: "F32" if len(shape) == 1 else fitting(kind if name.startswith("blk.") else "Q8_0", shape[-1])
            for name, shape in shapes.items()
        }
        for kind in kinds
    }
    _clear(work)  # what a killed run left
    require_space(work, sum(n_bytes(shapes, of_one) for of_one in types.values()))
    found = {}
    for kind, of_one in types.items():
        file = work / f"{kind}.gguf"
        convert(source, file, of_one, weighed, target="Q8_0", work=work, progress=progress)
        found[kind] = _reader(file, weights, model_config)
    return found


def _reader(file: Path, weights: Weights, model_config: Mapping[str, Any]) -> Solve[Any]:
    """Give what takes layers of a model from a file, whatever their weights are."""
    import torch

    gguf, of = backends.require("gguf"), family(model_config)
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    stored = {hf: written[name] for name, hf in tensors(weights, model_config)}

    def weight_of(name: str) -> NDArray[np.float32]:
        tensor, moved = stored[f"{name}.weight"], change(f"{name}.weight", of)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values if moved is None else np.asarray(moved.back(values, model_config))

    def solve(
        names: Sequence[str], weight: Tensor, hessian: Tensor | None, _: Tensor | None
    ) -> tuple[_Rounded, tuple[str, ...]]:
        found = torch.from_numpy(np.concatenate([weight_of(name) for name in names]))
        return _Rounded(found.to(weight.device)), ()

    return solve


def _clear(work: Path) -> None:
    """Remove the files of rounded weights: large, and quicker made again than trusted."""
    for file in work.glob("*.gguf"):
        file.unlink()


def _config(config: AllocateTypes) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"budget"})
