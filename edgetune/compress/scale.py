"""The stage that scales a model by AWQ before it is quantized: the same function in other weights.

What a layer's columns are multiplied by, what makes its input is divided by: the norm before attention or the
feed-forward part, the up projection's rows, the value projection's rows. Torch is loaded when it runs, not before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, draft, identity, require_space
from edgetune.compress.architectures import SHARED_INPUTS, linear_shapes
from edgetune.compress.scheme import Scheme, check_group
from edgetune.errors import EdgetuneError
from edgetune.progress import Report, silent
from edgetune.recipe import Awq

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgetune.compress.hessian import Hessian
    from edgetune.data.calibration import CalibrationSet

STAGE = "compress.awq/3"
# What makes the input of each group of layers.
MAKES = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


def check(config: Awq, model_config: dict[str, Any]) -> None:
    """Refuse what cannot be done, from `config.json` alone. Raises UnsupportedError naming the layer."""
    for name, (_, in_features) in linear_shapes(model_config).items():
        check_group(name, in_features, config.group_size)


def planned_identity(config: Awq, source_identity: str, calibration_digest: str) -> str:
    """Give the identity of the model that `run` would make."""
    return identity(STAGE, config.model_dump(mode="json"), [source_identity], {"calibration": calibration_digest})


def run(
    config: Awq,
    source: Artifact,
    out: Path,
    *,
    calibration: CalibrationSet,
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
) -> Artifact:
    """Scale a `model` artifact into one that computes the same and loses less when it is rounded to the config's grid.

    Scales are found in one pass of the float model over the calibration rows, of which one block is in memory at a
    time. A run that was killed scales no finished block again and ends in the same bytes. Raises UnsupportedError
    before any work.
    """
    from edgetune.compress.checkpoint import open_file, read_config
    from edgetune.compress.finished import Lazily
    from edgetune.compress.model_file import write_model
    from edgetune.compress.streamed import open_model

    model_config = read_config(source.path)
    check(config, model_config)
    require_space(out.parent, 3 * source.size_bytes)  # finished blocks, and the file twice (`tensor_file`)
    with draft(
        out, kind="model", stage=STAGE, config=config.model_dump(mode="json"), parents=[source],
        sources={"calibration": calibration.digest}, versions=_versions(),
    ) as pending:  # fmt: skip
        found, files = scale(
            open_model(source), calibration, Scheme(config.bits, config.group_size, config.sym), work=pending.work,
            key=planned_identity(config, source.identity, calibration.digest), device=device, progress=progress,
        )  # fmt: skip
        write_model(pending.path, source, Lazily(files, lambda name: open_file(files[name]).get_tensor(name)))
        pending.seed, pending.calibration = seed, calibration.digest
        pending.notes["scales"] = found
    return pending.artifact


def scale(
    model: Any,
    calibration: CalibrationSet,
    scheme: Scheme,
    *,
    work: Path,
    key: str,
    device: str = "cpu",
    progress: Report = silent,
) -> tuple[dict[str, dict[str, float]], dict[str, Path]]:
    """Scale a skeleton of `open_model` block by block, each kept in a file of `work` under `key`.

    Gives the power and the share of the error that is left, by the first layer of a group, and the file of each tensor.
    A walk that is begun again scales no block that is done. Raises StageError naming the layers.
    """
    from edgetune.compress.hessian import Hessian
    from edgetune.compress.layerwise import decoder_blocks, observe

    blocks = decoder_blocks(model)
    kept = [_Kept.read(work / f"model.layers.{index}.safetensors", key) for index in range(len(blocks))]
    hessians: dict[str, Hessian] = {}
    now = 0

    def finish(index: int) -> None:
        if kept[index] is None:
            kept[index] = _scale_block(model, index, hessians, scheme, work / f"model.layers.{index}.safetensors", key)
        hessians.clear()

    def see(index: int, name: str, X: Tensor) -> None:
        nonlocal now
        if index != now:  # the block before has its own weights again
            finish(now)
            now = index
        if kept[index] is None:
            hessians.setdefault(name, Hessian(X.shape[-1], device=X.device)).add(X)

    observe(model, calibration.ids, see, work=work, device=device, progress=progress)
    finish(now)
    done = [one for one in kept if one is not None]
    assert len(done) == len(blocks)
    return {n: f for one in done for n, f in one.found.items()}, {n: one.file for one in done for n in one.names}


@dataclass(frozen=True)
class _Kept:
    """A block that is scaled: its file, the tensors in it, and what was found."""

    file: Path
    names: list[str]
    found: dict[str, dict[str, float]]

    @classmethod
    def read(cls, file: Path, key: str) -> _Kept | None:
        """Read it again; None where there is none of this walk."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as stored:
                about = json.loads((stored.metadata() or {}).get("edgetune", "{}"))
                return cls(file, list(stored.keys()), about["found"]) if about.get("key") == key else None
        except (OSError, SafetensorError, KeyError, ValueError):
            return None  # cut by a kill, or never written


def _scale_block(model: Any, index: int, hessians: dict[str, Hessian], scheme: Scheme, file: Path, key: str) -> _Kept:
    from edgetune.compress.finished import keep_tensors
    from edgetune.compress.streamed import present

    prefix, found = f"model.layers.{index}", {}
    with present(model, prefix):
        block = model.get_submodule(prefix)
        for group in SHARED_INPUTS:
            names = [f"{prefix}.{name}" for name in group]
            try:
                found[names[0]] = _scale_group(block, group, hessians[group[0]], scheme)
            except EdgetuneError as error:
                raise type(error)(f"{' + '.join(names)}: {error}") from error
        tensors = {f"{prefix}.{name}": tensor.contiguous() for name, tensor in block.state_dict().items()}
        keep_tensors(file, tensors, {"key": key, "found": found})
    return _Kept(file, list(tensors), found)


def _scale_group(block: nn.Module, group: tuple[str, ...], hessian: Hessian, scheme: Scheme) -> dict[str, float]:
    from edgetune.compress.awq import Heads, find_scales

    layers: list[Any] = [block.get_submodule(name) for name in group]
    maker: Any = block.get_submodule(MAKES[group[0]])
    H, heads = hessian.H, None
    if group[0] == "self_attn.o_proj":
        size = int(block.self_attn.head_dim)  # type: ignore[union-attr, arg-type]
        n_kv, n_heads = maker.out_features // size, layers[0].in_features // size
        heads = Heads(n_kv, n_heads // n_kv, size)
    weights = [layer.weight.detach().to(H.device) for layer in layers]
    scales = find_scales(weights, H, scheme, heads)
    s = scales.s.to(layers[0].weight.device)
    for layer in layers:
        layer.weight.data = (layer.weight.float() * s).to(layer.weight.dtype)
    rows = s if heads is None else s.view(heads.n_kv, heads.n_queries, heads.size)[:, 0].reshape(-1)
    for tensor in (maker.weight, getattr(maker, "bias", None)):
        if tensor is not None:
            divisor = rows if tensor.ndim == 1 else rows[:, None]
            tensor.data = (tensor.float() / divisor).to(tensor.dtype)
    return {"power": round(scales.power, 2), "error": float(f"{scales.error:.3g}")}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
