"""GPTQ inside GGUF: blocks are taken apart as gguf-py reads them; other codes make a better file of the same size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact
from edgetune.compress.layerwise import load_model, second_moments
from edgetune.errors import UnsupportedError
from edgetune.export import gguf
from edgetune.export.gguf_blocks import CODED, read_blocks, with_codes
from edgetune.export.gguf_codes import _solve
from edgetune.export.gguf_verify import FileModel
from edgetune.export.gguf_write import folder_weights, read_config
from edgetune.recipe_export import GgufExport
from tests.conftest import make_tiny_model

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here")

HALVES = {"Q4_0": (0,), "Q5_0": (0,), "Q8_0": (0,), "Q6_K": (208,)}  # where float16 lies in a block; else at 0 and 2
ROWS = np.random.default_rng(0).integers(3, 500, (24, 48))


def random_blocks(kind: str, R: int = 5, C: int = 512) -> np.ndarray[Any, Any]:
    """Bytes [R, ...] that any file could hold: all of them random but the scales, which are finite."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    rng = np.random.default_rng(1)
    columns, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (R, C // columns, size), dtype=np.uint8)
    for at in HALVES.get(kind, (0, 2)):
        blocks[..., at : at + 2] = rng.normal(size=(R, C // columns, 1)).astype("<f2").view(np.uint8)
    return blocks.reshape(R, -1)


@pytest.mark.parametrize("kind", [*CODED, "Q8_0"])
def test_blocks_are_read_as_gguf_reads_them(kind: str) -> None:
    from gguf import GGMLQuantizationType, quants

    data = random_blocks(kind)
    codes, grid = read_blocks(kind, data, 512)
    wanted = quants.dequantize(data, GGMLQuantizationType[kind])
    np.testing.assert_allclose(grid.dequantize(codes), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CODED)
def test_codes_are_put_in_place_and_nothing_else_changes(kind: str) -> None:
    data = random_blocks(kind)
    codes, grid = read_blocks(kind, data, 512)
    np.testing.assert_array_equal(with_codes(kind, data, codes), data)
    other = np.random.default_rng(2).integers(0, grid.max_code + 1, codes.shape, dtype=np.uint8)
    found, same = read_blocks(kind, with_codes(kind, data, other), 512)
    np.testing.assert_array_equal(found, other)
    np.testing.assert_array_equal(same.scale, grid.scale)
    np.testing.assert_array_equal(same.minimum, grid.minimum)


def test_layers_of_two_types_are_solved_together_and_a_group_without_scale_is_its_minimum() -> None:
    import torch

    grids = []
    for kind in ("Q6_K", "Q4_1", "Q8_0"):
        data = random_blocks(kind, R=4, C=256)
        if kind == "Q4_1":
            data[0, :2] = 0  # the scale of the first group
        grids.append((kind, *read_blocks(kind, data, 256)))
    weight = torch.cat([torch.from_numpy(grid.dequantize(codes)) for _, codes, grid in grids])
    quantized, _ = _solve(grids, weight + 1e-6, torch.eye(256))
    np.testing.assert_allclose(quantized.dequantize().numpy(), weight.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_tiny_model(tmp_path_factory.mktemp("codes") / "model", hidden=64)


def divergence(made: Artifact, source: Artifact) -> float:
    """Mean KL of a file's own weights to the source's, on other rows than those of the calibration."""
    import torch

    config = read_config(source.path)
    rows = torch.from_numpy(np.random.default_rng(7).integers(3, 500, (8, 48)))
    with torch.no_grad():
        model = FileModel(made.path / gguf.FILE, folder_weights(source.path, config), config)
        own = list(model.logits(rows.tolist()))
        found = torch.from_numpy(np.stack(own)).log_softmax(-1)
        wanted = load_model(source).float()(rows).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def export(source: Artifact, out: Path, **more: Any) -> Artifact:
    moments = {name: m.numpy() for name, m in second_moments(load_model(source), ROWS).items()}
    config = GgufExport(type="Q4_0", **more)
    rows = ROWS if config.gptq else None
    return gguf.run(config, source, out, moments=moments, calibration_digest="d", rows=rows)


def test_the_file_is_as_large_and_nearer_to_its_source(wide: Artifact, tmp_path: Path) -> None:
    plain, chosen = export(wide, tmp_path / "plain"), export(wide, tmp_path / "gptq", gptq=True)
    sizes = [made.manifest.files[gguf.FILE].size for made in (plain, chosen)]
    assert sizes[0] == sizes[1]
    assert divergence(chosen, wide) < 0.9 * divergence(plain, wide)
    assert chosen.manifest.notes["gptq"]["matrices"] == 14
    assert chosen.identity == gguf.planned_identity(GgufExport(type="Q4_0", gptq=True), wide.identity, "d")
    assert plain.identity == gguf.planned_identity(GgufExport(type="Q4_0"), wide.identity, "d")
    again = export(wide, tmp_path / "again", gptq=True)
    assert (again.path / "manifest.json").read_bytes() == (chosen.path / "manifest.json").read_bytes()


def test_what_gptq_cannot_do_is_refused(tiny_model: Artifact, tmp_path: Path) -> None:
    from edgetune.compress import quantize
    from edgetune.recipe import Rtn

    config = read_config(tiny_model.path)
    with pytest.raises(UnsupportedError, match="gptq: true chooses codes of Q4, Q5 and Q6 types, Q8_0 is none"):
        gguf.check(GgufExport(type="Q8_0", gptq=True), config)
    with pytest.raises(UnsupportedError, match="intermediate_size gives rows of 80"):
        gguf.check(GgufExport(gptq=True), config | {"intermediate_size": 80})
    rounded = quantize.run(Rtn(group_size=32), tiny_model, tmp_path / "gptq")
    with pytest.raises(UnsupportedError, match="drop the gptq or rtn step"):
        gguf.run(GgufExport(gptq=True), rounded, tmp_path / "out", moments=None, calibration_digest="d", rows=ROWS)
    assert not (tmp_path / "out").exists()
