"""What differs between model families in a GGUF file, as data: names, tensors that are written otherwise, keys.

Shapes: R out-features, C in-features, N heads.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetune.errors import UnsupportedError

Array = NDArray[Any]
Config = Mapping[str, Any]

# Transformers name of a module in a block -> GGUF name
_LLAMA = {
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
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_PHI3 = _LLAMA | {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_GEMMA = _LLAMA | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_NEOX = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Change:
    """How a tensor is written otherwise than it is stored, and the way back."""

    there: Callable[[Array, Config], Array]
    back: Callable[[Array, Config], Array]
    rows_only: bool = True  # moves rows as they are, so that it holds for a LoRA's B as well


def permute(array: Array, n_heads: int) -> Array:
    """Reorder the rows of each head from halves to neighbouring pairs; [R, C] or [R]."""
    paired = array.reshape(n_heads, 2, array.shape[0] // n_heads // 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)


def unpermute(array: Array, n_heads: int) -> Array:
    """Undo `permute`."""
    paired = array.reshape(n_heads, array.shape[0] // n_heads // 2, 2, *array.shape[1:])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(array.shape)


def _unweave(array: Array, config: Config) -> Array:
    """Reorder the rows of a joint projection from (q, k, v) of each head to q, k, v of all heads; [R, C] or [R]."""
    heads = array.reshape(int(config["num_attention_heads"]), 3, -1, *array.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(array.shape)


def _weave(array: Array, config: Config) -> Array:
    heads = array.reshape(3, int(config["num_attention_heads"]), -1, *array.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(0, 1)).reshape(array.shape)


def _transpose(array: Array, _: Config) -> Array:
    return np.ascontiguousarray(array.T)


def _n_kv_heads(config: Config) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


_PAIRS = {  # rotates neighbouring pairs where Transformers rotates halves
    r"\.q_proj\.": Change(
        lambda a, c: permute(a, int(c["num_attention_heads"])), lambda a, c: unpermute(a, int(c["num_attention_heads"]))
    ),
    r"\.k_proj\.": Change(lambda a, c: permute(a, _n_kv_heads(c)), lambda a, c: unpermute(a, _n_kv_heads(c))),
}
_PLUS_ONE = {r"norm\.weight$": Change(lambda a, _: a + 1, lambda a, _: a - 1, rows_only=False)}
_CONV1D = {r"\.(c_attn|c_proj|c_fc)\.weight$": Change(_transpose, _transpose, rows_only=False)}
_WOVEN = {r"\.query_key_value\.": Change(_unweave, _weave)}


@dataclass(frozen=True)
class Family:
    """How llama.cpp calls an architecture and what it wants otherwise than Transformers."""

    name: str
    modules: Mapping[str, str]
    changes: Mapping[str, Change]  # pattern of a Transformers name -> change
    blocks: str = "model.layers"
    outside: Mapping[str, str] = field(default_factory=lambda: _OUTSIDE)
    activation: str = "silu"
    own_keys: Mapping[str, str] = field(default_factory=dict)  # keys of config.json that other families call otherwise
    layer_norm: bool = False  # with means; else root mean squares
    square: bool = False  # loads only where all query heads together are as wide as the hidden size
    rotated: bool = True
    windows: bool = False  # attends through windows where the config says so
    write: Callable[[Any, Config], None] = lambda writer, config: None  # keys beside those of all
    refuse: Callable[[Config], str | None] = lambda config: None  # why a config cannot be written


def _write_gemma(writer: Any, config: Config) -> None:
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if config.get(key):
            add(float(config[key]))
    flags = sliding(config)
    if any(flags):
        writer.add_sliding_window(int(config["sliding_window"]))
        writer.add_sliding_window_pattern(flags)
        writer.add_rope_freq_base_swa(rope(config, "sliding_attention")[0])


def _refuse_gemma(config: Config) -> str | None:
    hidden, n_heads, head = (int(config[k]) for k in ("hidden_size", "num_attention_heads", "head_dim"))
    large = config["num_hidden_layers"] == (62 if "gemma3" in config["model_type"] else 46)
    wanted = hidden // n_heads if large else head  # llama.cpp tells the 27B models by their number of blocks
    if float(config.get("query_pre_attn_scalar", head)) != wanted:
        return f"query_pre_attn_scalar={config['query_pre_attn_scalar']} where llama.cpp takes {wanted}"
    local = rope(config, "sliding_attention")
    if any(sliding(config)) and local[1] != "default":
        return f"rope type {local[1]!r} of sliding layers"
    return None


def sliding(config: Config) -> list[bool]:
    """Tell of each block whether its attention is through a window."""
    kinds = config.get("layer_types")
    if kinds is not None:
        return [kind == "sliding_attention" for kind in kinds]
    every = int(config.get("sliding_window_pattern") or (6 if "gemma3" in config["model_type"] else 2))
    return [bool((index + 1) % every) for index in range(int(config["num_hidden_layers"]))]


def _write_phi3(writer: Any, config: Config) -> None:
    writer.add_rope_scaling_orig_ctx_len(trained_length(config))
    writer.add_sliding_window(int(config.get("sliding_window") or 0))  # llama.cpp applies none


def _write_granite(writer: Any, config: Config) -> None:
    writer.add_attention_scale(float(config["attention_multiplier"]))
    writer.add_embedding_scale(float(config["embedding_multiplier"]))
    writer.add_residual_scale(float(config["residual_multiplier"]))
    writer.add_logit_scale(float(config["logits_scaling"]))


def _write_neox(writer: Any, config: Config) -> None:
    writer.add_parallel_residual(bool(config.get("use_parallel_residual", True)))


def refuse_gpt2(config: Config) -> str | None:
    """Name what of a GPT-2's attention neither llama.cpp nor our own graph computes."""
    unsaid = ("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    found = next((key for key in unsaid if config.get(key)), None)
    if found is None and not config.get("scale_attn_weights", True):
        found = "scale_attn_weights: false"
    return found


_GPT2_KEYS = {
    "hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
    "intermediate_size": "n_inner", "max_position_embeddings": "n_positions", "hidden_act": "activation_function",
    "layer_norm_eps": "layer_norm_epsilon",
}  # fmt: skip
_GPT2_OUTSIDE = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "lm_head": "output",
}  # fmt: skip
_NEOX_OUTSIDE = {
    "gpt_neox.embed_in": "token_embd", "gpt_neox.final_layer_norm": "output_norm", "embed_out": "output",
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", _LLAMA, _PAIRS),
    "MistralForCausalLM": Family("llama", _LLAMA, _PAIRS),
    "Qwen2ForCausalLM": Family("qwen2", _LLAMA, {}, square=True),
    "Qwen3ForCausalLM": Family("qwen3", _LLAMA | _HEAD_NORMS, {}),
    "Phi3ForCausalLM": Family("phi3", _PHI3, {}, square=True, write=_write_phi3),
    "GraniteForCausalLM": Family("granite", _LLAMA, _PAIRS, square=True, write=_write_granite),
    "Gemma2ForCausalLM": Family(
        "gemma2", _GEMMA, _PLUS_ONE, activation="gelu_pytorch_tanh", windows=True, write=_write_gemma,
        refuse=_refuse_gemma,
    ),
    "Gemma3ForCausalLM": Family(
        "gemma3", _GEMMA | _HEAD_NORMS, _PLUS_ONE, activation="gelu_pytorch_tanh", windows=True, write=_write_gemma,
        refuse=_refuse_gemma,
    ),
    "GPT2LMHeadModel": Family(
        "gpt2", _GPT2, _CONV1D, blocks="transformer.h", outside=_GPT2_OUTSIDE, activation="gelu_new",
        own_keys=_GPT2_KEYS, layer_norm=True, rotated=False, refuse=refuse_gpt2,
    ),
    "GPTNeoXForCausalLM": Family(
        "gptneox", _NEOX, _WOVEN, blocks="gpt_neox.layers", outside=_NEOX_OUTSIDE, activation="gelu", layer_norm=True,
        square=True, write=_write_neox,
    ),
}  # fmt: skip
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
ROPE_TYPES = {"phi3": ("default", "longrope"), "gemma3": ("default", "linear")}  # all others: default, linear, llama3


def family(config: Config) -> Family:
    """Give the table's entry for a config.json, see `common`. Raises UnsupportedError for what cannot be written."""
    named = (config.get("architectures") or [config.get("model_type")])[0]
    if named not in FAMILIES:
        raise UnsupportedError(f"{named} cannot be exported to GGUF here; supported: {', '.join(FAMILIES)}")
    found = FAMILIES[named]
    said = config.get("hidden_activation") or config.get("hidden_act") or found.activation
    if said != found.activation:
        raise UnsupportedError(
            f"hidden_act={said!r} of {named} cannot be exported to GGUF; llama.cpp computes {found.activation}"
        )
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window and not found.windows and int(window) < int(config["max_position_embeddings"]):
        raise UnsupportedError(
            f"sliding_window={window} is not applied by llama.cpp for {named}; "
            "set max_position_embeddings to the window, or export to ONNX with builder: own"
        )
    hidden, queries = int(config.get("hidden_size") or 0), query_width(config)
    if found.square and queries != hidden:
        raise UnsupportedError(
            f"{named} with queries of {queries} and hidden_size={hidden} is not loaded by llama.cpp; "
            "make them equal, or export to ONNX"
        )
    kind, known = rope(config)[1], ROPE_TYPES.get(found.name, ("default", "linear", "llama3"))
    if kind not in known:
        raise UnsupportedError(
            f"rope type {kind!r} of {named} cannot be exported to GGUF here; supported: {', '.join(known)}"
        )
    if (why := found.refuse(config)) is not None:
        raise UnsupportedError(f"{named} with {why} is not computed by llama.cpp; it cannot be exported to GGUF")
    return found


def common(config: Config) -> dict[str, Any]:
    """Give a config.json with the keys that most families use, where its own calls them otherwise."""
    named = (config.get("architectures") or [None])[0]
    keys = FAMILIES[named].own_keys if named in FAMILIES else {}
    found = {**config, **{key: config[own] for key, own in keys.items() if config.get(own) is not None}}
    if keys:
        found["intermediate_size"] = config.get(keys["intermediate_size"]) or 4 * int(found["hidden_size"])
        found.setdefault("tie_word_embeddings", True)
    return found


def query_width(config: Config) -> int:
    """Rows of the query projection."""
    n_heads, hidden = int(config.get("num_attention_heads") or 1), int(config.get("hidden_size") or 0)
    return n_heads * int(config.get("head_dim") or hidden // n_heads)


def shared_heads(config: Config) -> int:
    """Query heads that read one key/value head."""
    n_heads = int(config.get("num_attention_heads") or 1)
    return n_heads // int(config.get("num_key_value_heads") or n_heads)


def head_width(config: Config) -> int:
    """Channels of a head."""
    return query_width(config) // int(config["num_attention_heads"])


def rotated_width(config: Config) -> int:
    """Channels of a head that are rotated."""
    found = rope(config)[2].get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct")))
    return int(head_width(config) * float(found if found is not None else 1))


def rope(config: Config, layer: str = "full_attention") -> tuple[float, str, dict[str, Any]]:
    """Give theta, type and parameters for a kind of layer, from Transformers 5's `rope_parameters` or older keys."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if isinstance(found.get(layer), Mapping):
        found = dict(found[layer])
    local = layer == "sliding_attention" and "rope_local_base_freq" in config
    theta = config["rope_local_base_freq"] if local else found.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        theta = config.get("rotary_emb_base", 10000.0)
    kind = "default" if local else str(found.get("rope_type", found.get("type", "default")))
    return float(theta), kind, found


def rope_tensors(config: Config) -> dict[str, NDArray[np.float32]]:
    """Give the divisors of each frequency that are tensors of their own: Llama 3's scaling, and LongRoPE's two."""
    theta, kind, scaling = rope(config)
    if kind == "longrope":
        return {f"rope_factors_{n}.weight": np.asarray(scaling[f"{n}_factor"], np.float32) for n in ("long", "short")}
    if kind != "llama3":
        return {}
    width = rotated_width(config)
    wave = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    old, factor = float(scaling["original_max_position_embeddings"]), float(scaling["factor"])
    smooth = (old / wave - low) / (high - low)
    divisors = np.where(
        wave < old / high, 1.0, np.where(wave > old / low, factor, 1 / ((1 - smooth) / factor + smooth))
    )
    return {"rope_freqs.weight": divisors.astype(np.float32)}


def trained_length(config: Config) -> int:
    """Give the context that a model was trained with before its rotation was scaled to a longer one."""
    key = "original_max_position_embeddings"
    return int(rope(config)[2].get(key) or config.get(key) or config["max_position_embeddings"])


def longrope_factor(config: Config) -> float:
    """Give LongRoPE's factor on cosine and sine (arXiv:2402.13753)."""
    longest, old = int(config["max_position_embeddings"]), trained_length(config)
    factor = rope(config)[2].get("attention_factor")
    if factor is None:
        factor = math.sqrt(1 + math.log(longest / old) / math.log(old)) if longest > old else 1.0
    return float(factor)


def gguf_name(name: str, of: Family) -> str:
    """Translate `model.layers.3.mlp.up_proj.weight` to `blk.3.ffn_up.weight`. Raises UnsupportedError."""
    module, _, suffix = name.rpartition(".")
    if module in of.outside:
        return f"{of.outside[module]}.{suffix}"
    layer = re.match(rf"{re.escape(of.blocks)}\.(\d+)\.(.+)$", module)
    inner = of.modules.get(layer[2]) if layer else None
    if layer is None or inner is None or suffix not in ("weight", "bias"):
        raise UnsupportedError(f"tensor {name} has no place in a GGUF file of architecture {of.name}")
    return f"blk.{layer[1]}.{inner}.{suffix}"


def change(name: str, of: Family) -> Change | None:
    """Give how a tensor, by its Transformers name, is written otherwise than it is stored."""
    return next((found for pattern, found in of.changes.items() if re.search(pattern, name)), None)


def written(array: Array, name: str, config: Config, of: Family) -> Array:
    """Give a tensor as the file holds it."""
    found = change(name, of)
    return found.there(array, config) if found is not None else array


def stored(array: Array, name: str, config: Config, of: Family) -> Array:
    """Give a tensor of the file as Transformers holds it."""
    found = change(name, of)
    return found.back(array, config) if found is not None else array


def written_shape(shape: tuple[int, ...], name: str, of: Family) -> tuple[int, ...]:
    """Give the shape of a tensor in the file."""
    found = change(name, of)
    return shape[::-1] if found is not None and found.there is _transpose else shape
