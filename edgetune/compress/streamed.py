"""A model whose weights stay on disk: a skeleton, and the weights of the modules whose turn it is.

A walk that shows one block after the other then holds one block. Weights are mapped, not copied: what is not looked at,
such as the embeddings of tokens that no row has, is never read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgetune.artifact import Artifact
from edgetune.compress.checkpoint import open_config, open_file, weight_files
from edgetune.errors import ArtifactError


class Stored:
    """Where each tensor of a model folder lies."""

    def __init__(self, folder: Path) -> None:
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtype: torch.dtype | None = None  # of the first tensor of floating point
        for file in weight_files(folder):
            stored = open_file(file)
            for name in stored.keys():  # noqa: SIM118
                self._places[name] = file
                part = stored.get_slice(name)
                self.shapes[name] = tuple(part.get_shape())
                if self.dtype is None and (dtype := stored.get_tensor(name).dtype).is_floating_point:
                    self.dtype = dtype

    def read(self, name: str) -> Tensor:
        """Map one tensor; the mapping is its own, so that it goes when the tensor goes."""
        found: Tensor = open_file(self._places[name]).get_tensor(name)
        return found

    def fill(self, module: nn.Module, prefix: str) -> None:
        """Give a module of a skeleton its weights, in the skeleton's dtype."""
        state = {
            name: self.read(f"{prefix}.{name}").to(parameter.dtype) for name, parameter in module.named_parameters()
        }
        module.load_state_dict(state, assign=True)


def open_model(source: Artifact) -> nn.Module:
    """Give a `model` artifact as a skeleton, in the dtype of its file. Raises ArtifactError, UnsupportedError."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    stored, config = Stored(source.path), open_config(source.path)
    try:
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype or stored.dtype)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{source.path} cannot be loaded: {str(error).splitlines()[0]}") from error
    for name, parameter in model.named_parameters():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name not in stored.shapes:
            raise ArtifactError(f"{source.path} lacks the tensor {name}; make it again")
        if stored.shapes[name] != parameter.shape:
            raise ArtifactError(f"{source.path}: {name} is {list(stored.shapes[name])}, its config.json says "
                                f"{list(parameter.shape)}; make it again")  # fmt: skip
    model.stored = stored
    model.eval()
    return model  # type: ignore[no-any-return]


@contextmanager
def present(model: Any, *names: str) -> Iterator[None]:
    """Have the weights of these modules in memory within the block, where the model is a skeleton."""
    modules = {name: model.get_submodule(name) for name in names}
    absent = {name: module for name, module in modules.items() if any(p.is_meta for p in module.parameters())}
    for name, module in absent.items():
        model.stored.fill(module, name)
    try:
        yield
    finally:
        for module in absent.values():
            module.to("meta")
