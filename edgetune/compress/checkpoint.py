"""Quantized checkpoints: AutoGPTQ's format, and through `pack_quantized` that of compressed-tensors.

AutoGPTQ's, version 1, is one safetensors file, read by transformers, gptqmodel, vLLM and others:

    NAME.qweight int32 [C * bits / 32, R]    NAME.scales float16 [G, R]
    NAME.qzeros  int32 [G, R * bits / 32]    NAME.g_idx  int32   [C]

Version 1 stores zero points minus one, `gptq_v2` as they are. What is not quantized is float16, which the
kernels of those readers want. Shapes: R out-features, C in-features, G groups.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from edgetune.artifact import Artifact, write_text
from edgetune.compress import pack_quantized
from edgetune.compress.architectures import SUPPORTED, check_architecture
from edgetune.compress.correction import corrected_weight, read_correction
from edgetune.compress.dynamic import dynamic_bits, read_bits
from edgetune.compress.packing import check_pack, pack, unpack
from edgetune.compress.scheme import Quantized, Scheme, plain_groups
from edgetune.compress.tensor_file import TensorFile
from edgetune.errors import ArtifactError, StageError, UnsupportedError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
PARTS = (*GPTQ_PARTS, *pack_quantized.PARTS)
FLAT = ("g_idx", "weight_shape")  # the others are matrices
Form = Literal["gptq", "compressed-tensors"]
PART_VALUES = 1 << 24  # of a tensor that is not quantized, at a time
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model",
    "chat_template*", "additional_chat_templates/*", "generation_config.json", "golden.json", "LICENSE*", "NOTICE*",
)  # fmt: skip


def write_checkpoint(
    folder: Path,
    source: Artifact,
    layers: Mapping[str, Quantized],
    schemes: Mapping[str, Scheme],
    *,
    method: str,
    desc_act: bool = False,
    static_groups: bool = False,
    damp_percent: float | None = None,
    form: Form = "gptq",
) -> None:
    """Write a checkpoint of `source` with the weights of `layers` (by full name) quantized, one tensor after the other.

    `schemes` has each layer's; in AutoGPTQ's format they differ in bits alone. `desc_act` and the rest say how it was
    made. The file's own `desc_act` says what a reader has to know: whether columns have left their groups, which static
    groups avoid. Raises StageError where a value leaves float16, UnsupportedError where the format cannot hold a layer.
    """
    config = read_config(source.path)
    tied, taken, ordered = config.get("tie_word_embeddings", False), set(), False
    with TensorFile(folder / WEIGHTS, {"format": "pt"}) as out:
        for file in weight_files(source.path):
            for name in open_file(file).keys():  # noqa: SIM118
                if name.removesuffix(".weight") in layers:
                    taken.add(name.removesuffix(".weight"))
                elif not (tied and name == "lm_head.weight"):
                    out.add(name, (_to_half(name, part) for part in _parts(file, name)))
        assert taken == set(layers), set(layers) - taken
        for name, layer in layers.items():
            width = schemes[name].bits
            if form == "gptq":
                check_pack(name, layer.q.shape[0], layer.q.shape[1], width)
            packed = (
                _packed(layer, width)
                if form == "gptq"
                else pack_quantized.packed(name, layer, width, sym=schemes[name].sym)
            )
            for part, tensor in packed.items():
                out.add(f"{name}.{part}", [tensor])
            ordered = ordered or not torch.equal(layer.g_idx, _plain(layer))
    scheme = Counter(schemes.values()).most_common(1)[0][0]
    quantization: dict[str, Any] = {
        "quant_method": "gptq", "bits": scheme.bits, "group_size": scheme.group_size, "sym": scheme.sym,
        "desc_act": ordered, "static_groups": static_groups,
        **({} if damp_percent is None else {"damp_percent": damp_percent}),  # transformers reads no null there
        "lm_head": False,
        "true_sequential": True, "checkpoint_format": "gptq", "pack_dtype": "int32", "model_name_or_path": None,
        "model_file_base_name": "model",
        "meta": {"quantizer": ["edgetune"], "method": method, "activation_order": desc_act},
    }  # fmt: skip
    if dynamic := dynamic_bits({name: one.bits for name, one in schemes.items()}, scheme.bits):
        quantization["dynamic"] = dynamic
    if form == "compressed-tensors":
        quantization = pack_quantized.quantization_config(schemes, method)
    config |= {name: "float16" for name in ("dtype", "torch_dtype") if name in config} or {"dtype": "float16"}
    config["quantization_config"] = quantization
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if form == "gptq":
        write_text(folder / "quantize_config.json", json.dumps(quantization, indent=2) + "\n")
    for name in source.manifest.files:
        if any(fnmatch.fnmatch(name, pattern) for pattern in CARRIED):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, folder / name)


def read_layers(folder: Path) -> dict[str, Quantized]:
    """Read the quantized layers of a checkpoint, by full name.

    Raises ArtifactError where it is damaged, UnsupportedError where it is of another kind.
    """
    return _read(folder)[0]


def stored_bits(folder: Path) -> Callable[[str], int]:
    """Give what tells the bits of a quantized layer by its full name. Raises as `read_layers`."""
    grid_of = _settings(folder).grid_of
    return lambda name: grid_of(name)[0]


def load_dequantized(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Give the transformers model that a checkpoint stands for, in plain float weights: integers with their correction.

    Raises as `read_layers`.
    """
    import transformers

    layers, state = _read(folder)
    pairs, config = read_correction(folder), open_config(folder)
    if hasattr(config, "quantization_config"):  # else it is in a file of its own
        del config.quantization_config
    try:
        state |= {
            f"{name}.weight": corrected_weight(layer.dequantize(), pairs.get(name)).to(dtype)
            for name, layer in layers.items()
        }
        model, info = getattr(transformers, SUPPORTED[config.model_type]).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    wrong = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
    if wrong:
        raise ArtifactError(f"{folder}: tensor {wrong[0]} is missing or not of this architecture; make it again")
    return model.eval()


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of a model or checkpoint folder. Raises ArtifactError."""
    return _read_json(folder / "config.json")


def open_config(folder: Path) -> Any:
    """Give the transformers configuration of a model or checkpoint folder.

    Raises ArtifactError where a field is damaged, UnsupportedError where the architecture is unknown.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        said = " ".join(" ".join(str(error).splitlines()[:2]).split())
        raise ArtifactError(f"{folder} cannot be loaded: {said}") from error
    check_architecture(config.to_dict())
    return config


def open_weights(folder: Path) -> list[Any]:
    """Open the safetensors of a model or checkpoint folder. Raises ArtifactError."""
    return [open_file(file) for file in weight_files(folder)]


@dataclass(frozen=True)
class _Settings:
    """What a checkpoint says of its integers."""

    form: Form
    grid_of: Callable[[str], tuple[int, int | None]]  # bits and group size of a layer; -1 a whole row, None not named
    zero_offset: int = 0  # to be added to a stored zero point


def _read(folder: Path) -> tuple[dict[str, Quantized], dict[str, Tensor]]:
    """Give the quantized layers and all other tensors."""
    settings = _settings(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with open_file(file) as stored:
            for name in stored.keys():  # noqa: SIM118
                layer, _, part = name.rpartition(".")
                if part in PARTS:
                    parts.setdefault(layer, {})[part] = stored.get_tensor(name)
                else:
                    others[name] = stored.get_tensor(name)
    if not parts:
        raise ArtifactError(f"{folder} holds no quantized layer")
    return {name: _unpacked(folder, name, found, settings) for name, found in parts.items()}, others


def _settings(folder: Path) -> _Settings:
    config = read_config(folder).get("quantization_config")
    config = config or _read_json(folder / "quantize_config.json")
    if not isinstance(config, dict):
        raise ArtifactError(f"{folder}: quantization_config of config.json is no JSON object; make it again")
    if config.get("quant_method") == pack_quantized.METHOD:
        return _Settings("compressed-tensors", pack_quantized.read_schemes(config, str(folder)))
    method, form = config.get("quant_method", "gptq"), config.get("checkpoint_format", "gptq")
    if method != "gptq" or form not in ("gptq", "gptq_v2"):
        raise UnsupportedError(f"{folder} is quantized as {method}/{form}; gptq/gptq, gptq/gptq_v2 and "
                               "compressed-tensors can be read")  # fmt: skip
    bits_of = read_bits(config, str(folder))
    if config.get("pack_dtype", "int32") != "int32":
        raise UnsupportedError(f"{folder}: words of {config['pack_dtype']} cannot be read, int32 can")
    named = config.get("group_size")
    columns = named if isinstance(named, int) else None
    return _Settings("gptq", lambda name: (bits_of(name), columns), 1 if form == "gptq" else 0)


def _packed(layer: Quantized, bits: int) -> dict[str, Tensor]:
    stored = (layer.zero_point - 1) % 2**bits
    return {
        "qweight": pack(layer.q.T, bits),
        "qzeros": pack(stored, bits).T.contiguous(),  # along R
        "scales": layer.scales.T.contiguous(),
        "g_idx": layer.g_idx.contiguous(),
    }


def _unpacked(folder: Path, name: str, parts: dict[str, Tensor], settings: _Settings) -> Quantized:
    bits, columns = settings.grid_of(name)
    try:
        for part, tensor in parts.items():
            if part not in FLAT and tensor.ndim != 2:
                raise ValueError(f"{part} has {tensor.ndim} dimensions instead of 2")
        made = (
            _of_gptq(parts, bits, columns, settings.zero_offset)
            if settings.form == "gptq"
            else pack_quantized.unpacked(parts, bits, columns)
        )
        (R, C), G, g_idx = made.q.shape, made.scales.shape[1], made.g_idx
        fits = made.scales.shape == made.zero_point.shape == (R, G) and g_idx.shape == (C,)
        sound = fits and bool(torch.isfinite(made.scales).all()) and int(g_idx.min()) >= 0 and int(g_idx.max()) < G
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{folder}: layer {name} is damaged or lacks a tensor ({error})") from error
    if not sound:
        raise ArtifactError(f"{folder}: layer {name} is damaged: shapes, scales or g_idx do not fit each other")
    return made


def _of_gptq(parts: dict[str, Tensor], bits: int, group_size: int | None, offset: int) -> Quantized:
    q = unpack(parts["qweight"], bits).T.contiguous().to(torch.uint8)
    zero_point = (unpack(parts["qzeros"].T.contiguous(), bits) + offset) % 2**bits
    scales = parts["scales"].T.contiguous()
    g_idx = parts["g_idx"] if "g_idx" in parts else plain_groups(q.shape[1], group_size, scales.shape[1])
    return Quantized(q, scales, zero_point, g_idx)


def _plain(layer: Quantized) -> Tensor:
    C, G = layer.q.shape[1], layer.scales.shape[1]
    return torch.arange(C, dtype=layer.g_idx.dtype) // (C // G)


def _parts(file: Path, name: str) -> Iterator[Tensor]:
    """Give a tensor, a large one in parts of its rows."""
    stored = open_file(file)
    shape = stored.get_slice(name).get_shape()
    if math.prod(shape) <= PART_VALUES or len(shape) < 2:
        yield stored.get_tensor(name)
        return
    step = max(1, PART_VALUES // math.prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield stored.get_slice(name)[start : start + step]


def _to_half(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    if not bool(torch.isfinite(half).all()):
        raise StageError(f"{name} holds values beyond float16, the dtype of a GPTQ checkpoint; make the model again")
    return half.contiguous()


def weight_files(folder: Path) -> list[Path]:
    """Name the safetensors of a model or checkpoint folder. Raises ArtifactError."""
    if (folder / INDEX).is_file():
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ArtifactError(f"{folder / INDEX} does not say where tensors lie; make it again")
        return [folder / name for name in sorted(set(places.values()))]
    return [folder / WEIGHTS]


def open_file(file: Path) -> Any:
    """Open a safetensors file; what is read of it stays mapped. Raises ArtifactError."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} is damaged or missing ({str(error).splitlines()[0]}); make it again") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file} cannot be read ({str(error).splitlines()[0]}); make it again") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{file} is no JSON object; make it again")
    return found
