"""GKD (arXiv:2306.13649), algorithm 1: in a share of the steps the student answers, and its teacher judges the answers.

So it learns from the mistakes that it makes itself, which no row shows. Each token is drawn by a number of its own that
follows from the seed, the step, the row and the place in the answer: a training that was killed draws the same answers
again, and how many rows are computed at once makes no difference.

Shapes: B rows, T tokens of the longest prompt, M new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgetune.data.render import Rendered


@dataclass(frozen=True)
class Sampler:
    """Lets a student answer the prompts of its training rows."""

    rows: Sequence[Rendered]
    share: float  # of the steps
    temperature: float
    max_new_tokens: int
    stop_ids: Sequence[int]
    seed: int

    def is_due(self, step: int) -> bool:
        """Whether that step, from 0, is one of the share; they are spread evenly."""
        return floor((step + 1) * self.share) > floor(step * self.share)

    def answered(self, model: Any, places: Sequence[int], step: int) -> list[Rendered]:
        """Give the rows at some places with answers of the model in that step; rows that ask nothing as they are."""
        rows = [self.rows[place] for place in places]
        asking = [index for index, row in enumerate(rows) if row.asks]
        if not asking:
            return rows
        numbers = np.stack(
            [np.random.default_rng([self.seed, step, places[i]]).random(self.max_new_tokens) for i in asking]
        )
        prompts = [rows[i].ids[: rows[i].start] for i in asking]
        for i, answer in zip(asking, sample(model, prompts, numbers, self.temperature, self.stop_ids), strict=True):
            rows[i] = answered(rows[i], answer)
        return rows


def answered(row: Rendered, answer: Sequence[int]) -> Rendered:
    """Give a row with another last answer, all of which is learned."""
    ids = (*row.ids[: row.start], *answer)
    return replace(row, ids=ids, labels=(*row.labels[: row.start], *[True] * len(answer)))


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[Sequence[int]], numbers: np.ndarray[Any, Any], temperature: float,
    stop_ids: Sequence[int],
) -> list[list[int]]:  # fmt: skip
    """Continue prompts together, each up to an end token or as many tokens as it has numbers in [0, 1), [B, M]."""
    from transformers import DynamicCache

    longest, stop = max(map(len, prompts)), set(stop_ids)
    ids = torch.full((len(prompts), longest), min(stop))
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all end together
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        seen[row, longest - len(prompt) :] = 1
    ids, seen, given = (x.to(model.device) for x in (ids, seen, torch.from_numpy(numbers)))
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    cache, answers = DynamicCache(config=model.config), [list[int]() for _ in prompts]
    for number in given.unbind(1):
        logits = model(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # fmt: skip
        tokens = draw(logits / temperature, number)
        for answer, token in zip(answers, tokens.tolist(), strict=True):
            if not answer or answer[-1] not in stop:
                answer.append(token)
        if all(answer[-1] in stop for answer in answers):
            break
        ids, positions = tokens[:, None], positions[:, -1:] + 1
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
    return answers


def draw(logits: Tensor, number: Tensor) -> Tensor:
    """Give the token [B] of each row, logits [B, V], where the sum of probabilities first passes its number [B]."""
    sums = logits.double().softmax(1).cumsum(1)
    tokens = torch.searchsorted(sums, number[:, None] * sums[:, -1:], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[1] - 1)
