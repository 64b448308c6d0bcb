"""What each number of bits costs each group of layers: KL(float model || the same with this group alone quantized).

Measured, not estimated: a group is quantized as its step will do it, on what the float model shows it, and the blocks
from there on are run again; those before it keep their outputs. What a step does beyond that is left out: GPTAQ's share
for inputs that are quantized already, since here none are, factors of the Hessian in bfloat16, a damping that is chosen
by layer (damp_percent's default stands for it), scales that are learned afterwards, and corrections beside the
integers. All of it is computed in float32: the noise of bfloat16, 0.001 to 0.002 nats, is as large as what five bits
cost a group.
Shapes: B rows of a batch, T tokens, C in-features, N positions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact, draft, identity, write_text
from edgetune.compress.allocate import Label, schemes
from edgetune.compress.architectures import SHARED_INPUTS, linear_shapes
from edgetune.errors import ArtifactError, EdgetuneError, StageError
from edgetune.progress import Report, silent
from edgetune.recipe import Gptq, Rtn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgetune.compress.layerwise import Solve
    from edgetune.compress.pieces import Blocks
    from edgetune.data.calibration import CalibrationSet

STAGE = "compress.sensitivity/2"
FILE = "sensitivity.json"
TOP_K = 256  # buckets in which distributions are compared: so many tokens by name, and all others
Choice = TypeVar("Choice", bound=Label)
Losses = dict[str, dict[Label, float]]  # first layer of a group -> choice -> nats a token


def planned_identity(
    config: Rtn | Gptq, source_identity: str, calibration_digest: str | None, measured_digest: str
) -> str:
    """Give the identity of the evidence that `run` would make; steps that differ in what is left out share it."""
    return identity(STAGE, _config(config), [source_identity], _sources(calibration_digest, measured_digest))


def shared(config: Rtn | Gptq) -> str:
    """Give what tells one measurement of a model from another."""
    return json.dumps(_config(config), sort_keys=True)


def run(
    config: Rtn | Gptq,
    source: Artifact,
    out: Path,
    *,
    measured: CalibrationSet,
    calibration: CalibrationSet | None = None,
    device: str = "cpu",
    progress: Report = silent,
) -> Artifact:
    """Write `sensitivity.json` of a `model` artifact; a run that was killed goes on after its last finished block.

    The whole model is in memory. Raises StageError where a layer cannot be solved.
    """
    from edgetune.compress.checkpoint import read_config
    from edgetune.compress.layerwise import load_model
    from edgetune.compress.quantize import solver

    shown = calibration if isinstance(config, Gptq) else None
    sources = _sources(shown.digest if shown else None, measured.digest)
    versions = {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
    with draft(
        out, kind="evidence", stage=STAGE, config=_config(config), parents=[source], sources=sources, versions=versions
    ) as pending:
        kept, names = pending.work / FILE, linear_shapes(read_config(source.path))
        found = measure(
            load_model(source), measured.ids,
            {label: solver(config, dict.fromkeys(names, scheme)) for label, scheme in schemes(config).items()},
            shown=shown.ids if shown else None, done=_losses(kept) if kept.is_file() else {},
            keep=lambda so_far: write_text(kept, json.dumps(so_far)), device=device, progress=progress,
        )  # fmt: skip
        write_text(pending.path / FILE, json.dumps(found, indent=1) + "\n")
    return pending.artifact


def read(evidence: Artifact) -> Losses:
    """Read what was measured. Raises ArtifactError where the file is damaged."""
    try:
        return _losses(evidence.path / FILE)
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{evidence.path / FILE} is damaged: {str(error).splitlines()[0]}") from error


def measure(
    model: Any,
    rows: NDArray[np.int64],
    solvers: Mapping[Choice, Solve[Any]],
    *,
    fits: Callable[[Choice, int], bool] = lambda choice, width: True,
    shown: NDArray[np.int64] | None = None,
    done: Mapping[str, dict[Choice, float]] | None = None,
    keep: Callable[[dict[str, dict[Choice, float]]], None] = lambda _: None,
    device: str = "cpu",
    progress: Report = silent,
) -> dict[str, dict[Choice, float]]:
    """Give the divergence that each solver makes, group by group; the model is left as it was.

    rows [N, T] measure, `shown` [N, T] calibrate, where a solver wants a Hessian. A group of C in-features is measured
    with the choices for which `fits(choice, C)`. Groups in `done` are not measured again; `keep` gets all of them after
    each block.
    """
    import torch

    from edgetune.compress.divergence import bucket_log_probs, summed_kl, top_tokens
    from edgetune.compress.pieces import Blocks

    blocks, found = Blocks(model, rows, device=device, dtype=torch.float32), dict(done or {})
    calibrating = None if shown is None else Blocks(model, shown, device=device, dtype=torch.float32)
    n = len(model.model.layers)

    def at_the_end(hidden: list[Tensor], first: int) -> list[Tensor]:
        for index in range(first, n):
            hidden = blocks.run(index, hidden)
        return hidden

    reference = []
    for logits in blocks.logits(at_the_end(blocks.embedded, 0)):
        ids = top_tokens(logits, TOP_K)
        reference.append((ids, bucket_log_probs(logits, ids)))

    def loss(hidden: list[Tensor], index: int) -> float:
        parts = zip(reference, blocks.logits(at_the_end(hidden, index)), strict=True)
        return sum(summed_kl(log_p, logits, ids) for (ids, log_p), logits in parts) / rows.size

    hidden, inputs = blocks.embedded, [] if calibrating is None else calibrating.embedded
    for index, block in enumerate(model.model.layers):
        groups = [group for group in SHARED_INPUTS if f"model.layers.{index}.{group[0]}" not in found]
        hessians: dict[str, Tensor] = {}
        if calibrating is not None:
            hessians, inputs = _show(calibrating, block, index, inputs, [group[0] for group in groups])
        for group in groups:
            names = [f"model.layers.{index}.{name}" for name in group]
            layers = [block.get_submodule(name) for name in group]
            floats = [layer.weight.data for layer in layers]
            stacked, sizes = torch.cat(floats).float(), [len(weight) for weight in floats]
            found[names[0]] = {}
            for choice, solve in solvers.items():
                if not fits(choice, stacked.shape[1]):
                    continue
                try:
                    quantized, _ = solve(names, stacked, hessians.get(group[0]), None)
                except EdgetuneError as error:
                    raise type(error)(f"{' + '.join(names)}: {error}") from error
                for layer, made in zip(layers, torch.split(quantized.dequantize(), sizes), strict=True):
                    layer.weight.data = made.to(floats[0].dtype)
                nats = loss(hidden, index)
                if not math.isfinite(nats):
                    what = f"{choice} bits" if isinstance(choice, int) else choice
                    raise StageError(
                        f"{' + '.join(names)}: with {what} the model's outputs are not finite; leave that choice out"
                    )
                found[names[0]][choice] = float(f"{nats:.6g}")
            for layer, weight in zip(layers, floats, strict=True):
                layer.weight.data = weight
        hidden = blocks.run(index, hidden)
        keep(found)
        progress(index + 1, n, f"model.layers.{index}")
    return found


def _show(
    blocks: Blocks, block: nn.Module, index: int, hidden: list[Tensor], names: Sequence[str]
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Send calibration rows through a block; give the Hessian of each named layer's inputs, and the outputs."""
    from edgetune.compress.hessian import Hessian

    layers: Any = {name: block.get_submodule(name) for name in names}
    found = {name: Hessian(layer.in_features, device=hidden[0].device) for name, layer in layers.items()}
    handles = [
        layers[name].register_forward_pre_hook(lambda _, args, h=hessian: h.add(args[0]))
        for name, hessian in found.items()
    ]
    try:
        after = blocks.run(index, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return {name: hessian.H for name, hessian in found.items()}, after


def _losses(file: Path) -> Losses:
    stored = json.loads(file.read_bytes())
    return {
        name: {int(label) if label.isdigit() else label: float(nats) for label, nats in of.items()}
        for name, of in stored.items()
    }


def _config(config: Rtn | Gptq) -> dict[str, Any]:
    """Give what is read while measuring; rows to calibrate on are GPTQ's alone."""
    unread = dict.fromkeys(("recover", "tune", "correction", "hessian", "checkpoint", "damping"), True)
    rows = {} if isinstance(config, Gptq) else {"calibration": True}
    return config.model_dump(mode="json", exclude={"allocate": {"budget", "keep_update"}, **unread, **rows})


def _sources(calibration_digest: str | None, measured_digest: str) -> dict[str, str]:
    return {"measured": measured_digest} | ({"calibration": calibration_digest} if calibration_digest else {})
