"""Writes a model from another one whose tensors were changed, one tensor at a time."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edgetune.artifact import Artifact
from edgetune.compress.checkpoint import WEIGHTS, open_file, read_config, weight_files
from edgetune.compress.tensor_file import TensorFile
from edgetune.data.contract import hold
from edgetune.data.golden import Golden
from edgetune.sources import copy_tokenizer


def write_model(folder: Path, source: Artifact, changed: Mapping[str, Tensor]) -> None:
    """Write `source` with the tensors of `changed`, by full name, in place of its own, each asked for when due.

    Shapes and dtypes stay, and so do config, tokenizer and golden conversations, which the tokenizer is held to.
    Raises ArtifactError where a file is damaged.
    """
    tied, left = bool(read_config(source.path).get("tie_word_embeddings")), set(changed)
    with TensorFile(folder / WEIGHTS, {"format": "pt"}) as out:
        for file in weight_files(source.path):
            for name in open_file(file).keys():  # noqa: SIM118
                if name in changed:
                    left.remove(name)
                    out.add(name, [changed[name]])
                elif not (tied and name == "lm_head.weight"):
                    out.add(name, [open_file(file).get_tensor(name)])
    assert not left, left
    shutil.copyfile(source.path / "config.json", folder / "config.json")
    copy_tokenizer(source.path, folder)
    Golden.read(source.path).write(folder)
    hold(folder)
