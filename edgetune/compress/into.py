"""What a distillation trains of a checkpoint whose integers stay: their scales, or a LoRA adapter beside them.

The integers are those of the `gptq` or `rtn` step before; embeddings, norms and biases stay as well. What comes out is
a checkpoint of the same format, with other scales, or with the adapter in the folder of `correction.py`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgetune.adapt import methods
from edgetune.adapt.trainer import CompletionTrainer
from edgetune.artifact import Artifact
from edgetune.compress.checkpoint import load_dequantized, open_file, read_layers, weight_files
from edgetune.compress.correction import Pair, read_correction, write_correction
from edgetune.compress.scaled_linear import ScaledLinear
from edgetune.compress.tensor_file import TensorFile
from edgetune.devices import compute_dtype
from edgetune.recipe_distill import Distill

SCALES = {"scales": True, "weight_scale": False}  # tensor of a layer's scales in each format -> whether it is [G, R]
CARRIED = ("checkpoint", "recover")  # what exporters and commands ask of a step that made integers


def attach(config: Distill, folder: Path, device: str) -> Any:
    """Load a checkpoint, with nothing to train but what `config.into` says. Raises ArtifactError."""
    model = load_dequantized(folder, compute_dtype(device)).requires_grad_(False)
    if config.into == "adapter":
        from peft import get_peft_model

        adapted = get_peft_model(model, methods.lora_config("lora", config.adapter_rank, config.adapter_rank))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return adapted.to(device)
    pairs = read_correction(folder)
    for name, layer in read_layers(folder).items():
        parent, _, last = name.rpartition(".")
        bias = model.get_submodule(name).bias
        setattr(
            model.get_submodule(parent), last,
            ScaledLinear(layer, None if bias is None else bias.data, pairs.get(name)),
        )  # fmt: skip
    return model.to(device)


def keep_better(trainer: CompletionTrainer) -> tuple[float, bool]:
    """Undo a training that made the rows set aside no better; gives what they were before it, and whether that is kept.

    Scales and adapters begin as what changes nothing, zeros in `factors` and in `lora_B`.
    """
    model, arguments, best = trainer.model, trainer.args, trainer.state.best_metric
    zeros = [p for name, p in model.named_parameters() if ".lora_B." in name or name.endswith(".factors")]
    trained = [parameter.detach().clone() for parameter in zeros]
    for parameter in zeros:
        parameter.data.zero_()
    rows = trainer.get_eval_dataloader()
    looked = trainer.evaluation_loop(rows, "Before", prediction_loss_only=True, metric_key_prefix="eval")
    before = float(looked.metrics[arguments.metric_for_best_model])
    better = best is not None and (best > before if arguments.greater_is_better else best < before)
    if better:
        for parameter, values in zip(zeros, trained, strict=True):
            parameter.data.copy_(values)
    return before, not better


def write(config: Distill, model: nn.Module, student: Artifact, out: Path) -> dict[str, Any]:
    """Write the student's checkpoint with what was trained, into a folder that is there; gives its scheme."""
    scheme = dict(student.manifest.scheme or {})
    scheme |= {key: value for key in CARRIED if (value := student.manifest.config.get(key)) is not None}
    weights = {file.name for file in weight_files(student.path)}
    for name in student.manifest.files:
        if name not in weights or config.into == "adapter":
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(student.path / name, out / name)
    if config.into == "scales":
        write_scales(student.path, out, {n: m for n, m in model.named_modules() if isinstance(m, ScaledLinear)})
        return scheme
    pairs = adapter_pairs(model)
    write_correction(out, pairs)
    added = sum(16 * (A.numel() + B.numel()) for A, B in pairs.values())
    n_weights = sum(len(B) * A.shape[1] for A, B in pairs.values())
    scheme["bits_per_weight"] = round(scheme["bits_per_weight"] + added / n_weights, 4)
    return scheme | {"recover": {"rank": config.adapter_rank}}


def write_scales(source: Path, out: Path, layers: dict[str, ScaledLinear]) -> None:
    """Write the weights of a checkpoint once more, tensor by tensor, with the scales of `layers`, by full name."""
    left = set(layers)
    for file in weight_files(source):
        with TensorFile(out / file.name, {"format": "pt"}) as made, open_file(file) as stored:
            for name in stored.keys():  # noqa: SIM118
                layer, _, part = name.rpartition(".")
                if layer in layers and part in SCALES:
                    left.remove(layer)
                    scales = layers[layer].stored()
                    made.add(name, [scales.T.contiguous() if SCALES[part] else scales])
                else:
                    made.add(name, [stored.get_tensor(name)])
    assert not left, left


def adapter_pairs(model: nn.Module) -> dict[str, Pair]:
    """Give what a LoRA adapter adds to each layer, by full name of the layer, as A [r, C] and B [R, r] float16."""
    found: dict[str, Pair] = {}
    with torch.no_grad():
        for name, module in methods.causal_of(model).named_modules():
            if hasattr(module, "lora_A"):
                ((key, A),) = module.lora_A.items()
                B = module.lora_B[key].weight * module.scaling[key]
                found[name] = (A.weight.half().cpu().contiguous(), B.half().cpu().contiguous())
    return found
