"""Divergences between a teacher p and a student q over buckets: K tokens by name, and all others as one.

Distilling the Knowledge in a Neural Network (arXiv:1503.02531): KL(p || q) at a temperature, times its square.
MiniLLM (arXiv:2306.08543), section 2.1: the reverse KL(q || p), which does not cover what the student cannot hold.
DistiLLM (arXiv:2402.03898), section 3.1: either, against a mixture, which bounds its gradient.
Merging tokens into one bucket can only lower a divergence (see `runtime/reference.py`).
Shapes: N positions, K named tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY = -30.0  # log of what counts as no probability: a bucket of none would make every reverse divergence infinite


def top_tokens(logits: Tensor, k: int) -> Tensor:
    """Give the k likeliest tokens of each position, [N, K]."""
    return logits.topk(min(k, logits.shape[1]), dim=1).indices


def bucket_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Give log-probabilities [N, K + 1] of the tokens `ids` [N, K], and of all others together, from logits [N, V].

    Where all tokens are named, the last is EMPTY.
    """
    whole = torch.logsumexp(logits, dim=1, keepdim=True)
    named = logits.gather(1, ids) - whole
    if ids.shape[1] == logits.shape[1]:
        return torch.cat([named, torch.full_like(whole, EMPTY)], dim=1)
    others = torch.logsumexp(logits.scatter(1, ids, -torch.inf), dim=1, keepdim=True) - whole
    return torch.cat([named, others], dim=1)


def divergence(log_p: Tensor, log_q: Tensor, *, reverse: bool = False, skew: float = 0.0) -> Tensor:
    """Give the divergence of each position [N], in nats, from log-probabilities [N, K + 1] that each sum to one.

    Forward: KL(p || skew p + (1 - skew) q). Reverse: KL(q || skew q + (1 - skew) p), with the place of p and q changed
    and nothing else.
    """
    log_p = log_p.clamp(min=EMPTY)
    first, second = (log_q, log_p) if reverse else (log_p, log_q)
    if skew:
        share = torch.tensor(skew, dtype=first.dtype, device=first.device)
        second = torch.logaddexp(first + share.log(), second + torch.log1p(-share))
    return (first.exp() * (first - second)).sum(1)


def summed_kl(log_p: Tensor, logits: Tensor, ids: Tensor) -> float:
    """Give KL(p || q) summed over positions, of a reference's buckets and another model's logits."""
    return float(divergence(log_p, bucket_log_probs(logits, ids)).sum(dtype=torch.float64))
