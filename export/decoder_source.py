"""What a decoder of the Llama kind is made of: its sizes, its rotation, its windows, and its weights one by one.

Which layers have a bias or a norm of queries and keys is read off the tensors that are there, so that a family that
adds one needs no entry anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.compress.architectures import SUPPORTED
from edgetune.errors import UnsupportedError
from edgetune.export.gguf_families import FAMILIES
from edgetune.recipe import Rtn

if TYPE_CHECKING:
    from torch import Tensor

    from edgetune.compress.correction import Pair
    from edgetune.compress.scheme import Quantized

# Rotations whose frequencies do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder, as its config.json has them."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_size: int
    hidden: int
    n_vocab: int
    eps: float
    max_length: int
    windows: tuple[int | None, ...]  # of each layer: how many positions it looks back, itself included; None for all


@dataclass(frozen=True)
class Source:
    """The weights of an artifact, by their Transformers names. Nothing is read before it is asked for."""

    sizes: Sizes
    inv_freq: NDArray[np.float32]  # [D / 2]
    rope_scale: float  # of cosine and sine
    names: frozenset[str]
    get: Callable[[str], Tensor]
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)  # of each quantized layer
    corrections: Mapping[str, Pair] = field(default_factory=dict)  # A [r, C] and B [R, r] beside them

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return "lm_head.weight" not in self.names


def quantizer_of(artifact: Artifact) -> Rtn:
    """Give what made a `gptq` artifact's integers, as far as exporters ask."""
    from edgetune.compress.checkpoint import read_config
    from edgetune.compress.pack_quantized import METHOD

    scheme = artifact.manifest.scheme or {}
    stored = (read_config(artifact.path).get("quantization_config") or {}) | scheme
    fields = {name: stored.get(name) for name in ("bits", "group_size", "sym")}
    fields |= {
        "checkpoint": METHOD if stored.get("quant_method") == METHOD else "gptq",
        "recover": (artifact.manifest.config | scheme).get("recover"),
    }
    if len(widths := sorted(set(scheme.get("bits_of", {}).values()))) > 1:
        del fields["bits"]
        fields["allocate"] = {"budget": scheme["bits_per_weight"], "choices": widths}
    return Rtn.model_validate(fields)


def check_named(config: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise UnsupportedError for an architecture that is not among the known ones, naming the format that takes it."""
    named = (config.get("architectures") or [None])[0]
    if named not in (known := list(known)):
        instead = "; gguf takes it" if named in FAMILIES else ""
        raise UnsupportedError(f"{named or 'a model without architectures'} is not written as a graph; "
                               f"supported: {', '.join(known)}{instead}")  # fmt: skip


def check_decoder(config: Mapping[str, Any]) -> Sizes:
    """Read a config.json. Raises UnsupportedError for a decoder that our graph cannot stand for."""
    check_named(config, SUPPORTED.values())
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(f"hidden_act={config['hidden_act']!r} is not written as a graph; silu is")
    rotation = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotation.get("rope_type", rotation.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise UnsupportedError(f"rope type {kind!r} is not written as a graph; supported: {', '.join(ROPE_TYPES)}")
    hidden, n_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    n_layers = int(config["num_hidden_layers"])
    return Sizes(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=int(config.get("num_key_value_heads") or n_heads),
        head_size=int(config.get("head_dim") or hidden // n_heads), hidden=hidden, n_vocab=int(config["vocab_size"]),
        eps=float(config.get("rms_norm_eps", 1e-6)), max_length=int(config.get("max_position_embeddings", 2048)),
        windows=_windows(config, n_layers),
    )  # fmt: skip


def open_source(artifact: Artifact) -> Source:
    """Open a `model` or `gptq` artifact. Raises UnsupportedError, and ArtifactError where it is damaged."""
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from edgetune.compress.checkpoint import PARTS, read_config, read_layers, stored_bits
    from edgetune.compress.correction import read_correction

    check_decoder(read_config(artifact.path))
    config = AutoConfig.from_pretrained(artifact.path, local_files_only=True)
    sizes = check_decoder(config.to_dict())  # with the family's defaults filled in, those of windows above all
    rotation = LlamaRotaryEmbedding(config)  # the four families rotate alike
    tensors = _tensors(artifact.path)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    names = frozenset(name for name in tensors if name.rpartition(".")[2] not in PARTS)
    layers = read_layers(artifact.path) if artifact.manifest.kind == "gptq" else {}
    bits_of = stored_bits(artifact.path) if layers else None
    bits = {name: bits_of(name) for name in layers} if bits_of is not None else {}
    return Source(
        sizes, rotation.inv_freq.float().numpy(), float(rotation.attention_scaling), names,
        lambda name: tensors[name](), layers, bits, read_correction(artifact.path) if layers else {},
    )  # fmt: skip


def _tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Give a reader for each tensor of a folder's safetensors."""
    from functools import partial

    from edgetune.compress.checkpoint import open_weights

    return {
        name: partial(stored.get_tensor, name)
        for stored in open_weights(folder)
        for name in stored.keys()  # noqa: SIM118
    }


def _windows(config: Mapping[str, Any], n_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return (None,) * n_layers
    kinds = config.get("layer_types") or ["sliding_attention"] * n_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)
