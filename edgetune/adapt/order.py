"""The order of rows follows from seed and epoch alone, so a training that goes on within an epoch reads the rest of it.

A Trainer that resumes makes an epoch's order anew and skips what was read, before it restores the random numbers: an
order drawn from the global generator would be another epoch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

State = Callable[[], TrainerState]


def generator_of(seed: int, state: TrainerState) -> torch.Generator:
    """Give the random numbers of the epoch that a training is in."""
    epoch = int((state.epoch or 0) + 1e-6)
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))


class GroupedByLength(LengthGroupedSampler):  # type: ignore[misc]
    """Groups rows of like length into steps of `n_rows`."""

    def __init__(self, n_rows: int, lengths: Sequence[int], seed: int, state: State) -> None:
        super().__init__(n_rows, lengths=list(lengths))
        self._seed, self._state = seed, state

    def __iter__(self) -> Iterator[int]:
        draw = generator_of(self._seed, self._state())
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=draw))


class Reseeded(torch.utils.data.Sampler[int]):
    """A sampler with a generator of its own, which begins each epoch with that epoch's random numbers."""

    def __init__(self, sampler: Any, seed: int, state: State) -> None:
        self._sampler, self._seed, self._state = sampler, seed, state

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        self._sampler.generator = generator_of(self._seed, self._state())
        return iter(self._sampler)
