"""A Transformers checkpoint as a GGUF file: names, hyperparameters, vocabulary, and tensors one by one.

What differs between architectures is data, in `ARCHITECTURES`. Shapes: R out-features, C in-features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.backends import require
from edgetune.errors import SourceError, StageError, UnsupportedError
from edgetune.export.gguf_vocab import Vocabulary

Array = NDArray[Any]

# Transformers name of a module -> GGUF name; `{}` is the layer
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp calls an architecture and what it wants otherwise than Transformers."""

    name: str
    permute_rope: bool  # rotates neighbouring pairs where Transformers rotates halves
    extra: Mapping[str, str]  # module names beside _BLOCK
    square: bool = False  # loads only where all query heads together are as wide as the hidden size


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", True, {}),
    "MistralForCausalLM": Architecture("llama", True, {}),
    "Qwen2ForCausalLM": Architecture("qwen2", False, {}, square=True),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", False, {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
    ),
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a model, by their Transformers names; `get` reads one, as float32 unless it is stored shorter."""

    shapes: dict[str, tuple[int, ...]]
    dtype: str  # what all matrices are stored as: F32, F16 or BF16
    get: Callable[[str], Any]  # -> torch.Tensor


def architecture(model_config: Mapping[str, Any]) -> Architecture:
    """Give the table's entry for a config.json. Raises UnsupportedError for what cannot be written."""
    named = (model_config.get("architectures") or [model_config.get("model_type")])[0]
    if named not in ARCHITECTURES:
        raise UnsupportedError(f"{named} cannot be exported to GGUF here; supported: {', '.join(ARCHITECTURES)}")
    if model_config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"hidden_act={model_config['hidden_act']!r} cannot be exported to GGUF; silu can")
    windowed = model_config.get("sliding_window") and model_config.get("use_sliding_window", True)
    if windowed and int(model_config["sliding_window"]) < int(model_config["max_position_embeddings"]):
        raise UnsupportedError(
            f"sliding_window={model_config['sliding_window']} is not applied by llama.cpp for {named}; "
            "set max_position_embeddings to the window, or export to ONNX"
        )
    hidden, queries = int(model_config.get("hidden_size") or 0), _query_width(model_config)
    if ARCHITECTURES[named].square and queries != hidden:
        raise UnsupportedError(
            f"{named} with queries of {queries} and hidden_size={hidden} is not loaded by llama.cpp; "
            "make them equal, or export to ONNX"
        )
    kind = rope(model_config)[1]
    if kind not in ("default", "linear", "llama3"):
        raise UnsupportedError(
            f"rope type {kind!r} cannot be exported to GGUF here; supported: default, linear, llama3"
        )
    return ARCHITECTURES[named]


def _query_width(model_config: Mapping[str, Any]) -> int:
    n_heads, hidden = int(model_config.get("num_attention_heads") or 1), int(model_config.get("hidden_size") or 0)
    return n_heads * int(model_config.get("head_dim") or hidden // n_heads)


def rope(model_config: Mapping[str, Any]) -> tuple[float, str, dict[str, Any]]:
    """Give theta, type and parameters, from Transformers 5's `rope_parameters` or the older keys."""
    found = dict(model_config.get("rope_parameters") or model_config.get("rope_scaling") or {})
    theta = found.get("rope_theta", model_config.get("rope_theta", 10000.0))
    return float(theta), str(found.get("rope_type", found.get("type", "default"))), found


def gguf_name(name: str, arch: Architecture) -> str:
    """Translate `model.layers.3.mlp.up_proj.weight` to `blk.3.ffn_up.weight`. Raises UnsupportedError."""
    module, _, suffix = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{suffix}"
    layer = re.match(r"model\.layers\.(\d+)\.(.+)$", module)
    inner = ({**_BLOCK, **arch.extra}).get(layer[2]) if layer else None
    if layer is None or inner is None or suffix not in ("weight", "bias"):
        raise UnsupportedError(f"tensor {name} has no place in a GGUF file of architecture {arch.name}")
    return f"blk.{layer[1]}.{inner}.{suffix}"


def permute(array: Array, n_heads: int) -> Array:
    """Reorder the rows of each head from halves to neighbouring pairs; [R, C] or [R]."""
    paired = array.reshape(n_heads, 2, array.shape[0] // n_heads // 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)


def unpermute(array: Array, n_heads: int) -> Array:
    """Undo `permute`."""
    paired = array.reshape(n_heads, array.shape[0] // n_heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)


def rotated_heads(name: str, model_config: Mapping[str, Any], arch: Architecture) -> int | None:
    """Give the number of heads whose rows must be permuted in this tensor, or None."""
    if not arch.permute_rope:
        return None
    n_heads = int(model_config["num_attention_heads"])
    if ".q_proj." in name:
        return n_heads
    return int(model_config.get("num_key_value_heads") or n_heads) if ".k_proj." in name else None


def folder_weights(folder: Path, model_config: Mapping[str, Any]) -> Weights:
    """Open the safetensors of a model folder; nothing is read before it is asked for.

    Raises SourceError where there are none, UnsupportedError for other dtypes.
    """
    import safetensors

    safe_open: Any = safetensors.safe_open

    try:
        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    except (OSError, safetensors.SafetensorError) as error:
        raise SourceError(f"{folder}: {error}") from error
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    if model_config.get("tie_word_embeddings"):
        where.pop("lm_head.weight", None)
    if not where:
        raise SourceError(f"{folder} holds no safetensors")
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in where.items()}
    stored = {where[name].get_slice(name).get_dtype() for name, shape in shapes.items() if len(shape) > 1}
    if not stored <= {"F32", "F16", "BF16"}:
        raise UnsupportedError(
            f"{folder} stores its matrices as {', '.join(sorted(stored))}; F32, F16 or BF16 is needed"
        )
    dtype = stored.pop() if len(stored) == 1 else "F32"
    return Weights(shapes, dtype, lambda name: where[name].get_tensor(name))


def tensors(weights: Weights, model_config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give (GGUF name, Transformers name) of each tensor, in the order of the file."""
    arch = architecture(model_config)
    pairs = [(gguf_name(name, arch), name) for name in weights.shapes]

    def order(pair: tuple[str, str]) -> tuple[int, str]:
        layer = re.match(r"blk\.(\d+)\.", pair[0])
        return (int(layer[1]) if layer else -1, pair[0])

    yield from sorted(pairs, key=order)


def write_gguf(
    path: Path, weights: Weights, model_config: Mapping[str, Any], vocabulary: Vocabulary, types: Mapping[str, str],
    progress: Callable[[int, int, str], None],
) -> None:  # fmt: skip
    """Write a GGUF file whose tensors are F32, F16 or BF16, one tensor in memory at a time.

    Raises StageError where a value does not fit float16 or is not finite.
    """
    gguf = require("gguf")
    arch = architecture(model_config)
    writer = gguf.GGUFWriter(None, arch.name)
    _hyperparameters(gguf, writer, model_config)
    _vocabulary(gguf, writer, vocabulary)
    largest = max((types[name] for name in types), key=["F32", "BF16", "F16"].index)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if largest == "F32" else gguf.LlamaFileType[f"MOSTLY_{largest}"])
    pairs = list(tensors(weights, model_config))
    factors = _rope_factors(model_config)
    for name, source in pairs:
        kind = gguf.GGMLQuantizationType[types[name]]
        shape = weights.shapes[source]
        width = 4 if types[name] == "F32" else 2
        writer.add_tensor_info(name, shape, np.dtype(f"u{width}"), width * int(np.prod(shape)), raw_dtype=kind)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, source) in enumerate(pairs):
        progress(done, len(pairs), "write")
        array = _stored(weights.get(source), types[name], name)
        n_heads = rotated_heads(source, model_config, arch)
        writer.write_tensor_data(permute(array, n_heads) if n_heads else array)
    if factors is not None:
        writer.write_tensor_data(factors)
    writer.close()


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises SourceError."""
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error}") from error
    return found


def _stored(tensor: Any, kind: str, name: str) -> Array:
    """One tensor in the bytes that the file holds; bfloat16 as uint16, for numpy has none."""
    import torch

    if not torch.isfinite(tensor).all():
        raise StageError(f"{name} holds values that are not finite")
    stored = tensor.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).contiguous()
    if not torch.isfinite(stored).all():
        raise StageError(f"{name} holds {tensor.abs().max().item():.3g}, float16 ends at 65504; use BF16")
    array: Array = (stored.view(torch.int16) if kind == "BF16" else stored).numpy()
    return array


def _hyperparameters(gguf: Any, writer: Any, config: Mapping[str, Any]) -> None:
    n_heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head = int(config.get("head_dim") or hidden // n_heads)
    theta, kind, scaling = rope(config)
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or n_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))


def _vocabulary(gguf: Any, writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for short, token in vocabulary.special.items():
        getattr(writer, f"add_{short}_token_id")(token)
    # A rendered conversation is whole: what the template writes is all that training saw.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Llama 3's scaling as a divisor for each frequency (transformers, modeling_rope_utils)."""
    theta, kind, scaling = rope(config)
    if kind != "llama3":
        return None
    head = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    wave = 2 * np.pi * theta ** (np.arange(0, head, 2) / head)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    old, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
    smooth = (old / wave - low) / (high - low)
    divisors = np.where(
        wave < old / high, 1.0, np.where(wave > old / low, factor, 1 / ((1 - smooth) / factor + smooth))
    )
    return divisors.astype(np.float32)
