"""Does generation stop where it should? Asked of the loop in which a runtime generates, and of the logits.

A runtime's loop is given the last tokens of a golden answer as its only choices, one by one: it has to go on after each
and to end at the end token. Where a model would end is in the logits under the golden answer: the first choice is an
end token in the runtime exactly where it is in torch. Shapes: T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgetune.data.golden import Conversation, Golden
from edgetune.errors import ContractError
from edgetune.export.parity import Logits

FORCED = 8  # tokens of an answer that the loop is led through before its end
SURE = 1.0  # nats: the reference prefers one of ending and going on by more than e


@dataclass(frozen=True)
class Led:
    """What a runtime's loop is led through: a prompt that is given, and tokens that it has to generate."""

    prompt: list[int]
    tokens: list[int]  # the last one ends the answer


@dataclass(frozen=True)
class Ran:
    """What the loop did: how many tokens it generated, the end token counted, and whether it ended by itself."""

    n_tokens: int
    stopped: bool


def answer_end(conversation: Conversation, stop_ids: Sequence[int]) -> int:
    """Give the index of the token that ends the last answer; the length where none does."""
    ids = conversation.ids
    return next((i for i in range(conversation.prompt_length, len(ids)) if ids[i] in stop_ids), len(ids))


def lead(golden: Golden) -> list[Led]:
    """Give one run of the loop for each end token: the shortest golden conversation, or text where there is none."""
    shortest = min(golden.conversations, key=lambda one: len(one.ids), default=None)
    if shortest is None:
        ids, begin = min((text.ids for text in golden.texts), key=len), 1
    else:
        ids, begin = shortest.ids[: answer_end(shortest, golden.stop_ids)], shortest.prompt_length
    cut = max(begin, len(ids) - FORCED)
    return [Led(ids[:cut], [*ids[cut:], stop]) for stop in golden.stop_ids]


def hold_loop(runs: Sequence[Led], ran: Sequence[Ran] | str, loop: str) -> None:
    """Raise ContractError where a loop ended early, went on behind an end token, or failed: `ran` says how."""
    if isinstance(ran, str):
        raise ContractError(f"generation fails in {loop}: {ran}")
    for led, found in zip(runs, ran, strict=True):
        end = led.tokens[-1]
        if not found.stopped:
            raise ContractError(f"generation does not stop: {loop} goes on behind the end token {end}")
        if found.n_tokens != len(led.tokens):
            last = led.tokens[found.n_tokens - 1]
            raise ContractError(
                f"generation stops too early: {loop} ends at token {last} of a golden answer, which ends at {end}"
            )


class Ends:
    """Watches pairs of logits of golden rows, and counts where each side would end an answer.

    Only what torch is sure of is held (SURE): rounding turns near ties.
    """

    def __init__(self, golden: Golden, stop_ids: Iterable[int]) -> None:
        self._golden = golden
        self._stops = np.array(sorted({*golden.stop_ids, *stop_ids}))  # a stop that one side knows alone is no logit's
        self.n_positions = self.n_ends = self.n_ties = 0
        self._broken = ""

    def see(self, index: int, reference: Logits, runtime: Logits) -> None:
        """Look at the logits [T, V] of golden row `index`; texts, which follow the conversations, are not looked at."""
        if index >= len(self._golden.conversations):
            return
        conversation = self._golden.conversations[index]
        end = answer_end(conversation, self._golden.stop_ids)
        for place in range(max(1, conversation.prompt_length), min(end + 1, len(conversation.ids))):
            wanted, found = (self._preference(logits[place - 1]) for logits in (reference, runtime))
            self.n_positions += 1
            self.n_ends += wanted > 0
            if (wanted > 0) == (found > 0):
                continue
            self.n_ties += 1
            if abs(wanted) > SURE and not self._broken:
                self._broken = (
                    f"after {place - conversation.prompt_length} tokens of the answer of golden conversation {index} "
                    f"torch {'ends' if wanted > 0 else 'goes on'} (by {abs(wanted):.2g} nats) and the runtime "
                    f"{'goes on' if wanted > 0 else 'ends'} (by {abs(found):.2g})"
                )

    def _preference(self, logits: Any) -> float:
        """Give by how many nats the likeliest end token leads the likeliest other token."""
        others = np.delete(logits, self._stops)
        return float(logits[self._stops].max() - others.max())

    def hold(self) -> dict[str, int]:
        """Give the manifest's figures. Raises ContractError where an answer would end elsewhere than in torch."""
        if self._broken:
            raise ContractError(f"generation stops elsewhere than in torch: {self._broken}")
        return {"positions": self.n_positions, "ends": self.n_ends, "near_ties": self.n_ties}
