"""How much of what training changed is smaller than half a quantization step, layer by layer.

A change of a weight below half a step may leave its code where it was, so that only chance, or a layer's other weights,
carry it. Shapes: R out-features, C in-features.
"""

from __future__ import annotations

import json
from pathlib import Path

from edgetune.artifact import Artifact, draft, identity, write_text
from edgetune.errors import ArtifactError
from edgetune.progress import Report, silent

STAGE = "compress.update_left/1"
FILE = "update_left.json"


def planned_identity(base: str, model: str, quantized: str) -> str:
    """Identity of the evidence that `run` would make."""
    return identity(STAGE, {}, [base, model, quantized])


def run(base: Artifact, model: Artifact, quantized: Artifact, out: Path, *, progress: Report = silent) -> Artifact:
    """Write `update_left.json`: layer -> share of its changed weights whose change is below half a step.

    `model` was trained from `base`, and `quantized` is its checkpoint. A layer that did not change is left out.
    """
    from edgetune.compress.checkpoint import open_weights, read_layers

    with draft(out, kind="evidence", stage=STAGE, config={}, parents=[base, model, quantized]) as pending:
        before, after = (
            {name: file for file in open_weights(one.path) for name in file.keys()}  # noqa: SIM118
            for one in (base, model)
        )
        found, layers = dict[str, float](), read_layers(quantized.path)
        for place, (name, layer) in enumerate(layers.items()):
            weight = f"{name}.weight"
            change = after[weight].get_tensor(weight).float() - before[weight].get_tensor(weight).float()  # [R, C]
            half = layer.scales.float().index_select(1, layer.g_idx.long()) / 2
            n_changed = int(change.count_nonzero())
            if n_changed:
                n_small = int(((change.abs() < half) & (change != 0)).sum())
                found[name] = float(f"{n_small / n_changed:.4g}")
            progress(place + 1, len(layers), name)
        write_text(pending.path / FILE, json.dumps(found, indent=1) + "\n")
    return pending.artifact


def read(evidence: Artifact) -> dict[str, float]:
    """Read the shares. Raises ArtifactError where the file is damaged."""
    try:
        return {name: float(share) for name, share in json.loads((evidence.path / FILE).read_bytes()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{evidence.path / FILE} is damaged: {str(error).splitlines()[0]}") from error
