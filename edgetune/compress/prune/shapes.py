"""What pruning makes of a model's `config.json`, known before any weight is read. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

from edgetune.compress.architectures import linear_shapes
from edgetune.errors import UnsupportedError
from edgetune.recipe_prune import Prune

# Model types that Transformers 5.23 builds only where hidden_size is a multiple of the query heads, head_dim or not.
EVEN_HEADS = ("llama",)
PACKED = 32  # columns of a row that GGUF packs together, to suggest from


def check(config: Prune, model_config: dict[str, Any]) -> None:
    """Refuse sizes that the model does not have to give, or that Transformers would not load.

    Raises UnsupportedError naming the key.
    """
    linear_shapes(model_config)
    n_heads, n_kv = heads(model_config)
    if n_heads % n_kv:
        raise UnsupportedError(f"{n_heads} query heads do not share {n_kv} key/value heads evenly")
    try:
        vocabulary = int(model_config["vocab_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedError(f"config.json names no vocab_size ({error}); make the model again") from error
    found = {
        "layers": int(model_config["num_hidden_layers"]), "intermediate_size": int(model_config["intermediate_size"]),
        "kv_heads": n_kv, "hidden_size": int(model_config["hidden_size"]), "vocabulary": vocabulary,
    }  # fmt: skip
    for key, size in found.items():
        asked = getattr(config, key)
        if asked is not None and asked >= size:
            raise UnsupportedError(f"prune.{key}={asked} removes nothing, the model has {size}; ask for fewer")
    if model_config["model_type"] in EVEN_HEADS and (config.hidden_size or config.kv_heads):
        _check_even(config, model_config)


def _check_even(config: Prune, model_config: dict[str, Any]) -> None:
    made, (n_heads, n_kv) = pruned_config(config, model_config), heads(model_config)
    hidden, left = int(made["hidden_size"]), int(made["num_attention_heads"])
    if hidden % left == 0:
        return
    if config.hidden_size is None:
        fitting = [n for n in range(1, n_kv) if hidden % (n * (n_heads // n_kv)) == 0]
        advice = f"use kv_heads {' or '.join(map(str, fitting))}" if fitting else "leave kv_heads out"
        raise UnsupportedError(
            f"prune.kv_heads={config.kv_heads} leaves {left} query heads, of which hidden_size={hidden} is no "
            f"multiple, and Transformers loads no such model; {advice}"
        )
    whole, packed = int(model_config["hidden_size"]), lcm(left, PACKED)
    near = {hidden // left * left, -(-hidden // left) * left, max(1, round(hidden / packed)) * packed}
    sizes = [f"{n} (a multiple of {PACKED})" if n % PACKED == 0 else str(n) for n in sorted(near) if 0 < n < whole]
    advice = f"use {' or '.join(sizes)}" if sizes else "leave hidden_size out"
    raise UnsupportedError(
        f"prune.hidden_size={hidden} is no multiple of the {left} query heads that stay, and Transformers loads no "
        f"such model; {advice}"
    )


def heads(model_config: dict[str, Any]) -> tuple[int, int]:
    """Give the numbers of query heads and of key/value heads."""
    n_heads = int(model_config["num_attention_heads"])
    return n_heads, int(model_config.get("num_key_value_heads") or n_heads)


def head_size(model_config: dict[str, Any]) -> int:
    """Give the size of a head, which pruning never changes."""
    return int(model_config.get("head_dim") or int(model_config["hidden_size"]) // heads(model_config)[0])


def pruned_config(
    config: Prune, model_config: dict[str, Any], kept_layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """Give the `config.json` of the pruned model; before it is known which blocks stay, the first ones stand for them.

    The head size is written down, since it is no longer hidden_size over heads. With fewer channels the norms'
    epsilon grows by as much as their mean does, which `cut` makes up for in their weights. (Qwen3's norms of heads
    read the same epsilon, and theirs should have stayed.)
    """
    made = dict(model_config)
    n_heads, n_kv = heads(model_config)
    if config.layers is not None:
        made["num_hidden_layers"] = config.layers
        if types := model_config.get("layer_types"):
            made["layer_types"] = [types[index] for index in kept_layers or range(config.layers)]
    if config.intermediate_size is not None:
        made["intermediate_size"] = config.intermediate_size
    if config.kv_heads is not None:
        made["num_key_value_heads"] = config.kv_heads
        made["num_attention_heads"] = config.kv_heads * (n_heads // n_kv)
    if config.hidden_size is not None:
        made["hidden_size"] = config.hidden_size
        wider = int(model_config["hidden_size"]) / config.hidden_size
        made["rms_norm_eps"] = float(model_config.get("rms_norm_eps", 1e-6)) * wider
    if config.vocabulary is not None:
        made["vocab_size"] = config.vocabulary
    if config.kv_heads is not None or config.hidden_size is not None:
        made["head_dim"] = head_size(model_config)
    return made
