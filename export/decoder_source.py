"""What a decoder is made of: its sizes, its rotations, its windows, and its weights one by one.

Which layers have a bias or a norm of queries and keys is read off the tensors that are there; what else differs
between families is in `decoder_families`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.errors import UnsupportedError
from edgetune.export.decoder_families import FAMILIES, Family, Scales, family
from edgetune.export.gguf_families import FAMILIES as GGUF_FAMILIES
from edgetune.export.gguf_families import Change, common, rope, trained_length
from edgetune.recipe import Rtn

if TYPE_CHECKING:
    from torch import Tensor

    from edgetune.compress.correction import Pair
    from edgetune.compress.scheme import Quantized

FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers that may rotate otherwise
# Module's GGUF name -> its name in a Llama: by these tensors are named that a family stores otherwise.
LIKE_LLAMA = {
    "token_embd": "model.embed_tokens",
    "position_embd": "model.embed_positions",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


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
    kinds: tuple[str, ...]  # of each layer: which of the rotations is its own


@dataclass(frozen=True)
class Rotation:
    """How queries and keys of a kind of layer are rotated."""

    inv_freq: NDArray[np.float32]  # [rotated / 2]
    scale: float  # of cosine and sine


@dataclass(frozen=True)
class Source:
    """The weights of an artifact, by the names of a Llama in Transformers. Nothing is read before it is asked for."""

    sizes: Sizes
    family: Family
    scales: Scales
    rotations: Mapping[str, Rotation]  # by kind of layer
    names: frozenset[str]
    get: Callable[[str], Tensor]
    parallel: bool = False  # attention and multilayer perceptron read the same
    quantized: Mapping[str, Quantized] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)  # of each quantized layer
    corrections: Mapping[str, Pair] = field(default_factory=dict)  # A [r, C] and B [R, r] beside them

    @property
    def tied(self) -> bool:
        """Whether the output head is the embedding."""
        return "lm_head.weight" not in self.names

    @property
    def rotated(self) -> int:
        """Channels of a head that are rotated."""
        return 2 * next((len(rotation.inv_freq) for rotation in self.rotations.values()), 0)


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
    bits_of, columns_of = scheme.get("bits_of", {}), scheme.get("group_size_of", {})
    if len(found := sorted({(bits, columns_of.get(name)) for name, bits in bits_of.items()}, key=str)) > 1:
        del fields["bits"]
        choices = [bits if columns is None else {"bits": bits, "group_size": columns} for bits, columns in found]
        fields["allocate"] = {"budget": scheme["bits_per_weight"], "choices": choices}
    return Rtn.model_validate(fields)


def check_named(config: Mapping[str, Any], known: Iterable[str], others: Mapping[str, Iterable[str]]) -> None:
    """Raise UnsupportedError for an architecture that is not among the known ones, naming what of `others` takes it."""
    named = (config.get("architectures") or [None])[0]
    if named not in (known := list(known)):
        instead = next((f"; {other} takes it" for other, names in others.items() if named in names), "")
        raise UnsupportedError(f"{named or 'a model without architectures'} is not written as a graph; "
                               f"supported: {', '.join(known)}{instead}")  # fmt: skip


def check_decoder(config: Mapping[str, Any]) -> Sizes:
    """Read a config.json. Raises UnsupportedError for a decoder that our graph cannot stand for."""
    check_named(config, FAMILIES, {"gguf": GGUF_FAMILIES})
    of, config = family(config), common(config)
    for kind in (FULL, SLIDING):
        if (found := rope(config, kind)[1]) not in of.rope_types:
            known = ", ".join(of.rope_types)
            raise UnsupportedError(f"rope type {found!r} is not written as a graph; supported: {known}")
    hidden, n_heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    n_layers, shared = int(config["num_hidden_layers"]), None if of.renamed else config.get("num_key_value_heads")
    return Sizes(
        n_layers=n_layers, n_heads=n_heads, n_kv_heads=int(shared or n_heads),
        head_size=int(config.get("head_dim") or hidden // n_heads), hidden=hidden, n_vocab=int(config["vocab_size"]),
        eps=float(config.get("rms_norm_eps", config.get("layer_norm_eps", 1e-6))), max_length=_max_length(config),
        windows=_windows(config, n_layers), kinds=_kinds(config, n_layers),
    )  # fmt: skip


def shortened(config: Mapping[str, Any]) -> list[str]:
    """Say where the graph holds fewer positions than the model.

    LongRoPE rotates a text that outgrows the trained length by other frequencies, what is in the cache included.
    """
    longest, held = int(common(config).get("max_position_embeddings", 0)), check_decoder(config).max_length
    if held >= longest:
        return []
    return [f"the graph holds {held} of the model's {longest} positions: LongRoPE rotates longer texts otherwise, "
            "and their beginning with them"]  # fmt: skip


def open_source(artifact: Artifact) -> Source:
    """Open a `model` or `gptq` artifact. Raises UnsupportedError, and ArtifactError where it is damaged."""
    from transformers import AutoConfig

    from edgetune.compress.checkpoint import PARTS, read_config, read_layers, stored_bits
    from edgetune.compress.correction import read_correction

    check_decoder(read_config(artifact.path))
    config = AutoConfig.from_pretrained(artifact.path, local_files_only=True)
    filled = common(config.to_dict())  # with the family's defaults, those of windows above all
    sizes, of = check_decoder(filled), family(filled)
    tensors = _renamed(_tensors(artifact.path), filled) if of.renamed else _tensors(artifact.path)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    names = frozenset(name for name in tensors if name.rpartition(".")[2] not in PARTS)
    layers = read_layers(artifact.path) if artifact.manifest.kind == "gptq" else {}
    bits_of = stored_bits(artifact.path) if layers else None
    bits = {name: bits_of(name) for name in layers} if bits_of is not None else {}
    return Source(
        sizes, of, of.scales(filled), {} if of.positions else _rotations(config, sizes), names,
        lambda name: tensors[name](), of.parallel(filled), layers, bits,
        read_correction(artifact.path) if layers else {},
    )  # fmt: skip


def _rotations(config: Any, sizes: Sizes) -> dict[str, Rotation]:
    """Give the rotation of each kind of layer, as the family's own module in Transformers has it."""
    import transformers

    named = config.architectures[0]
    module = sys.modules[getattr(transformers, named).__module__]
    rotary = getattr(module, named.removesuffix("ForCausalLM") + "RotaryEmbedding")(config)
    made = {}
    for kind in dict.fromkeys(sizes.kinds):
        of = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        inv_freq, scale = (getattr(rotary, f"{of}{part}") for part in ("inv_freq", "attention_scaling"))
        made[kind] = Rotation(inv_freq.float().numpy(), float(scale))
    return made


def _tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Give a reader for each tensor of a folder's safetensors."""
    from functools import partial

    from edgetune.compress.checkpoint import open_weights

    return {
        name: partial(stored.get_tensor, name)
        for stored in open_weights(folder)
        for name in stored.keys()  # noqa: SIM118
    }


def _renamed(tensors: Mapping[str, Callable[[], Tensor]], config: Mapping[str, Any]) -> dict[str, Callable[[], Tensor]]:
    """Give the tensors of a family that stores them otherwise as a Llama's are; buffers are left out."""
    from functools import partial

    of, found = GGUF_FAMILIES[config["architectures"][0]], {}
    for name, read in tensors.items():
        module, _, kind = name.rpartition(".")
        inside = re.fullmatch(rf"{re.escape(of.blocks)}\.(\d+)\.(.+)", module)
        place = of.modules.get(inside[2]) if inside else of.outside.get(module)
        if place is None:
            continue
        change = next((change for pattern, change in of.changes.items() if re.search(pattern, name)), None)
        block = f"model.layers.{inside[1]}." if inside else ""
        found[f"{block}{LIKE_LLAMA[place]}.{kind}"] = (
            read if change is None else partial(_changed, read, change, config)
        )
    return found


def _changed(read: Callable[[], Tensor], change: Change, config: Mapping[str, Any]) -> Tensor:
    import torch

    return torch.from_numpy(change.there(read().float().numpy(), config))


def _windows(config: Mapping[str, Any], n_layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return (None,) * n_layers
    kinds = config.get("layer_types") or ["sliding_attention"] * n_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in kinds)


def _kinds(config: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    """Give each layer's kind where kinds rotate otherwise, else one for all."""
    if any(isinstance(of, Mapping) for of in (config.get("rope_parameters") or {}).values()):
        return tuple(config["layer_types"])
    return (FULL,) * n_layers


def _max_length(config: Mapping[str, Any]) -> int:
    longest = int(config.get("max_position_embeddings", 2048))
    return min(longest, trained_length(config)) if rope(config)[1] == "longrope" else longest
