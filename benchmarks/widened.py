"""SmolLM2 in a wider shape: the same function in a residual stream of 768 channels and twelve query heads.

Its own widths, 576 and nine heads, are no multiple of the 256 that llama.cpp's K-quants pack, and most of its matrices
fall back to other types. Here the stream x becomes Q x, Q [768, 576] with orthonormal columns: what writes to it is
multiplied by Q, what reads it by Q^T and by the root of 576 / 768, since a norm divides by the mean over more channels.
A norm must have no scale of its own for that, so those of the folded copy (`folded.py`) are the start, and the last
norm's goes into the output head, which then is no longer the embedding. One query head of each three that share a
key/value head is there twice, and what reads the two takes a seeded share of each.
Shapes: R out-features, C in-features, D head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import torch
from folded import folded
from torch import Tensor

from edgetune.artifact import Artifact, Store, draft, identity
from edgetune.compress.layerwise import load_model
from edgetune.data.golden import Golden
from edgetune.sources import copy_tokenizer

STAGE = "benchmark.widen/1"
WIDTH = 768
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def widened(seed: int = 0) -> Artifact:
    """Give the wide copy, made once in the peers' cache."""
    store, base = Store(peers.cache() / "store"), folded(seed)
    config = {"seed": seed, "width": WIDTH}
    made, _ = store.once(identity(STAGE, config, [base.identity], {}), lambda out: _widen(base, out, config))
    return made


def _widen(base: Artifact, out: Path, config: dict[str, Any]) -> Artifact:
    model: Any = load_model(base)
    given = model.config
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    rng = torch.Generator().manual_seed(config["seed"])
    Q = torch.linalg.qr(torch.randn(WIDTH, given.hidden_size, generator=rng, dtype=torch.float64))[0]
    narrower = given.hidden_size / WIDTH
    embedding = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = (embedding * state["model.norm.weight"]) @ Q.T * narrower**0.5
    state["model.embed_tokens.weight"] = embedding @ Q.T
    state["model.norm.weight"] = torch.ones(WIDTH, dtype=torch.float64)
    for index in range(given.num_hidden_layers):
        block = f"model.layers.{index}"
        q, o = f"{block}.self_attn.q_proj.weight", f"{block}.self_attn.o_proj.weight"
        state[q], state[o] = _doubled(state[q], state[o], given, rng)
        for name in READERS:
            state[f"{block}.{name}.weight"] = state[f"{block}.{name}.weight"] @ Q.T * narrower**0.5
        for name in WRITERS:
            state[f"{block}.{name}.weight"] = Q @ state[f"{block}.{name}.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            assert bool((state[f"{block}.{norm}.weight"] == 1).all()), "a folded norm has no scale"
            state[f"{block}.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.float64)
    n_kv = given.num_key_value_heads
    wide = type(given)(**given.to_dict() | {
        "hidden_size": WIDTH, "num_attention_heads": given.num_attention_heads + n_kv, "tie_word_embeddings": False,
        "rms_norm_eps": given.rms_norm_eps * narrower, "head_dim": given.head_dim,
    })  # fmt: skip
    made = type(model)(wide).to(model.dtype)
    made.load_state_dict(state)
    with draft(out, kind="model", stage=STAGE, config=config, parents=[base]) as pending:
        made.save_pretrained(pending.path)
        copy_tokenizer(base.path, pending.path)
        Golden.read(base.path).write(pending.path)
        pending.seed = config["seed"]
    return pending.artifact


def _doubled(q: Tensor, o: Tensor, given: Any, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Let the last query head of each key/value head come twice: q [H D, C], o [R, H D]."""
    D, n_kv = given.head_dim, given.num_key_value_heads
    rows = q.reshape(n_kv, -1, D, q.shape[1])
    columns = o.reshape(len(o), n_kv, -1, D)
    share = torch.rand(n_kv, D, generator=rng, dtype=torch.float64)
    last = columns[:, :, -1:]
    columns = torch.cat([columns[:, :, :-1], last * share[:, None], last * (1 - share[:, None])], dim=2)
    return torch.cat([rows, rows[:, -1:]], dim=1).flatten(0, 2), columns.flatten(1)
