"""What of a decoder block need not be computed again once the inputs of its last layers were seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

LAST = {"self_attn": "self_attn.o_proj", "mlp": "mlp.down_proj"}  # the layer that gives a module's output
NORM = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}  # what is read by that module alone


@contextmanager
def shortcuts(block: nn.Module, seen: Mapping[str, Tensor]) -> Iterator[None]:
    """Spare what need not be computed again: a module whose last layer's input was seen is that layer alone."""
    known = [name for name, last in LAST.items() if last in seen]
    kept = {name: block.get_submodule(name) for module in known for name in (module, NORM[module])}
    for name in known:
        setattr(block, name, _Shortcut(block.get_submodule(LAST[name]), seen[LAST[name]], name == "self_attn"))
        setattr(block, NORM[name], nn.Identity())
    try:
        yield
    finally:
        for name, module in kept.items():
            setattr(block, name, module)


class _Shortcut(nn.Module):
    """Stands in for attention, which gives its weights as well, or for the feed-forward part."""

    def __init__(self, last: nn.Module, inputs: Tensor, attends: bool) -> None:
        super().__init__()
        self.last, self.inputs, self.attends = last, inputs, attends

    def forward(self, *_: Any, **__: Any) -> Tensor | tuple[Tensor, None]:
        made: Tensor = self.last(self.inputs)
        return (made, None) if self.attends else made
