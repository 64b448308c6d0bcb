"""AWQ's scales (arXiv:2306.00978): columns that meet large inputs are made larger before rounding, and so lose less.

Y = X W^T = (X / s) (W s)^T: the columns of W are multiplied by s, and what makes X is divided by it. Nothing changes
until W s is rounded. s is the size of each input channel to a power, which is searched for the least error of the
layer's output. Shapes: R out-features, C in-features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgetune.compress.hessian import output_loss
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Scheme
from edgetune.errors import StageError

POWERS = 20  # steps from no scaling to the whole size of a channel
FLOOR = 1e-4  # of the mean size of all channels: a dead one must not be scaled away


@dataclass(frozen=True)
class Heads:
    """How the input of an output projection is made: so many query heads read each key/value head."""

    n_kv: int
    n_queries: int  # of each key/value head
    size: int


@dataclass(frozen=True)
class Scales:
    """What was found for layers that share an input."""

    s: Tensor  # [C] float32, 1 in the middle of its range
    power: float  # 0: scaling does not help
    error: float  # of the rounded layers' output, over that without scales


def find_scales(weights: Sequence[Tensor], hessian: Tensor, scheme: Scheme, heads: Heads | None = None) -> Scales:
    """Search the power of least output error for layers with one input.

    weights [R, C] each, hessian [C, C] of their inputs. With `heads` the channels that are made by one row of the
    value projection share a scale. Raises StageError where the Hessian is not finite.
    """
    W = torch.cat([weight.float() for weight in weights])
    sizes = channel_sizes(hessian, heads)
    without = best = _rounding_error(W, hessian, scheme)
    if not math.isfinite(without):
        raise StageError("the Hessian is not finite: an activation overflowed; check the calibration rows")
    found, power = torch.ones_like(sizes), 0.0
    for step in range(1, POWERS + 1 if without > 0 else 1):
        s = sizes.pow(step / POWERS)
        s = s / (s.max() * s.min()).sqrt()
        error = _rounding_error(W * s, hessian / torch.outer(s, s), scheme)
        if error < best:
            best, found, power = error, s, step / POWERS
    return Scales(found, power, best / without if without > 0 else 1.0)


def channel_sizes(hessian: Tensor, heads: Heads | None = None) -> Tensor:
    """Give the root mean square [C] of each input channel, of those that share a scale together."""
    mean = hessian.diagonal().float() / 2
    if heads is not None:
        by_head = mean.view(heads.n_kv, heads.n_queries, heads.size)
        mean = by_head.mean(1, keepdim=True).expand_as(by_head).reshape(-1)
    sizes = mean.sqrt()
    return sizes.clamp(min=max(FLOOR * float(sizes.mean()), torch.finfo(sizes.dtype).tiny))


def _rounding_error(weight: Tensor, hessian: Tensor, scheme: Scheme) -> float:
    return output_loss(weight - rtn_quantize(weight, scheme).dequantize(), hessian)
