"""What differs between model families in our own graph, as data: modules of a block, norms, multipliers, soft caps.

Modules have a Llama's names; where a family stores others, `gguf_families` has them and `decoder_source` renames.
Biases and norms of queries and keys are read off the tensors that are there; windows and rotations off config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from edgetune.errors import UnsupportedError
from edgetune.export.gguf_families import common, refuse_gpt2

Config = Mapping[str, Any]

# Rotations whose frequencies do not depend on the length of the text.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Norms:
    """The modules of a block that normalize what attention and multilayer perceptron read, and what they give."""

    before_attention: str = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True)
class Scales:
    """The numbers that a family multiplies by or caps at; a cap c of x is c * tanh(x / c)."""

    embedding: float = 1.0
    scores: float | None = None  # of query times key; None is one over the root of the head size
    residual: float = 1.0  # of what attention and multilayer perceptron add
    logits: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None


@dataclass(frozen=True)
class Family:
    """How a block is built, as far as it is not as in a Llama."""

    norms: Norms = Norms()
    norm_offset: float = 0.0  # what is added to the weight of a norm
    activation: str = "silu"
    joint: bool = False  # queries, keys and values are one matrix, gate and up another
    gated: bool = True  # the multilayer perceptron multiplies by a gate
    layer_norm: bool = False  # a norm takes off the mean and adds a bias
    positions: bool = False  # a vector of each position is added to its token's, and nothing is rotated
    parallel: Callable[[Config], bool] = lambda config: False  # the perceptron reads what attention reads
    renamed: bool = False  # tensors are stored under other names, and some in another order
    scales: Callable[[Config], Scales] = lambda config: Scales()
    rope_types: tuple[str, ...] = ROPE_TYPES
    refuse: Callable[[Config], str | None] = lambda config: None  # what of a config the graph cannot stand for


def _gemma_scales(config: Config) -> Scales:
    return Scales(
        embedding=float(config["hidden_size"]) ** 0.5,
        scores=float(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        score_cap=config.get("attn_logit_softcapping"),
        logit_cap=config.get("final_logit_softcapping"),
    )


def _granite_scales(config: Config) -> Scales:
    return Scales(
        embedding=float(config.get("embedding_multiplier", 1.0)),
        scores=float(config.get("attention_multiplier", 1.0)),
        residual=float(config.get("residual_multiplier", 1.0)),
        logits=1.0 / float(config.get("logits_scaling", 1.0)),
    )


def _refuse_both_ways(config: Config) -> str | None:
    return "use_bidirectional_attention" if config.get("use_bidirectional_attention") else None


_GEMMA = Family(
    Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    norm_offset=1.0, activation="gelu_pytorch_tanh", scales=_gemma_scales, refuse=_refuse_both_ways,
)  # fmt: skip
FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(),
    "Qwen3ForCausalLM": Family(),
    "Phi3ForCausalLM": Family(joint=True, rope_types=("default", "longrope")),
    "GraniteForCausalLM": Family(scales=_granite_scales),
    "Gemma2ForCausalLM": _GEMMA,
    "Gemma3ForCausalLM": _GEMMA,
    "GPT2LMHeadModel": Family(
        activation="gelu_new", joint=True, gated=False, layer_norm=True, positions=True, renamed=True,
        refuse=refuse_gpt2,
    ),
    "GPTNeoXForCausalLM": Family(
        activation="gelu", joint=True, gated=False, layer_norm=True, renamed=True,
        parallel=lambda config: bool(config.get("use_parallel_residual", True)),
    ),
}  # fmt: skip


def family(config: Config) -> Family:
    """Give the table's entry for a config.json of a known architecture. Raises UnsupportedError."""
    named, config = config["architectures"][0], common(config)
    found = FAMILIES[named]
    said = config.get("hidden_activation") or config.get("hidden_act") or found.activation
    if said != found.activation:
        raise UnsupportedError(f"hidden_act={said!r} of {named} is not written as a graph; {found.activation} is")
    if (why := found.refuse(config)) is not None:
        raise UnsupportedError(f"{named} with {why} is not written as a graph")
    return found
