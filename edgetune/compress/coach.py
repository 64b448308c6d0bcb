"""The teacher beside the student while it trains: what its blocks say of a batch, and what it thinks of the answers.

Shapes: B rows, T tokens, S = B T, N labelled positions, C hidden size, W width of a projection, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.adapt.trainer import LabelledHead
from edgetune.compress.pairing import PROJECTIONS
from edgetune.packed import Layout, packed_attention


class Taps:
    """What some modules of a causal model gave when it ran last."""

    def __init__(self, causal: Any, blocks: Sequence[int], *, relations: bool = False) -> None:
        """Listen to the states behind `blocks`, and with `relations` to the last block's queries, keys and values."""
        decoder = causal.get_decoder()
        # The last block's state is what the head reads, behind the last norm.
        last = len(decoder.layers) - 1
        self._tapped = [decoder if block == last else decoder.layers[block] for block in blocks]
        attention = decoder.layers[-1].self_attn
        self._projections = [getattr(attention, name) for name in PROJECTIONS] if relations else []
        self._given: dict[nn.Module, Any] = {}
        for module in {*self._tapped, *self._projections}:
            module.register_forward_hook(self._take)

    def _take(self, module: nn.Module, _args: Any, output: Any) -> None:
        output = getattr(output, "last_hidden_state", output)
        self._given[module] = output[0] if isinstance(output, tuple) else output

    def states(self, keep: Tensor) -> list[Tensor]:
        """Give the states [N, C] behind each block at the positions where keep [B, T - 1] is true."""
        return [self._given[module][:, :-1][keep].float() for module in self._tapped]

    def projections(self) -> list[Tensor]:
        """Give queries, keys and values before their rotation, each [S, W]."""
        return [self._given[module].flatten(0, 1).float() for module in self._projections]

    def forget(self) -> None:
        """Let go of what was given, and of the graph behind it."""
        self._given.clear()


class Coach:
    """A frozen teacher that reads the student's batches."""

    def __init__(
        self, model: Any, blocks: Sequence[int] = (), *, relations: bool = False, kept_tokens: Tensor | None = None
    ) -> None:
        self._model, self._head, self._kept = model, LabelledHead(model.get_output_embeddings()), kept_tokens
        self.taps = Taps(model, blocks, relations=relations)

    @classmethod
    def load(
        cls, folder: Path, device: str, blocks: Sequence[int] = (), *, relations: bool = False,
        kept_tokens: Sequence[int] | None = None,
    ) -> Coach:  # fmt: skip
        """Load the teacher in the dtype that the device computes fast; `kept_tokens` as `distill.run` takes them."""
        from edgetune.adapt.base import load_base

        kept = None if kept_tokens is None else torch.tensor(kept_tokens, device=device)
        return cls(load_base(folder, device, four_bit=False).eval(), blocks, relations=relations, kept_tokens=kept)

    def projection(self, student_size: int) -> nn.Linear:
        """Give the learned map from the student's hidden states to the teacher's; the identity where sizes agree."""
        size = int(self._model.config.hidden_size)
        projection = nn.Linear(student_size, size, bias=False)
        if size == student_size:
            nn.init.eye_(projection.weight)
        return projection

    @torch.no_grad()
    def read(self, inputs: dict[str, Tensor]) -> None:
        """Read a batch as the trainer collates it, so that the taps know what it gives."""
        self._run(self._model.get_decoder(), inputs)

    @torch.no_grad()
    def judge(self, inputs: dict[str, Tensor], keep: Tensor) -> Tensor:
        """Read a batch and give the logits [N, V] at its labelled positions, too."""
        with self._head.only(keep):
            logits: Tensor = self._run(self._model, inputs).logits
        return (logits if self._kept is None else logits[:, self._kept]).float()

    def _run(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        ids = inputs["input_ids"]
        if self._kept is not None:
            ids = self._kept[ids]
        if "lengths" not in inputs:
            return model(input_ids=ids, attention_mask=inputs["attention_mask"], use_cache=False)
        n_prefix, *lengths = inputs["lengths"].tolist()
        layout = Layout.of(n_prefix, lengths, ids.device, n_tokens=ids.shape[1])
        with packed_attention(self._model):
            return model(input_ids=ids, position_ids=layout.positions(), packed=layout, use_cache=False)
