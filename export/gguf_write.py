"""A Transformers checkpoint as a GGUF file: hyperparameters, vocabulary, and tensors one by one.

What differs between families is data, in `gguf_families`. Shapes: R out-features, C in-features.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.backends import require
from edgetune.errors import SourceError, StageError, UnsupportedError
from edgetune.export.gguf_families import (
    Family,
    change,
    common,
    family,
    gguf_name,
    head_width,
    longrope_factor,
    rope,
    rope_tensors,
    rotated_width,
    written_shape,
)
from edgetune.export.gguf_kept import Kept, kept_layers
from edgetune.export.gguf_types import PLAIN
from edgetune.export.gguf_vocab import Vocabulary
from edgetune.ggml_types import file_type, named
from edgetune.progress import Report

if TYPE_CHECKING:
    from edgetune.export.ggml import Quantizer

Array = NDArray[Any]
_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Weights:
    """The tensors of a model, by their Transformers names; `get` reads one, as float32 unless it is stored shorter."""

    shapes: dict[str, tuple[int, ...]]
    dtype: str  # what all matrices are stored as: F32, F16 or BF16
    get: Callable[[str], Any]  # -> torch.Tensor
    integers: Mapping[str, Kept | None] = field(
        default_factory=dict
    )  # of a checkpoint's layers, where a type holds them

    def kept(self, name: str, kind: str) -> Kept | None:
        """Give a layer's integers where a tensor of that type holds them."""
        found = self.integers.get(name)
        return found if found is not None and found.kind == kind else None


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


def artifact_weights(source: Artifact, model_config: Mapping[str, Any]) -> Weights:
    """Give the tensors of a `model` or `gptq` artifact. Raises UnsupportedError for other kinds."""
    if source.manifest.kind == "model":
        return folder_weights(source.path, model_config)
    if source.manifest.kind == "gptq":
        from edgetune.compress.checkpoint import load_dequantized

        state = dict(load_dequantized(source.path).state_dict())
        if model_config.get("tie_word_embeddings"):
            state.pop("lm_head.weight", None)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return Weights(shapes, "F32", state.__getitem__, kept_layers(source.path))
    raise UnsupportedError(f"an artifact of kind {source.manifest.kind} cannot be exported to GGUF; model or gptq can")


def tensors(weights: Weights, model_config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Give (GGUF name, Transformers name) of each tensor, in the order of the file."""
    of = family(model_config)
    pairs = [(gguf_name(name, of), name) for name in weights.shapes if not name.endswith(_BUFFERS)]

    def order(pair: tuple[str, str]) -> tuple[int, str]:
        layer = re.match(r"blk\.(\d+)\.", pair[0])
        return (int(layer[1]) if layer else -1, pair[0])

    yield from sorted(pairs, key=order)


def written_shapes(weights: Weights, model_config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Give the shape of each tensor of the file, by its GGUF name."""
    of = family(model_config)
    return {name: written_shape(weights.shapes[hf], hf, of) for name, hf in tensors(weights, model_config)}


def write_gguf(
    path: Path, weights: Weights, model_config: Mapping[str, Any], vocabulary: Vocabulary, types: Mapping[str, str],
    target: str, progress: Report, quantizer: Quantizer | None = None, moments: Mapping[str, Array] | None = None,
) -> None:  # fmt: skip
    """Write a GGUF file, one tensor in memory at a time; `target` is what its header says that it is.

    `quantizer` makes all types but F32, F16 and BF16; `moments` weigh its rounding, [C] by GGUF name. Raises StageError
    where a value does not fit float16 or is not finite.
    """
    gguf = require("gguf")
    of = family(model_config)
    writer = gguf.GGUFWriter(None, of.name)
    _hyperparameters(gguf, writer, model_config)
    _vocabulary(gguf, writer, vocabulary)
    writer.add_file_type(file_type(target))
    pairs = list(tensors(weights, model_config))
    extra = rope_tensors(model_config)
    for name, source in pairs:
        kind, shape = named(types[name]), written_shape(weights.shapes[source], source, of)
        n_bytes = kind.row_bytes(int(np.prod(shape)))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind.number)
    for name, factors in extra.items():
        writer.add_tensor_info(name, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, (name, source) in enumerate(pairs):
        progress(done, len(pairs), "write")
        if types[name] in PLAIN:
            array = _written(weights.get(source), source, types[name], model_config, of)
        elif (kept := weights.kept(source, types[name])) is not None:
            array = kept.blocks(change(source, of), model_config)
        else:
            assert quantizer is not None, "a quantized file has who quantizes it"
            array = _moved(weights.get(source), source, weights.dtype, model_config, of)
            array = _rounded(array, source, types[name], quantizer, (moments or {}).get(name))
        writer.write_tensor_data(array)
    for factors in extra.values():
        writer.write_tensor_data(factors)
    writer.close()


def _rounded(array: Array, source: str, kind: str, quantizer: Quantizer, importance: Array | None) -> Array:
    """Quantize a matrix [R, C] as it would be written plainly."""
    try:
        return quantizer(array, kind, importance)
    except StageError as error:
        raise StageError(f"{source}: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, see `common`. Raises SourceError."""
    try:
        found: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder / 'config.json'} cannot be read: {error}") from error
    return common(found)


def _written(tensor: Any, name: str, kind: str, model_config: Mapping[str, Any], of: Family) -> Array:
    """One tensor in the bytes that a file holds plainly."""
    import torch

    if not torch.isfinite(tensor).all():
        raise StageError(f"{name}: it holds values that are not finite")
    return _moved(tensor, name, kind, model_config, of)


def _moved(tensor: Any, name: str, kind: str, model_config: Mapping[str, Any], of: Family) -> Array:
    """One tensor as the file orders it, in a float type; bfloat16 as int16, for numpy has none."""
    import torch

    moved = change(name, of)
    if moved is not None and not moved.rows_only:  # computed, or turned: before it is rounded
        tensor = torch.from_numpy(moved.there(tensor.float().numpy(), model_config))
    rounded = tensor.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]).contiguous()
    if rounded.dtype != tensor.dtype and not torch.isfinite(rounded).all():
        raise StageError(f"{name} holds {tensor.abs().max().item():.3g}, float16 ends at 65504; use BF16")
    array: Array = (rounded.view(torch.int16) if kind == "BF16" else rounded).numpy()
    return moved.there(array, model_config) if moved is not None and moved.rows_only else array


def _hyperparameters(gguf: Any, writer: Any, config: Mapping[str, Any]) -> None:
    of, n_heads, head = family(config), int(config["num_attention_heads"]), head_width(config)
    writer.add_type("model")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(n_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or n_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if of.layer_norm:
        writer.add_layer_norm_eps(config.get("layer_norm_eps", 1e-5))
    else:
        writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    of.write(writer, config)
    if not of.rotated:
        return
    theta, kind, scaling = rope(config)
    writer.add_rope_dimension_count(rotated_width(config))
    writer.add_rope_freq_base(theta)
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(scaling["factor"]))
    if kind == "longrope":
        writer.add_rope_scaling_attn_factors(longrope_factor(config))


def _vocabulary(gguf: Any, writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_tokenizer_model("gpt2" if vocabulary.scores is None else "llama")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    for short, token in vocabulary.special.items():
        getattr(writer, f"add_{short}_token_id")(token)
    # A rendered conversation is whole: what the template writes is all that training saw.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)
