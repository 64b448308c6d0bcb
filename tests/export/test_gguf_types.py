"""Every type of llama.cpp: its own choice for each tensor, and its own bytes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune.artifact import Artifact
from edgetune.errors import RecipeError, StageError, UnsupportedError
from edgetune.export import gguf
from edgetune.export.gguf_families import family, gguf_name, shared_heads
from edgetune.export.gguf_mixes import LEFT_OUT, MIXES, WEIGHED
from edgetune.export.gguf_read import dequantize, read_tensors
from edgetune.export.gguf_types import BLOCK, NARROW, PLAIN, choose_types
from edgetune.export.gguf_write import artifact_weights, read_config, written_shapes
from edgetune.ggml_types import FILE_TYPES, file_type, named, numbered
from edgetune.gguf_header import read_header
from edgetune.recipe import parse_recipe
from edgetune.recipe_export import GgufExport, GgufType
from tests.conftest import make_tiny_model
from tests.oracles.llama_quantize import quantize

pytestmark = pytest.mark.usefixtures("children_here")
HEADS = {"shared heads": (8, 2), "own heads": (8, 8)}
DAILY = {("shared heads", "Q3_K_M"), ("own heads", "Q4_K_S"), ("shared heads", "Q2_0")}
SIGNED = ("Q1_0", "Q2_0")  # of which gguf-py knows no values
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
    return {name: tensor.kind for name, tensor in read_tensors(file).items()}


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


@pytest.mark.parametrize("target", slow_but({("Q4_K_M",), ("Q1_0",)}, product(MIXES)))
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
        theirs = read_tensors(stock)
        for name, tensor in read_tensors(file).items():
            assert tensor.kind == theirs[name].kind
            np.testing.assert_array_equal(tensor.data, theirs[name].data, err_msg=name)
        head, theirs_head = (read_header(one).metadata["general.file_type"] for one in (file, stock))
        assert head == theirs_head
        assert bool(made.manifest.fallbacks) == (hidden == 64 and target != "Q8_0")  # the head's type at least


def test_every_target_of_llama_cpp_is_written_or_left_out_with_a_reason(deep: Deep, tmp_path: Path) -> None:
    """What is left out is refused by llama_model_quantize, or gives the types of another target."""
    numbers = {name.split("_", 3)[-1]: int(value) for name, value in vars(llama_cpp).items()
               if name.startswith(("LLAMA_FTYPE_MOSTLY_", "LLAMA_FTYPE_ALL_"))}  # fmt: skip
    for target in (*MIXES, *PLAIN):
        assert file_type(target) == numbers.pop(target)
    assert set(numbers) <= set(LEFT_OUT)
    _, plain = deep("shared heads")
    quantize(plain, tmp_path / "dense.gguf", "MXFP4_MOE", {})
    quantize(plain, tmp_path / "eight.gguf", "Q8_0", {})
    assert types_of(tmp_path / "dense.gguf") == types_of(tmp_path / "eight.gguf")
    with pytest.raises(AssertionError):
        quantize(plain, tmp_path / "refused.gguf", "NVFP4", {})


def test_types_are_known_by_name_and_number() -> None:
    """And gguf-py has still no number for what is kept here: drop it there when it has."""
    from gguf import GGMLQuantizationType, LlamaFileType

    assert not set(FILE_TYPES) & {*GGMLQuantizationType.__members__, *LlamaFileType.__members__}
    for kind, block in BLOCK.items():
        found = named(kind)
        assert (found.columns, numbered(found.number)) == (block, found)
    with pytest.raises(ValueError, match="99"):
        numbered(99)


@pytest.mark.parametrize("kind", SIGNED)
def test_values_are_ggmls(kind: str) -> None:
    from edgetune.export.ggml import Quantizer

    rows = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    data = Quantizer(1)(rows, kind, None)
    assert data.shape == (3, named(kind).row_bytes(256))
    np.testing.assert_array_equal(dequantize(kind, data), values_of_ggml(kind, data, rows.shape))


@pytest.mark.parametrize("kind", sorted({*BLOCK} - {*SIGNED}))
def test_values_are_gguf_pys(kind: str) -> None:
    from gguf import GGMLQuantizationType, quants

    from edgetune.export.ggml import Quantizer

    rows = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    data = Quantizer(1)(rows, kind, np.ones(256, np.float32))
    np.testing.assert_array_equal(dequantize(kind, data), quants.dequantize(data, GGMLQuantizationType[kind]))


@pytest.mark.parametrize("short", ["bfloat16", "float16", "float32"])
def test_short_floats_are_rounded_as_what_they_are(short: str) -> None:
    """In parts and threads: more than one takes at once."""
    import torch

    from edgetune.export.ggml import ROWS, Quantizer

    values = torch.randn(700, 512, generator=torch.Generator().manual_seed(0)).to(getattr(torch, short))
    stored = values.view(torch.int16).numpy() if short == "bfloat16" else values.numpy()
    assert values.numel() > ROWS
    whole = np.concatenate([Quantizer(1)(row[None].float().numpy(), "Q4_K", None) for row in values])
    np.testing.assert_array_equal(Quantizer(2)(stored, "Q4_K", None), whole)
    values[699, 511] = float("nan")
    with pytest.raises(StageError, match="values that are not finite"):
        Quantizer(2)(stored, "Q4_K", None)


def values_of_ggml(kind: str, data: NDArray[np.uint8], shape: tuple[int, int]) -> NDArray[np.float32]:
    """What ggml's own function for a type makes of its bytes."""
    from llama_cpp import _ggml

    class Traits(ctypes.Structure):
        _fields_ = [
            ("name", ctypes.c_char_p), ("block", ctypes.c_int64), ("interleaved", ctypes.c_int64),
            ("size", ctypes.c_size_t), ("quantized", ctypes.c_bool),
            ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ]  # fmt: skip

    of_type = _ggml.libggml.ggml_get_type_traits
    of_type.restype, of_type.argtypes = ctypes.POINTER(Traits), [ctypes.c_int]
    traits, out = of_type(named(kind).number).contents, np.empty(shape, np.float32)
    assert traits.name == kind.lower().encode()
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


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
