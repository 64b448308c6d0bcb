"""Which type each kind of matrix gets under each target, as llama.cpp mixes them: data, and the few rules in it.

From llama-quant.cpp (`llama_tensor_get_type_impl`) of the llama.cpp that is bound, for dense models; a test holds both
to the same choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class At(NamedTuple):
    """Where a matrix lies, and what is known of the model."""

    layer: int
    n_layers: int
    n_shared: int  # query heads of one key/value head
    weighed: bool  # whether there is an importance matrix


Type = str | Callable[[At], str]


@dataclass(frozen=True)
class Mix:
    """The types of one target: of most matrices, of the head (or the tied embedding), and of the exceptions."""

    base: str
    head: str = "Q6_K"
    embedding: Type | None = None  # where it is not tied to the head
    v: Type | None = None  # values, or a joint projection of queries, keys and values
    qk: Type | None = None
    out: Type | None = None
    down: Type | None = None
    gate_up: Type | None = None


def more(there: str, elsewhere: str) -> Type:
    """`there` in the first and last eighth of the layers, and in every third between."""

    def rule(at: At) -> str:
        eighth = at.n_layers // 8
        picked = at.layer < eighth or at.layer >= 7 * at.n_layers // 8 or (at.layer - eighth) % 3 == 2
        return there if picked else elsewhere

    return rule


def first(share: int, there: str, elsewhere: str, *, weighed: bool | None = None) -> Type:
    """`there` in that share of the layers at the beginning; with `weighed` only with, or only without, weights."""
    return lambda at: there if at.layer < at.n_layers // share and weighed in (None, at.weighed) else elsewhere


def few(n: int, there: str, elsewhere: str) -> Type:
    """`there` in the first n layers."""
    return lambda at: there if at.layer < n else elsewhere


def middle(there: str, elsewhere: str) -> Type:
    """`there` in all layers but the first and the last eighth."""
    return lambda at: there if at.n_layers // 8 <= at.layer < 7 * at.n_layers // 8 else elsewhere


def shared(there: str, elsewhere: str) -> Type:
    """`there` where at least four query heads read one key/value head, whose matrix is small."""
    return lambda at: there if at.n_shared >= 4 else elsewhere


def _iq2(base: str, embedding: str, v: str, out: str) -> Mix:
    """The targets of about two bits and fewer."""
    return Mix(base, "Q5_K", embedding, v=shared("Q4_K", v), out=out, down=first(8, v, base))


def _iq3_xxs_v(at: At) -> str:
    return "Q4_K" if at.n_shared >= 4 else "IQ3_XXS" if at.weighed else "IQ3_S"


MIXES: dict[str, Mix] = {
    "Q8_0": Mix("Q8_0", "Q8_0"),
    "Q6_K": Mix("Q6_K"),
    "Q5_K_M": Mix("Q5_K", v=more("Q6_K", "Q5_K"), down=more("Q6_K", "Q5_K")),
    "Q5_K_S": Mix("Q5_K"),
    "Q5_1": Mix("Q5_1"),
    "Q5_0": Mix("Q5_0", down=first(8, "Q5_1", "Q5_0", weighed=True)),
    "Q4_K_M": Mix("Q4_K", v=more("Q6_K", "Q4_K"), down=more("Q6_K", "Q4_K")),
    "Q4_K_S": Mix("Q4_K", v=few(4, "Q5_K", "Q4_K"), down=first(8, "Q5_K", "Q4_K")),
    "Q4_1": Mix("Q4_1"),
    "Q4_0": Mix("Q4_0", down=first(8, "Q4_1", "Q4_0", weighed=True)),
    "Q3_K_L": Mix("Q3_K", v="Q5_K", out="Q5_K", down="Q5_K"),
    "Q3_K_M": Mix("Q3_K", v=few(2, "Q5_K", "Q4_K"), out="Q4_K", down=first(16, "Q5_K", "Q4_K")),
    "Q3_K_S": Mix("Q3_K"),
    "Q2_K": Mix("Q2_K", v=shared("Q4_K", "Q3_K"), out="Q3_K", down="Q3_K"),
    "Q2_K_S": Mix("Q2_K", v=shared("Q4_K", "Q2_K"), down=first(8, "Q4_K", "Q2_K")),
    "IQ4_NL": Mix("IQ4_NL", v=shared("Q5_K", "IQ4_NL"), down=first(8, "Q5_K", "IQ4_NL", weighed=False)),
    "IQ4_XS": Mix("IQ4_XS", v=shared("Q5_K", "IQ4_XS"), down=first(8, "Q5_K", "IQ4_XS", weighed=False)),
    "IQ3_M": Mix("IQ3_S", v="Q4_K", out="Q4_K", down=first(8, "Q4_K", "IQ3_S")),
    "IQ3_S": Mix("IQ3_S", v=shared("Q4_K", "IQ3_S")),
    "IQ3_XS": Mix("IQ3_S", v=shared("Q4_K", "IQ3_S"), qk="IQ3_XXS", gate_up=middle("IQ3_XXS", "IQ3_S")),
    "IQ3_XXS": Mix("IQ3_XXS", "Q5_K", "IQ3_S", v=_iq3_xxs_v, qk="IQ2_S", out="IQ3_S"),
    "IQ2_M": _iq2("IQ2_S", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_S": _iq2("IQ2_XS", "IQ3_S", "IQ3_S", "IQ3_S"),
    "IQ2_XS": _iq2("IQ2_XS", "Q2_K", "Q2_K", "IQ2_XS"),
    "IQ2_XXS": _iq2("IQ2_XXS", "Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ1_M": _iq2("IQ1_M", "Q2_K", "Q2_K", "IQ2_XXS"),
    "IQ1_S": _iq2("IQ1_S", "Q2_K", "Q2_K", "IQ2_XXS"),
    "TQ2_0": Mix("TQ2_0", embedding="Q4_K"),
    "TQ1_0": Mix("TQ1_0", embedding="Q4_K"),
    "Q2_0": Mix("Q2_0", embedding="Q4_K"),
    "Q1_0": Mix("Q1_0"),
}

# Where the hidden size is no multiple of 256, most matrices cannot take a K-quant. llama.cpp then mixes Q5_0, Q4_K and
# a head of Q8_0; about six bits everywhere cost as many bytes and half the KL divergence. Where GPTQ chooses the codes,
# Q5_0 does, which llama.cpp reads nearly twice as fast (docs/decisions.md).
NARROW_MIXES: dict[str, Mix] = {
    "Q5_K_M": Mix("Q5_1", "Q8_0", v=more("Q8_0", "Q5_1"), down="Q6_K"),
    "Q4_K_M": Mix("Q5_1", "Q5_1", v=more("Q8_0", "Q5_1"), down="Q6_K"),
}
GPTQ_MIXES = NARROW_MIXES | {"Q4_K_M": Mix("Q5_0", "Q8_0")}

# What llama.h names beside, and why no file is written as one.
LEFT_OUT = {
    "MXFP4_MOE": "MXFP4 is for experts only, of which no family here has any; a dense model becomes Q8_0",
    "NVFP4": "llama.cpp's quantizer has no such target, it only loads checkpoints that came in it",
}

# Targets whose smallest blocks llama.cpp does not make without an importance matrix.
WEIGHED = ("IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S")


def of_mix(mix: Mix, name: str, at: At, *, tied: bool) -> str:
    """Give the type of a matrix by its GGUF name."""
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return mix.head
    part = name.removesuffix(".weight").rpartition(".")[2]
    kinds: dict[str, Type | None] = {
        "token_embd": mix.embedding, "attn_v": mix.v, "attn_qkv": mix.v, "attn_q": mix.qk, "attn_k": mix.qk,
        "attn_output": mix.out, "ffn_down": mix.down, "ffn_up": mix.gate_up, "ffn_gate": mix.gate_up,
    }  # fmt: skip
    found = kinds.get(part) or mix.base
    kind = found if isinstance(found, str) else found(at)
    seventy_billion = at.n_layers == 80 and at.n_shared == 8  # its value projections are an eighth of its queries'
    return "Q5_K" if seventy_billion and part in ("attn_v", "attn_qkv") and kind in ("Q3_K", "Q4_K") else kind
