"""The stage that sets weights to zero: a model of the same shapes. Torch is loaded when it runs, not before."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, draft, identity, require_space
from edgetune.compress.architectures import linear_shapes
from edgetune.errors import StageError, UnsupportedError
from edgetune.progress import Report, silent
from edgetune.recipe_sparsify import Sparsify

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edgetune.compress.layerwise import Solve
    from edgetune.compress.masks import Sparse
    from edgetune.data.calibration import CalibrationSet

STAGE = "compress.sparsify/2"


def check(config: Sparsify, model_config: dict[str, Any]) -> None:
    """Refuse what cannot be done, from `config.json` alone. Raises UnsupportedError naming the layer."""
    for name, (_, in_features) in linear_shapes(model_config).items():
        if config.group and in_features % config.group:
            raise UnsupportedError(
                f"pattern {config.pattern}: {config.group} does not divide in_features={in_features} of {name}; "
                "use unstructured"
            )


def planned_identity(config: Sparsify, source_identity: str, calibration_digest: str | None) -> str:
    """Give the identity of the model that `run` would make."""
    return identity(STAGE, config.model_dump(mode="json"), [source_identity], _sources(calibration_digest))


def run(
    config: Sparsify,
    source: Artifact,
    out: Path,
    *,
    calibration: CalibrationSet | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
) -> Artifact:
    """Make a `model` artifact of a `model` artifact, zeros in the linear layers of its blocks.

    One block is in memory at a time. Wanda and SparseGPT need `calibration`, and see what the sparse layers before
    give. A run that was killed goes on after its last finished block and ends in the same bytes. Raises
    UnsupportedError before any work, StageError naming the layer.
    """
    from edgetune.compress.checkpoint import read_config
    from edgetune.compress.finished import Lazily
    from edgetune.compress.layerwise import quantize_blocks
    from edgetune.compress.model_file import write_model
    from edgetune.compress.streamed import open_model

    model_config = read_config(source.path)
    check(config, model_config)
    wants_rows = config.calibration is not None
    if wants_rows and calibration is None:
        raise UnsupportedError(f"{config.method} needs calibration rows and got none; give data, or use magnitude")
    rows = calibration.ids if wants_rows and calibration is not None else None
    digest = calibration.digest if wants_rows and calibration is not None else None
    require_space(out.parent, 3 * source.size_bytes)  # finished blocks, and the file twice (`tensor_file`)
    with draft(
        out, kind="model", stage=STAGE, config=config.model_dump(mode="json"), parents=[source],
        sources=_sources(digest), versions=_versions(),
    ) as pending:  # fmt: skip
        model: Any = open_model(source)
        results = quantize_blocks(
            model, rows, _solver(config, model_config, model.dtype), work=pending.work,
            key=planned_identity(config, source.identity, digest), device=device, progress=progress, fast=True,
        )  # fmt: skip
        weights = Lazily(
            [f"{name}.weight" for name in results], lambda name: results[name.removesuffix(".weight")].quantized.weight
        )
        write_model(pending.path, source, weights)
        zeros, sizes, errors, fallbacks = {}, {}, {}, []
        for name, result in results.items():
            weight = result.quantized.weight
            zeros[name], sizes[name], errors[name] = int((weight == 0).sum()), weight.numel(), result.relative_error
            fallbacks += [f"{name}: {line}" for line in result.fallbacks]
        pending.seed, pending.calibration = seed, digest
        pending.fallbacks = fallbacks
        pending.notes = {
            "sparsity": {name: round(zeros[name] / sizes[name], 4) for name in zeros},
            "mean_sparsity": round(sum(zeros.values()) / sum(sizes.values()), 4),
            "relative_error": errors,
            "mean_relative_error": round(sum(errors.values()) / len(errors), 6),
        }
    return pending.artifact


def _solver(config: Sparsify, model_config: dict[str, Any], dtype: torch.dtype) -> Solve[Sparse]:
    """Give the solver of the layers that share an input; `dtype` is what the file stores."""
    import torch

    from edgetune.compress.hessian import all_finite
    from edgetune.compress.masks import Pattern, Sparse, dead_columns, magnitude, sparsegpt, wanda

    pattern, shapes = Pattern(config.sparsity, config.group), linear_shapes(model_config)

    def solve(
        names: Sequence[str], weight: Tensor, hessian: Tensor | None, _: Tensor | None
    ) -> tuple[Sparse, tuple[str, ...]]:
        layers = torch.split(weight, [shapes[name][0] for name in names])
        if hessian is None:
            return Sparse(torch.cat([magnitude(layer, pattern) for layer in layers]).to(dtype)), ()
        if config.method == "wanda":
            return Sparse(wanda(weight, hessian, pattern).to(dtype)), dead_columns(hessian)
        solved, fallbacks = sparsegpt(layers, hessian, pattern)
        made = torch.cat(solved).to(dtype)
        if not all_finite(made):
            raise StageError(f"SparseGPT makes a weight that leaves {dtype}; use wanda")
        return Sparse(made), (*dead_columns(hessian), *fallbacks)

    return solve


def _sources(calibration_digest: str | None) -> dict[str, str]:
    return {"calibration": calibration_digest} if calibration_digest else {}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
