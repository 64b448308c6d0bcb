"""How much of what training changed each choice of bits could keep, before any is chosen.

A change below half a quantization step may leave a weight's code where it was (`update_left` tells the same of integers
that are made). Here the steps are those of each choice's grid by range: what a solver's search finds is finer, seldom
wider. Shapes: R out-features, C in-features, G groups.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, draft, identity, write_text
from edgetune.compress.allocate import Label, linear_groups, schemes
from edgetune.errors import ArtifactError
from edgetune.progress import Report, silent
from edgetune.recipe import Rtn

if TYPE_CHECKING:
    from torch import Tensor

    from edgetune.compress.scheme import Scheme

STAGE = "compress.update_kept/1"
FILE = "update_kept.json"
Kept = dict[str, dict[Label, float]]  # first layer of a group -> choice -> share


def planned_identity(config: Rtn, base: str, model: str) -> str:
    """Identity of the evidence that `run` would make; steps of the same choices share it."""
    return identity(STAGE, _config(config), [base, model])


def shared(config: Rtn) -> str:
    """Give what tells one comparison of the two models from another."""
    return json.dumps(_config(config), sort_keys=True)


def run(config: Rtn, base: Artifact, model: Artifact, out: Path, *, progress: Report = silent) -> Artifact:
    """Write `update_kept.json`: of each group's worst layer, the share of its changed weights that move half a step.

    `model` was trained from `base`. Groups that did not change keep all.
    """
    from edgetune.compress.checkpoint import open_weights, read_config

    with draft(out, kind="evidence", stage=STAGE, config=_config(config), parents=[base, model]) as pending:
        before, after = (
            {name: file for file in open_weights(one.path) for name in file.keys()}  # noqa: SIM118
            for one in (base, model)
        )
        choices, groups, found = schemes(config), linear_groups(read_config(model.path)), Kept()
        for place, (first, names) in enumerate(groups.items()):
            found[first] = dict.fromkeys(choices, 1.0)
            for name in (f"{name}.weight" for name in names):
                weight = after[name].get_tensor(name).float()
                change = weight - before[name].get_tensor(name).float()
                for label, scheme in choices.items():
                    share = float(f"{kept_share(weight, change, scheme):.4g}")
                    found[first][label] = min(found[first][label], share)
            progress(place + 1, len(groups), first)
        write_text(pending.path / FILE, json.dumps(found, indent=1) + "\n")
    return pending.artifact


def read(evidence: Artifact) -> Kept:
    """Read the shares. Raises ArtifactError where the file is damaged."""
    try:
        stored = json.loads((evidence.path / FILE).read_bytes())
        return {
            name: {int(label) if label.isdigit() else label: float(share) for label, share in of.items()}
            for name, of in stored.items()
        }
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{evidence.path / FILE} is damaged: {str(error).splitlines()[0]}") from error


def kept_share(weight: Tensor, change: Tensor, scheme: Scheme) -> float:
    """Give the share of the weights [R, C] that changed whose change is half a step of their grid or more."""
    from edgetune.compress.scheme import find_grid

    R, C = weight.shape
    n = scheme.group_columns(C)
    n_changed = int(change.count_nonzero())
    if not n_changed:
        return 1.0
    scale, _ = find_grid(weight.reshape(R, C // n, n), scheme)  # [R, G]
    far = (change.reshape(R, C // n, n).abs() >= scale.unsqueeze(-1) / 2) & (change.reshape(R, C // n, n) != 0)
    return int(far.sum()) / n_changed


def _config(config: Rtn) -> dict[str, Any]:
    return {
        str(label): {"bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym}
        for label, scheme in schemes(config).items()
    }
