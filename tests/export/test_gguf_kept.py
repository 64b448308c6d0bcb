"""Integers of a GPTQ checkpoint in a GGUF file: the same weights, or a line that says which were rounded again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.artifact import Artifact
from edgetune.compress import quantize
from edgetune.compress.checkpoint import read_layers
from edgetune.compress.scheme import Quantized
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ContractError
from edgetune.export import gguf, gguf_kept
from edgetune.export.gguf_families import change, family, gguf_name
from edgetune.export.gguf_kept import Kept, holding, planned
from edgetune.export.gguf_read import dequantize, read_tensors
from edgetune.export.gguf_write import read_config
from edgetune.graph import weighed_export
from edgetune.recipe import Candidate, Gptq, Rtn
from edgetune.recipe_export import GgufExport
from edgetune.runtime.report.held import held
from tests.conftest import make_tiny_model

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here")

TYPES = [(4, True, "Q4_0"), (5, True, "Q5_0"), (8, True, "Q8_0"), (4, False, "Q4_1"), (5, False, "Q5_1")]


def layer(bits: int, *, sym: bool, group: int = 32, R: int = 6, C: int = 128) -> Quantized:
    """Random integers, all codes among them, on random grids."""
    draw = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 2**bits, (R, C), generator=draw, dtype=torch.uint8)
    zero = torch.full((R, C // group), 2 ** (bits - 1), dtype=torch.int32)
    if not sym:
        zero = torch.randint(1, 2**bits, zero.shape, generator=draw, dtype=torch.int32)
    scales = torch.rand(zero.shape, generator=draw).half()
    return Quantized(q, scales, zero, (torch.arange(C) // group).int())


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("bits", "sym", "kind"), TYPES)
def test_a_type_holds_the_integers(bits: int, sym: bool, kind: str, group: int) -> None:
    from gguf import GGMLQuantizationType, quants

    one = layer(bits, sym=sym, group=group)
    assert holding(one, bits) == kind
    found = quants.dequantize(Kept(kind, one).blocks(None, {}), GGMLQuantizationType[kind])
    wanted = one.dequantize().numpy()
    if sym:
        np.testing.assert_array_equal(found, wanted)
    else:  # the minimum is a float16
        np.testing.assert_allclose(found, wanted, atol=2.0**-11 * float(one.scales.max()) * 2**bits)


def test_what_no_type_holds() -> None:
    sym = layer(4, sym=True)
    moved = replace(sym, g_idx=sym.g_idx.flip(0))
    huge = replace(layer(4, sym=False), scales=torch.full_like(sym.scales, 60000))
    for one, bits in (
        (layer(3, sym=True), 3), (layer(8, sym=False), 8), (layer(4, sym=True, group=16), 4), (moved, 4), (huge, 4),
        (layer(4, sym=True, group=48, C=96), 4),
    ):  # fmt: skip
        assert holding(one, bits) is None


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_tiny_model(tmp_path_factory.mktemp("kept") / "model", hidden=64)


def layers_of(made: Artifact, source: Artifact) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Type and weights of each layer of a file, rows in the checkpoint's order."""
    config = read_config(source.path)
    written, of = read_tensors(made.path / gguf.FILE), family(config)
    found = {}
    for name in read_layers(source.path):
        tensor, moved = written[gguf_name(f"{name}.weight", of)], change(f"{name}.weight", of)
        weight = dequantize(tensor.kind, tensor.data)
        found[name] = tensor.kind, moved.back(weight, config) if moved is not None else weight
    return found


def export(kind: str, source: Artifact, out: Path) -> Artifact:
    return gguf.run(GgufExport(type=kind), source, out, moments=None)


@pytest.mark.parametrize(("bits", "sym", "kind"), TYPES)
def test_a_checkpoint_is_written_as_it_is(wide: Artifact, tmp_path: Path, bits: int, sym: bool, kind: str) -> None:
    form = "gptq" if bits != 5 else "compressed-tensors"
    source = quantize.run(Rtn(bits=bits, group_size=64, sym=sym, checkpoint=form), wide, tmp_path / "ints")
    made = export(kind, source, tmp_path / "out")
    layers, found = read_layers(source.path), layers_of(made, source)
    assert made.manifest.notes["integers"] == {"layers": len(layers), "kept": len(layers)}
    told = [one.text for one in held(made.manifest.notes)]
    assert f"the integers of all {len(layers)} layers are the checkpoint's" in told
    assert not any("rounded again" in line for line in made.manifest.fallbacks)
    for name, (written, weight) in found.items():
        assert written == kind
        wanted = layers[name].dequantize().numpy()
        assert np.linalg.norm(weight - wanted) <= (0 if sym else 1e-3) * np.linalg.norm(wanted)


def test_layers_of_several_bits_get_a_type_each(wide: Artifact, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(3, 500, (8, 48))
    config = Gptq.model_validate(
        {"group_size": 32, "allocate": {"budget": 6.3, "choices": [3, 4, 8], "rows": {"n_samples": 4}}}
    )
    from edgetune.compress import sensitivity

    measured = sensitivity.run(
        config, wide, tmp_path / "seen", calibration=CalibrationSet(rows), measured=CalibrationSet(rows)
    )
    source = quantize.run(config, wide, tmp_path / "ints", calibration=CalibrationSet(rows), sensitivity=measured)
    layers = read_layers(source.path)
    kinds = {name: holding(one, int(one.q.max()).bit_length()) for name, one in layers.items()}
    assert {"Q4_0", "Q8_0"} <= set(kinds.values())
    made = export("Q4_0", source, tmp_path / "out")
    n_kept = sum(kind is not None for kind in kinds.values())
    told = [one.text for one in held(made.manifest.notes)]
    assert n_kept == len(layers) or f"the integers of {n_kept} of {len(layers)} layers are the checkpoint's" in told
    found = layers_of(made, source)
    for name, kind in kinds.items():
        if kind is not None:
            assert found[name][0] == kind
            np.testing.assert_array_equal(found[name][1], layers[name].dequantize().numpy())


def test_another_type_rounds_again_and_says_so(wide: Artifact, tmp_path: Path) -> None:
    source = quantize.run(Rtn(bits=4, group_size=32, sym=False), wide, tmp_path / "ints")
    made = export("Q4_0", source, tmp_path / "out")
    n = len(read_layers(source.path))
    assert made.manifest.fallbacks[-1] == f"the integers of GPTQ are rounded again in {n} of {n} layers, to Q4_0"
    assert made.manifest.notes["integers"] == {"layers": n, "kept": 0}
    assert not any("integers" in one.text for one in held(made.manifest.notes))


def test_a_corrected_layer_is_rounded_anew(wide: Artifact, tmp_path: Path) -> None:
    rows = CalibrationSet(np.random.default_rng(0).integers(3, 500, (8, 48)))
    config = Rtn.model_validate({"group_size": 32, "recover": {"rank": 4}})
    source = quantize.run(config, wide, tmp_path / "ints", calibration=rows)
    made = export("Q4_0", source, tmp_path / "out")
    assert any("rounded again" in line for line in made.manifest.fallbacks)


def test_a_kept_layer_that_is_written_wrongly_is_seen(
    wide: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code of a layer: far within what eight bits may lose by rounding, and here nothing is rounded."""
    source = quantize.run(Rtn(bits=8, group_size=32), wide, tmp_path / "ints")
    whole = gguf_kept.Kept.blocks

    def one_off(self: Kept, *args: Any) -> np.ndarray[Any, Any]:
        found = whole(self, *args)
        found[0, 2] ^= 1
        return found

    monkeypatch.setattr(gguf_kept.Kept, "blocks", one_off)
    with pytest.raises(ContractError, match="differs from its source"):
        export("Q8_0", source, tmp_path / "out")


def test_no_importance_matrix_is_made_where_nothing_is_rounded() -> None:
    def read(step: dict[str, Any], kind: str) -> bool:
        found = Candidate.model_validate({"compress": [{"gptq": step}], "export": {"gguf": {"type": kind}}})
        return weighed_export(found) is not None

    assert not read({"bits": 4, "group_size": 32}, "Q4_0")
    assert not read({"bits": 4, "group_size": 64, "sym": False}, "Q4_1")
    assert read({"bits": 4, "group_size": 32, "sym": False}, "Q4_0")
    assert read({"bits": 4, "group_size": 16}, "Q4_0")
    assert read({"bits": 4, "group_size": 32, "recover": {"rank": 4}}, "Q4_0")
    assert planned(None) is None
