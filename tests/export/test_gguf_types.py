"""Every type of llama.cpp: its own choice for each tensor, and its own bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.errors import RecipeError, UnsupportedError
from edgetune.export import gguf
from edgetune.export.gguf_families import family, gguf_name, shared_heads
from edgetune.export.gguf_mixes import MIXES, WEIGHED
from edgetune.export.gguf_types import BLOCK, NARROW, PLAIN, choose_types
from edgetune.export.gguf_write import artifact_weights, read_config, written_shapes
from edgetune.recipe import parse_recipe
from edgetune.recipe_export import GgufExport, GgufType
from tests.conftest import make_tiny_model
from tests.oracles.llama_quantize import quantize

pytestmark = pytest.mark.usefixtures("children_here")
HEADS = {"shared heads": (8, 2), "own heads": (8, 8)}
DAILY = {("shared heads", "Q3_K_M"), ("own heads", "Q4_K_S")}
Deep = Callable[[str], tuple[Artifact, Path]]


def slow_but(daily: set[tuple[str, ...]], cells: Iterable[tuple[str, ...]]) -> list[Any]:
    return [pytest.param(*cell, marks=[] if cell in daily else pytest.mark.slow) for cell in cells]


def importance(source: Artifact) -> dict[str, NDArray[Any]]:
    """Mean squared inputs by module, some channels far larger than others."""
    config, rng = read_config(source.path), np.random.default_rng(0)
    shapes = artifact_weights(source, config).shapes
    named = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith("_proj.weight")}
    return {name: np.exp(2 * rng.normal(size=shape[1])).astype(np.float32) for name, shape in named.items()}


def by_tensor(moments: dict[str, NDArray[Any]], source: Artifact) -> dict[str, NDArray[Any]]:
    of = family(read_config(source.path))
    return {gguf_name(f"{module}.weight", of): values for module, values in moments.items()}


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}


@pytest.fixture(scope="module")
def deep(children_here: None, tmp_path_factory: pytest.TempPathFactory) -> Deep:
    """Make, once, a model of 16 blocks whose rows every block size divides, and its plain file; heads tied or not."""

    @cache
    def make(heads: str) -> tuple[Artifact, Path]:
        folder, tie = tmp_path_factory.mktemp("deep"), heads == "own heads"
        source = make_tiny_model(folder / "model", hidden=256, layers=16, heads=HEADS[heads], tie=tie, vocabulary=512)
        made = gguf.run(GgufExport(type="F32"), source, folder / "plain", moments=None)
        return source, made.path / gguf.FILE

    return make


@pytest.mark.parametrize(("heads", "target"), slow_but(DAILY, product(HEADS, MIXES)))
def test_types_are_llama_cpps_own(deep: Deep, heads: str, target: str, tmp_path: Path) -> None:
    source, plain = deep(heads)
    config = read_config(source.path)
    shapes = written_shapes(artifact_weights(source, config), config)
    for moments in ({}, by_tensor(importance(source), source)):
        if not moments and target in WEIGHED:
            continue
        quantize(plain, tmp_path / "stock.gguf", target, moments)
        wanted, lines = choose_types(shapes, target, n_shared=shared_heads(config), weighed=bool(moments))
        assert types_of(tmp_path / "stock.gguf") == wanted
        assert lines == []


@pytest.mark.parametrize("target", slow_but({("Q4_K_M",)}, product(MIXES)))
def test_bytes_are_llama_cpps_own(target: str, tmp_path: Path) -> None:
    """On rows of 256 and of 64 columns; the latter by the types that stand in."""
    for hidden in (256, 64):
        source, folder = make_tiny_model(tmp_path / f"model-{hidden}", hidden=hidden), tmp_path / str(hidden)
        moments = importance(source)
        weighed = "imatrix" not in GgufExport(type=target).unread  # type: ignore[arg-type]
        made = gguf.run(
            GgufExport(type=target), source, folder / "made",  # type: ignore[arg-type]
            moments=moments if weighed else None, calibration_digest="d" if weighed else None,
        )  # fmt: skip
        plain = gguf.run(GgufExport(type="F32"), source, folder / "plain", moments=None)
        file, stock = made.path / gguf.FILE, folder / "stock.gguf"
        quantize(plain.path / gguf.FILE, stock, target, by_tensor(moments, source) if weighed else {}, types_of(file))
        theirs = {tensor.name: tensor for tensor in GGUFReader(stock).tensors}
        for tensor in GGUFReader(file).tensors:
            assert tensor.tensor_type == theirs[tensor.name].tensor_type
            np.testing.assert_array_equal(tensor.data, theirs[tensor.name].data, err_msg=tensor.name)
        head, theirs_head = (GGUFReader(one).fields["general.file_type"].contents() for one in (file, stock))
        assert head == theirs_head
        assert bool(made.manifest.fallbacks) == (hidden == 64 and target != "Q8_0")  # the head's type at least


def test_the_recipe_knows_every_target_and_its_demands() -> None:
    assert set(GgufType.__args__) == {*PLAIN, *MIXES}  # type: ignore[attr-defined]
    assert set(NARROW.values()) <= {kind for kind, block in BLOCK.items() if block == 32}
    raw: dict[str, Any] = {"name": "a", "base": "b", "data": {"train": "t", "heldout": "h"}}
    with pytest.raises(RecipeError, match="type IQ2_XS is not made without an importance matrix"):
        parse_recipe(raw | {"candidates": {"x": {"export": {"gguf": {"type": "IQ2_XS", "imatrix": False}}}}})
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "hidden_act": "silu",
              "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 8, "num_hidden_layers": 1}  # fmt: skip
    with pytest.raises(UnsupportedError, match=r"codes of Q4, Q5 and Q6 types, Q3_K_M is none"):
        gguf.check(GgufExport(type="Q3_K_M", gptq=True), config)
