"""The stage that scales a model by AWQ before it is quantized: the same function in other weights.

What a layer's columns are multiplied by, what makes its input is divided by: the norm before attention or the
feed-forward part, the up projection's rows, the value projection's rows. Torch is loaded when it runs, not before.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, draft, identity, require_space
from edgetune.compress.architectures import SHARED_INPUTS, linear_shapes
from edgetune.compress.scheme import Scheme, check_group
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.errors import EdgetuneError
from edgetune.progress import Report, silent
from edgetune.recipe import Awq
from edgetune.sources import copy_tokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from edgetune.compress.hessian import Hessian
    from edgetune.data.calibration import CalibrationSet

STAGE = "compress.awq/2"
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

    Scales are found in one pass of the float model over the calibration rows. Raises UnsupportedError before any work.
    """
    from edgetune.compress.checkpoint import read_config
    from edgetune.compress.layerwise import load_model

    model_config = read_config(source.path)
    check(config, model_config)
    require_space(out.parent, source.size_bytes)
    with draft(
        out, kind="model", stage=STAGE, config=config.model_dump(mode="json"), parents=[source],
        sources={"calibration": calibration.digest}, versions=_versions(),
    ) as pending:  # fmt: skip
        model: Any = load_model(source)
        found = scale(model, calibration, Scheme(config.bits, config.group_size, config.sym), device, progress)
        model.save_pretrained(pending.path)
        copy_tokenizer(source.path, pending.path)
        Golden.read(source.path).write(pending.path)
        hold(pending.path)
        pending.seed, pending.calibration = seed, calibration.digest
        pending.notes["scales"] = found
    return pending.artifact


def scale(
    model: Any, calibration: CalibrationSet, scheme: Scheme, device: str, progress: Report
) -> dict[str, dict[str, float]]:
    """Scale a model in place; give the power and the share of the error that is left, by the first layer of a group.

    Raises StageError naming the layers.
    """
    from edgetune.compress.hessian import Hessian
    from edgetune.compress.layerwise import decoder_blocks, observe

    blocks = decoder_blocks(model)
    hessians: dict[str, Hessian] = {}
    found: dict[str, dict[str, float]] = {}
    now = 0

    def finish(index: int) -> None:
        for group in SHARED_INPUTS:
            names = [f"model.layers.{index}.{name}" for name in group]
            try:
                found[names[0]] = _scale_group(blocks[index], group, hessians[group[0]], scheme)
            except EdgetuneError as error:
                raise type(error)(f"{' + '.join(names)}: {error}") from error
        hessians.clear()

    def see(index: int, name: str, X: Tensor) -> None:
        nonlocal now
        if index != now:  # the block before has its own weights again
            finish(now)
            now = index
        hessians.setdefault(name, Hessian(X.shape[-1], device=X.device)).add(X)

    observe(model, calibration.ids, see, device=device, progress=progress)
    finish(now)
    return found


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
