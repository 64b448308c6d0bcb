"""Slow references for pruning and distillation, in float64 numpy and plain hooks, written from the papers.

Nothing here is shared with the library. Shapes: B rows, T tokens, N positions, K named tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


def activations(model: Any, ids: NDArray[np.int64], names: Sequence[str]) -> dict[str, Doubles]:
    """Inputs [B, T, C] of modules, and under "layer.N" the residual stream after N blocks, in float64."""
    seen: dict[str, Doubles] = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0].numpy()}))
        for name in names
    ]
    with torch.no_grad():
        states = [model.model.embed_tokens(torch.from_numpy(ids))]
        handles += [
            block.register_forward_hook(lambda _, args, out: states.append(out)) for block in model.model.layers
        ]
        model(torch.from_numpy(ids))
    for handle in handles:
        handle.remove()
    return seen | {f"layer.{index}": state.numpy() for index, state in enumerate(states)}


def influence(before: Doubles, after: Doubles) -> float:
    """1 - E[x . y / |x| |y|] (arXiv:2403.03853, equation 1)."""
    total, n = 0.0, 0
    for row_x, row_y in zip(before, after, strict=True):
        for x, y in zip(row_x, row_y, strict=True):
            total += 1 - float(x @ y) / float(np.sqrt(x @ x) * np.sqrt(y @ y))
            n += 1
    return total / n


def importance(X: Doubles) -> Doubles:
    """Mean over tokens of |x|, 2-norm over rows, feature by feature (arXiv:2407.14679, section 2.2)."""
    scores = np.zeros(X.shape[-1])
    for feature in range(X.shape[-1]):
        scores[feature] = np.sqrt(sum(np.mean([abs(token[feature]) for token in row]) ** 2 for row in X))
    return scores


def group_importance(X: Doubles, n_heads: int, n_groups: int) -> Doubles:
    """The same of |head|_2, and the heads of a group together."""
    size, scores = X.shape[-1] // n_heads, np.zeros(n_groups)
    for head in range(n_heads):
        part = X[..., head * size : (head + 1) * size]
        of_rows = [np.mean([np.sqrt(token @ token) for token in row]) for row in part]
        scores[head // (n_heads // n_groups)] += sum(value**2 for value in of_rows)
    return np.sqrt(scores)


def masked_logits(
    model: Any,
    ids: NDArray[np.int64],
    layers: Sequence[int],
    neurons: Mapping[int, Sequence[int]],
    heads: Mapping[int, Sequence[int]],
    hidden: Sequence[int],
) -> Doubles:
    """Logits of the whole float64 model in which all that does not stay is zero, and a block that goes is skipped."""
    blocks, size = model.model.layers, model.model.layers[0].self_attn.head_dim
    channels = torch.zeros(model.config.hidden_size, dtype=torch.float64)
    channels[list(hidden)] = 1

    def only(places: Sequence[int], width: int) -> Any:
        mask = torch.zeros(width, dtype=torch.float64)
        mask[list(places)] = 1
        return lambda _, args: (args[0] * mask,)

    handles = []
    for index in layers:
        attention, mlp = blocks[index].self_attn, blocks[index].mlp
        kept = [head * size + place for head in heads[index] for place in range(size)]
        handles.append(attention.o_proj.register_forward_pre_hook(only(kept, attention.o_proj.in_features)))
        handles.append(mlp.down_proj.register_forward_pre_hook(only(neurons[index], mlp.down_proj.in_features)))
        handles += [
            m.register_forward_hook(lambda _, __, out: out * channels) for m in (attention.o_proj, mlp.down_proj)
        ]
    handles.append(model.model.embed_tokens.register_forward_hook(lambda _, __, out: out * channels))
    model.model.layers = torch.nn.ModuleList([blocks[index] for index in layers])
    try:
        with torch.no_grad():
            logits: Doubles = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    finally:
        model.model.layers = blocks
        for handle in handles:
            handle.remove()
    return logits


def softmax(logits: Doubles) -> Doubles:
    exps = np.exp(logits - logits.max())
    return np.asarray(exps / exps.sum())


def bucketed(p: Doubles, ids: Sequence[int]) -> Doubles:
    """Probabilities [K + 1] of named tokens, and of all others."""
    named = [p[token] for token in ids]
    return np.array([*named, sum(p[token] for token in range(len(p)) if token not in set(ids))])


def divergence(p: Doubles, q: Doubles, *, reverse: bool, skew: float) -> float:
    """KL(p || a p + (1 - a) q) or KL(q || a q + (1 - a) p), bucket by bucket (arXiv:2402.03898, section 3.1)."""
    first, second = (q, p) if reverse else (p, q)
    mixed = skew * first + (1 - skew) * second
    return float(sum(a * np.log(a / b) for a, b in zip(first, mixed, strict=True) if a > 0))


def relation_kl(ours: Doubles, theirs: Doubles, n_heads: int, token: int) -> float:
    """KL between two models' relations [T, W] of one token to itself and those before (arXiv:2012.15828, 3.1)."""
    total = 0.0
    for head in range(n_heads):
        rows = []
        for x in (theirs, ours):
            size = x.shape[1] // n_heads
            part = x[:, head * size : (head + 1) * size]
            rows.append(softmax(np.array([part[token] @ part[other] / np.sqrt(size) for other in range(token + 1)])))
        total += divergence(rows[0], rows[1], reverse=False, skew=0.0)
    return total / n_heads


def drawn(p: Doubles, number: float) -> int:
    """The token whose share of [0, 1) holds a number."""
    total = 0.0
    for token, share in enumerate(p):
        total += share
        if number < total:
            return token
    return len(p) - 1
