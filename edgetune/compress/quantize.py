"""The stages that quantize a model: round to nearest, and GPTQ. Torch is loaded when one runs, not before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import Artifact, draft, identity, require_space
from edgetune.compress.allocate import check_budget, layer_schemes, schemes, stores_zero_points
from edgetune.compress.architectures import linear_shapes
from edgetune.compress.scheme import Scheme, check_group
from edgetune.compress.sensitivity import read
from edgetune.compress.update_kept import read as read_kept
from edgetune.compress.vllm_rules import broken_rules
from edgetune.data.contract import hold
from edgetune.errors import UnsupportedError
from edgetune.progress import Report, silent
from edgetune.recipe import Gptq, Rtn

if TYPE_CHECKING:
    from torch import Tensor

    from edgetune.compress.correction import Pair
    from edgetune.compress.damping import Moments
    from edgetune.compress.finished import LayerResult
    from edgetune.compress.layerwise import Choose, Correct, Solve, Tune
    from edgetune.compress.scheme import Quantized
    from edgetune.compress.tune import Outputs
    from edgetune.data.calibration import CalibrationSet

RTN_STAGE = "compress.rtn/5"
GPTQ_STAGE = "compress.gptq/5"


def check(config: Rtn | Gptq, model_config: dict[str, Any]) -> None:
    """Refuse what cannot be done, from the model's `config.json` alone. Raises UnsupportedError naming the layer."""
    from edgetune.compress.packing import check_pack

    ordered = isinstance(config, Gptq) and config.desc_act and not config.static_groups
    if ordered and config.checkpoint == "compressed-tensors":
        raise UnsupportedError("compressed-tensors keeps columns in their groups; set static_groups: true")
    rank = config.recover.rank if config.recover else 0
    for name, (out_features, in_features) in linear_shapes(model_config).items():
        if rank >= min(out_features, in_features):
            raise UnsupportedError(
                f"recover.rank={rank} is no less than the {min(out_features, in_features)} features of {name}; "
                "use a lower rank"
            )
        for scheme in schemes(config).values():
            check_group(name, in_features, scheme.group_size)
            if config.checkpoint == "gptq":
                check_pack(name, out_features, in_features, scheme.bits)
    if config.allocate is not None:
        check_budget(config, model_config)
    if isinstance(config, Gptq):
        _check_held_out(config)


def planned_identity(
    config: Rtn | Gptq,
    source_identity: str,
    calibration_digest: str | None,
    sensitivity: str | None = None,
    kept: str | None = None,
) -> str:
    """Give the identity of what `run` would make.

    `sensitivity` and `kept` are those of the evidence which `allocate` and its `keep_update` read.
    """
    parents = [source_identity, *(one for one in (sensitivity, kept) if one)]
    return identity(_stage(config), config.model_dump(mode="json"), parents, _sources(config, calibration_digest))


def run(
    config: Rtn | Gptq,
    source: Artifact,
    out: Path,
    *,
    calibration: CalibrationSet | None = None,
    sensitivity: Artifact | None = None,
    kept: Artifact | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Report = silent,
) -> Artifact:
    """Quantize a `model` artifact into a `gptq` artifact, a checkpoint in the format that the recipe names.

    GPTQ and `recover` need `calibration`; plain rounding does not read it. `allocate` needs `sensitivity`, and its
    `keep_update` needs `kept`. A run that was killed goes on after its last finished block and ends in the same bytes.
    Raises UnsupportedError before any work, StageError naming the layer.
    """
    from edgetune.compress.checkpoint import read_config, write_checkpoint
    from edgetune.compress.finished import Lazily
    from edgetune.compress.layerwise import quantize_blocks
    from edgetune.compress.streamed import open_model

    model_config = read_config(source.path)
    check(config, model_config)
    wants_rows = config.calibration is not None
    if wants_rows and calibration is None:
        what = "gptq" if isinstance(config, Gptq) else "recover"
        raise UnsupportedError(f"{what} needs calibration rows and got none; give data in the recipe, or use plain rtn")
    rows = calibration.ids if wants_rows and calibration is not None else None
    digest = calibration.digest if wants_rows and calibration is not None else None
    of, model = _schemes(config, model_config, sensitivity, kept), open_model(source)
    scheme = Counter(of.values()).most_common(1)[0][0]
    evidence = [one for one in (sensitivity, kept) if one is not None]
    with draft(
        out, kind="gptq", stage=_stage(config), config=config.model_dump(mode="json"), parents=[source, *evidence],
        sources=_sources(config, digest), versions=_versions(),
    ) as pending:  # fmt: skip
        finished = sum(file.stat().st_size for file in pending.work.glob("*.safetensors"))
        require_space(out.parent, disk_bytes(config, model_config, of) - finished)
        key = planned_identity(config, source.identity, digest, *(one.identity for one in evidence))
        results = quantize_blocks(
            model, rows, solver(config, of), work=pending.work, key=key, device=device,
            progress=progress,
            both=isinstance(config, Gptq) and config.correction > 0,
            fast=isinstance(config, Gptq) and config.hessian == "bfloat16", correct=_corrector(config),
            tune=_tuner(config, of), choose=_chooser(config, of),
        )  # fmt: skip
        layers = Lazily(results, lambda name: results[name].quantized)
        how: dict[str, Any] = {"method": "rtn"}
        if isinstance(config, Gptq):
            how = {
                "method": "gptq", "desc_act": config.desc_act, "static_groups": config.static_groups,
                "damp_percent": config.damp_percent if config.damping == "fixed" else None,
            }  # fmt: skip
        write_checkpoint(pending.path, source, layers, of, form=config.checkpoint, **how)
        if pairs := {name: result.pair for name, result in results.items() if result.pair is not None}:
            from edgetune.compress.correction import write_correction

            write_correction(pending.path, pairs)
        hold(pending.path)
        errors = {name: result.relative_error for name, result in results.items()}
        pending.seed, pending.calibration = seed, digest
        pending.scheme = {
            "bits": scheme.bits, "group_size": scheme.group_size, "sym": config.sym,
            "desc_act": isinstance(config, Gptq) and config.desc_act,
            "bits_per_weight": _bits_per_weight(config, model_config, of),
        }  # fmt: skip
        if config.allocate is not None:
            pending.scheme["bits_of"] = {name: one.bits for name, one in of.items()}
            if config.allocate.grids:
                pending.scheme["group_size_of"] = {name: one.group_size for name, one in of.items()}
        pending.fallbacks = [f"{name}: {line}" for name, result in results.items() for line in result.fallbacks]
        pending.notes = {
            "relative_error": errors, "mean_relative_error": round(sum(errors.values()) / len(errors), 6),
            "vllm": broken_rules(config.checkpoint, list(dict.fromkeys(of.values())), linear_shapes(model_config)),
        }  # fmt: skip
        if tuned := {n.partition(".self_attn")[0]: r.tuned for n, r in results.items() if r.tuned and ".q_proj" in n}:
            pending.notes["tuned"] = tuned
        if dampings := {name: result.damping for name, result in results.items() if result.damping is not None}:
            pending.notes["damping"] = dampings
    return pending.artifact


def disk_bytes(config: Rtn | Gptq, model_config: dict[str, Any], of: Mapping[str, Scheme]) -> int:
    """Give the bytes that a run has on the disk at its end: finished blocks, and the checkpoint twice (`tensor_file`).

    A finished block has a byte for each code, 6 for each group's scale and zero point and 4 for each column's group.
    Activations that are too many for memory, norms and biases are not counted.
    """
    rank, shapes = config.recover.rank if config.recover else 0, linear_shapes(model_config)
    blocks = sum(
        R * C + 6 * R * C // of[name].group_columns(C) + 4 * C + 2 * rank * (R + C) for name, (R, C) in shapes.items()
    )
    integers = sum(bits / 8 + 4 * shapes[name][1] for name, bits in _stored_bits(config, shapes, of).items())
    token = 1 if model_config.get("tie_word_embeddings") else 2
    embeddings = 2 * token * int(model_config.get("vocab_size") or 0) * int(model_config["hidden_size"])
    return blocks + 2 * int(integers + embeddings)


def _schemes(
    config: Rtn | Gptq, model_config: dict[str, Any], sensitivity: Artifact | None, kept: Artifact | None
) -> dict[str, Scheme]:
    """Give the scheme of every layer."""
    if config.allocate is None:
        return dict.fromkeys(linear_shapes(model_config), Scheme(config.bits, config.group_size, config.sym))
    assert sensitivity is not None, "the recipe's graph plans it"
    assert (kept is not None) == (config.allocate.keep_update is not None), "as what it reads"
    return layer_schemes(config, model_config, read(sensitivity), None if kept is None else read_kept(kept))


def _check_held_out(config: Gptq) -> None:
    """Refuse calibration rows that are too few to hold some out."""
    rows = config.calibration
    if config.damping == "held-out":
        from edgetune.compress.damping import EVERY

        if rows.n_samples < EVERY:
            raise UnsupportedError(
                f"damping: held-out holds out every {EVERY}th calibration row, of which there are {rows.n_samples}; "
                "raise calibration.n_samples"
            )
    if config.tune is not None and config.tune.zeros:
        from edgetune.compress.layerwise import BATCH_TOKENS

        at_once = max(1, BATCH_TOKENS // rows.n_tokens)
        if rows.n_samples <= at_once:
            raise UnsupportedError(
                f"tune.zeros is judged by calibration rows that it does not learn from, and {at_once} are learned from "
                f"at once; raise calibration.n_samples={rows.n_samples} above that"
            )


def solver(config: Rtn | Gptq, of: Mapping[str, Scheme]) -> Solve[Quantized]:
    """Give what quantizes the layers of a group, by the scheme of the first of them."""
    from edgetune.compress.gptq import gptq_quantize
    from edgetune.compress.rtn import rtn_quantize

    def solve(
        names: Sequence[str], weight: Tensor, hessian: Tensor | None, cross: Tensor | None
    ) -> tuple[Quantized, tuple[str, ...]]:
        scheme = of[names[0]]
        if not isinstance(config, Gptq):
            return rtn_quantize(weight, scheme), ()
        assert hessian is not None
        result = gptq_quantize(
            weight, hessian, scheme, block_size=config.block_size, damp_percent=config.damp_percent,
            desc_act=config.desc_act, static_groups=config.static_groups, search=True,
            weighted=config.grid == "weighted", cross=cross, correction=config.correction,
        )  # fmt: skip
        return result.quantized, result.fallbacks

    return solve


def _chooser(config: Rtn | Gptq, of: Mapping[str, Scheme]) -> Choose[Quantized] | None:
    if not isinstance(config, Gptq) or config.damping == "fixed":
        return None
    from edgetune.compress.damping import DAMPINGS, least_damping

    solvers = {share: solver(config.model_copy(update={"damp_percent": share}), of) for share in DAMPINGS}

    def choose(names: Sequence[str], weight: Tensor, parts: Sequence[Moments]) -> tuple[Solve[Quantized], float]:
        chosen = least_damping(solvers, names, weight, parts)
        return solvers[chosen], chosen

    return choose


def _corrector(config: Rtn | Gptq) -> Correct | None:
    if (recover := config.recover) is None:
        return None
    from edgetune.compress.correction import low_rank

    def correct(error: Tensor, hessian: Tensor) -> Pair:
        A, B = low_rank(error, hessian, recover.rank, recover.method)
        return A.half(), B.half()  # as they are stored

    return correct


def _tuner(config: Rtn | Gptq, of: Mapping[str, Scheme]) -> Tune | None:
    if not isinstance(config, Gptq) or (asked := config.tune) is None:
        return None
    from edgetune.compress.correction import corrected_weight
    from edgetune.compress.tune import tune_scales
    from edgetune.compress.zero_points import Reach

    def tune(
        done: Mapping[str, LayerResult[Any]],
        floats: Mapping[str, Tensor],
        outputs: Outputs,
        n_batches: int,
        device: str,
    ) -> dict[str, LayerResult[Any]]:
        def corrected(weights: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
            return outputs({name: corrected_weight(W, done[name].pair) for name, W in weights.items()}, i)

        layers = {name: result.quantized.to(device) for name, result in done.items()}
        reach = None
        if asked.zeros:
            weights = {name: floats[f"{name.split('.', 3)[3]}.weight"].to(device) for name in done}
            reach = {name: Reach.of(layer, weights[name], of[name].max_code) for name, layer in layers.items()}
        tuned = tune_scales(
            layers, corrected, n_batches, steps=asked.steps, learning_rate=asked.learning_rate, reach=reach
        )
        made, n_moved = tuned.applied(layers, reach)
        errors = (float(f"{tuned.before:.3g}"), float(f"{tuned.after:.3g}"), *([n_moved] if asked.zeros else []))
        return {name: replace(result, quantized=made[name].cpu(), tuned=errors) for name, result in done.items()}

    return tune


def _bits_per_weight(config: Rtn | Gptq, model_config: dict[str, Any], of: Mapping[str, Scheme]) -> float:
    """Bits for each quantized weight, over all layers; scales, stored zero points and corrections counted."""
    rank, shapes = config.recover.rank if config.recover else 0, linear_shapes(model_config)
    stored = sum(_stored_bits(config, shapes, of).values()) + sum(16 * rank * (R + C) for R, C in shapes.values())
    return round(stored / sum(R * C for R, C in shapes.values()), 4)


def _stored_bits(
    config: Rtn | Gptq, shapes: Mapping[str, tuple[int, int]], of: Mapping[str, Scheme]
) -> dict[str, float]:
    """Give the bits that each layer's integers take in the checkpoint."""
    zero_points = stores_zero_points(config)
    return {name: R * C * of[name].bits_per_weight(C, zero_points=zero_points) for name, (R, C) in shapes.items()}


def _stage(config: Rtn | Gptq) -> str:
    return GPTQ_STAGE if isinstance(config, Gptq) else RTN_STAGE


def _sources(config: Rtn | Gptq, calibration_digest: str | None) -> dict[str, str]:
    return {"calibration": calibration_digest} if config.calibration is not None and calibration_digest else {}


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("edgetune", "torch", "transformers")}
