"""The float model in pieces, for a search that leaves some out. Shapes: B rows of a batch, T tokens, C hidden size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgetune.compress.layerwise import decoder_blocks, enter
from edgetune.compress.spill import Spill
from edgetune.devices import compute_dtype

HEAD_POSITIONS = 256  # positions in one pass through the output head, to bound the logits


class Blocks:
    """The float model in pieces that can be left out: embedded rows, single blocks, and the logits at the end.

    Blocks and head are moved to `device` and to `dtype` (the device's compute dtype if absent), and stay there.
    """

    def __init__(
        self, model: Any, rows: NDArray[np.int64], *, device: str = "cpu", dtype: torch.dtype | None = None
    ) -> None:
        dtype = dtype or compute_dtype(device)
        self._blocks = decoder_blocks(model)
        self._batches = enter(model, rows, device, dtype, Spill(None))
        self._norm, self._head = model.model.norm, model.get_output_embeddings()
        for part in (self._blocks, self._norm, self._head):  # frequencies of positions stay exact, for other rows
            part.to(device=device, dtype=dtype)

    @property
    def embedded(self) -> list[Tensor]:
        """Hidden states [B, T, C] of each batch before the first block."""
        return [batch.hidden for batch in self._batches]

    @torch.no_grad()
    def run(self, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Send the hidden states of all batches through one block."""
        block = self._blocks[index]
        return [block(x, **batch.block_kwargs[index]) for x, batch in zip(hidden, self._batches, strict=True)]

    @torch.no_grad()
    def logits(self, hidden: Sequence[Tensor]) -> Iterator[Tensor]:
        """Give float32 logits [N, V] of all positions, HEAD_POSITIONS at a time."""
        for x in hidden:
            for part in self._norm(x).flatten(0, 1).split(HEAD_POSITIONS):
                yield self._head(part).float()
