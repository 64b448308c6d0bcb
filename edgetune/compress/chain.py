"""What a candidate's chain of compress steps does to a model, as far as `config.json` tells it. No torch here."""

from __future__ import annotations

import json
from typing import Any

from edgetune import sources
from edgetune.compress import pairing, quantize, scale, sparsify
from edgetune.compress.architectures import linear_shapes
from edgetune.compress.prune import shapes
from edgetune.compress.prune import stage as pruning
from edgetune.errors import UnsupportedError
from edgetune.export.gguf_types import PLAIN
from edgetune.recipe import Awq, Candidate, CompressStep, Gptq, Rtn
from edgetune.recipe_distill import Distill
from edgetune.recipe_prune import Prune
from edgetune.recipe_sparsify import Sparsify

# The stage of each step that reads one model and, at most, calibration rows. Each module has
# check(config, model_config), planned_identity(config, source, calibration's digest) and
# run(config, source, out, *, calibration, device, seed, progress); those of quantize take a sensitivity beside.
STAGES: dict[type, Any] = {Prune: pruning, Sparsify: sparsify, Awq: scale, Rtn: quantize, Gptq: quantize}


def check(candidate: Candidate, model_config: dict[str, Any]) -> dict[str, Any]:
    """Refuse a step that the model it gets cannot take; give the config of what the chain makes.

    Raises UnsupportedError, SourceError where a student is not found.
    """
    config = model_config
    for step in candidate.compress:
        method = step.method
        if not isinstance(method, Distill):
            STAGES[type(method)].check(method, config)
        found = planned_config(step, config, model_config)
        if isinstance(method, Distill):
            _check_rank(method, linear_shapes(found))
            if method.student is not None:
                _check_vocabulary(method, found, model_config)
            pairing.check(method, found, model_config)
        config = found
    return config


def configs(candidate: Candidate, model_config: dict[str, Any]) -> list[dict[str, Any]]:
    """Give the config of the model before the first step, and after each one."""
    made = [model_config]
    for step in candidate.compress:
        made.append(planned_config(step, made[-1], model_config))
    return made


def planned_config(step: CompressStep, config: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """Give the config of what a step makes of a model with `config`; quantizing keeps all shapes."""
    method = step.method
    if isinstance(method, Prune):
        return shapes.pruned_config(method, config)
    if isinstance(method, Distill) and method.student is not None:
        return teacher if method.student == "base" else sources.find(method.student, weights=False).model_config()
    return config


def step_name(step: CompressStep) -> str:
    """Name a step as the seam ledger does: "prune 10 layers ffn 1024", "distill forward", "gptq int4 g32"."""
    method = step.method
    if isinstance(method, Prune):
        sizes = {
            "{} layers": method.layers, "ffn {}": method.intermediate_size, "{} kv heads": method.kv_heads,
            "hidden {}": method.hidden_size, "vocabulary {}": method.vocabulary,
        }  # fmt: skip
        return " ".join(["prune", *(form.format(size) for form, size in sizes.items() if size is not None)])
    if isinstance(method, Distill):
        return f"distill {method.divergence}{f' into {method.into}' if method.into else ''}"
    if isinstance(method, Sparsify):
        return f"sparsify {method.method} {method.pattern if method.group else f'{method.sparsity:.0%}'}"
    if isinstance(method, Awq):
        return "awq"
    group = "row" if method.group_size == -1 else f"g{method.group_size}"
    bits = f"int{method.bits}" if method.allocate is None else f"{method.allocate.budget:g} bits"
    return f"{'gptq' if isinstance(method, Gptq) else 'rtn'} {bits} {group}{' sym' if method.sym else ''}"


def step_names(candidate: Candidate) -> list[str]:
    """Name each step; of several that would be called the same the later ones are counted."""
    names: list[str] = []
    for step in candidate.compress:
        name = step_name(step)
        n_before = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(f"{name} #{n_before + 1}" if n_before else name)
    return names


def chosen_sizes(candidate: Candidate) -> set[str]:
    """Give the keys of `prune` that some step of a chain sets."""
    pruned = [step.prune for step in candidate.compress if step.prune is not None]
    return {key for one in pruned for key, value in one.model_dump().items() if value is not None}


def about_zeros(candidate: Candidate) -> str | None:
    """Say what the zeros of a chain do not save, for the report; None where no step makes any."""
    if all(step.sparsify is None for step in candidate.compress):
        return None
    said = (
        "the zeros of sparsify save neither time nor bytes: llama.cpp, ONNX Runtime on the CPU, torch and the TensorRT "
        "engines that are built here multiply them like any weight"
    )
    gguf = candidate.export.gguf if candidate.export is not None else None
    rounded = candidate.quantizer is not None or (gguf is not None and gguf.type not in PLAIN)
    return said + ("; rounding after it need not keep them" if rounded else "")


def vocabulary(candidate: Candidate, n_steps: int | None = None) -> int | None:
    """Give the number of tokens that the first steps of a chain leave (all where absent); None for the base's own."""
    pruned = (step.prune for step in candidate.compress[:n_steps] if step.prune is not None)
    return next((one.vocabulary for one in pruned if one.vocabulary is not None), None)


def so_far(candidate: Candidate, n_steps: int) -> str:
    """Give what tells the first steps of a chain from others: equal ones are made once."""
    return json.dumps([step.model_dump(mode="json") for step in candidate.compress[:n_steps]])


def _check_rank(config: Distill, shapes: dict[str, tuple[int, int]]) -> None:
    if config.into != "adapter":
        return
    for name, shape in shapes.items():
        if config.adapter_rank >= min(shape):
            raise UnsupportedError(
                f"distill.rank={config.adapter_rank} is no less than the {min(shape)} features of {name}; "
                "use a lower rank"
            )


def _check_vocabulary(config: Distill, student: dict[str, Any], teacher: dict[str, Any]) -> None:
    ours, theirs = student.get("vocab_size"), teacher.get("vocab_size")
    if ours != theirs:
        raise UnsupportedError(
            f"distill.student={config.student!r} has a vocabulary of {ours}, its teacher one of {theirs}; "
            "choose a model of the same tokenizer"
        )
