"""MiniLMv2 (arXiv:2012.15828), section 3.1: a student learns how its teacher's tokens relate to one another.

Relations are softmax(X X^T / sqrt(d)) of the last block's queries, of its keys and of its values, each split into a
number of relation heads that both models have, so that their own heads may be any. Here each token relates to itself
and those before it, as a decoder attends, and X is taken before its rotation: the projections alone are compared.

Shapes: S tokens of a batch, L of one row, N labelled positions of the batch, n of one row, A relation heads, d their
size, W = A d.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor
from torch.nn import functional


def relation_loss(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], rows: Sequence[tuple[Tensor, Tensor]], n_heads: int
) -> Tensor:
    """Give KL(teacher || student) of each labelled position [N], mean over heads and over `ours`, each [S, W].

    `rows` are the places [L] of each row's tokens among S, and which of them [n] are labelled positions.
    """
    found = []
    for tokens, at in rows:
        each = []
        for x, y in zip(ours, theirs, strict=True):
            log_q, log_p = log_relations(x[tokens], at, n_heads), log_relations(y[tokens], at, n_heads)
            each.append((log_p.exp() * (log_p - log_q)).sum(2).mean(0))
        found.append(torch.stack(each).mean(0))
    return torch.cat(found)


def log_relations(x: Tensor, at: Tensor, n_heads: int) -> Tensor:
    """Give log-relations [A, n, L] of the tokens `at` [n] to those of a row, x [L, W]."""
    heads = x.view(len(x), n_heads, -1).transpose(0, 1)  # [A, L, d]
    scores = heads[:, at] @ heads.transpose(1, 2) / sqrt(heads.shape[2])
    later = torch.arange(len(x), device=x.device) > at[:, None]
    lowest = torch.finfo(scores.dtype).min  # finite, so that none of it is 0
    return functional.log_softmax(scores.masked_fill(later, lowest), dim=2)


def rows_of(inputs: dict[str, Tensor], keep: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Give what `relation_loss` wants to know of a batch whose labelled positions are where keep [B, T-1] is true."""
    if "lengths" not in inputs:
        width = inputs["input_ids"].shape[1]
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [
            (torch.arange(length, device=keep.device) + row * width, keep[row].nonzero()[:, 0])
            for row, length in enumerate(lengths)
        ]
    n_prefix, *lengths = inputs["lengths"].tolist()
    at, rows, start = keep[0].nonzero()[:, 0], [], n_prefix
    for length in lengths:
        tokens = torch.cat([torch.arange(n_prefix), torch.arange(start, start + length)]).to(keep.device)
        own = at[(at >= start) & (at < start + length)]
        rows.append((tokens, own - start + n_prefix))
        start += length
    return rows
