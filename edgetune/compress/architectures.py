"""Which models the compress room knows, as data: names and shapes of the linear layers of a decoder block.

Read from `config.json` alone, so that a plan can refuse a model before anything heavy is loaded.
Shapes: R out-features, C in-features.
"""

from __future__ import annotations

from typing import Any

from edgetune.errors import UnsupportedError

# model_type -> the class that `architectures` names
SUPPORTED = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Layers that read the same input, in the order in which a block calls them: one Hessian each.
SHARED_INPUTS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


def check_architecture(model_config: dict[str, Any]) -> None:
    """Raise UnsupportedError where the model is none of `SUPPORTED`."""
    found = model_config.get("model_type")
    if not isinstance(found, str) or found not in SUPPORTED:
        named = ", ".join(map(str, model_config.get("architectures") or [])) or f"model_type {found!r}"
        raise UnsupportedError(f"{named} cannot be compressed here; supported: {', '.join(sorted(SUPPORTED.values()))}")


def linear_shapes(model_config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Give (R, C) of every linear layer that is quantized, by its full name.

    Raises UnsupportedError for an unknown architecture or a config that misses a size.
    """
    check_architecture(model_config)
    try:
        hidden, wide = int(model_config["hidden_size"]), int(model_config["intermediate_size"])
        n_heads, n_layers = int(model_config["num_attention_heads"]), int(model_config["num_hidden_layers"])
        head = int(model_config.get("head_dim") or hidden // n_heads)
        query, value = n_heads * head, int(model_config.get("num_key_value_heads") or n_heads) * head
        if min(hidden, wide, n_layers, query, value) < 1:
            raise ValueError("one is below 1")
    except KeyError as error:
        raise UnsupportedError(f"config.json lacks {error}; make the model again") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UnsupportedError(f"config.json names no sizes of a model ({error}); make the model again") from error
    block = {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (value, hidden),
        "self_attn.v_proj": (value, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(n_layers) for name, shape in block.items()}
