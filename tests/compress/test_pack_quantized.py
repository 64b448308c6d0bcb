"""compressed-tensors' format: its own library reads what we write, and what it says is read back; vLLM's rules."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.artifact import Artifact
from edgetune.compress import pack_quantized
from edgetune.compress.checkpoint import load_dequantized, read_layers
from edgetune.compress.quantize import check, run
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Scheme
from edgetune.compress.vllm_rules import broken_rules
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import UnsupportedError
from edgetune.found import find
from edgetune.recipe import Gptq, Rtn
from edgetune.runtime.engine import load_engine

Made = Callable[..., Artifact]
SCHEMES: list[dict[str, Any]] = [
    {"bits": 4, "group_size": 32, "sym": True},
    {"bits": 4, "group_size": 32, "sym": False},
    {"bits": 8, "group_size": 64, "sym": True},
    {"bits": 4, "group_size": -1, "sym": True},
    {"bits": 3, "group_size": 32, "sym": False},
    {"bits": 5, "group_size": 16, "sym": True},
    {"bits": 6, "group_size": 16, "sym": False},
]


@pytest.fixture(scope="module")
def made(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Round the tiny model by a scheme, once for each format of the checkpoint, which is never written to."""
    kept: dict[str, Artifact] = {}

    def make(scheme: dict[str, Any], form: Any = "compressed-tensors") -> Artifact:
        key = f"{form} {scheme}"
        if key not in kept:
            kept[key] = run(Rtn(checkpoint=form, **scheme), tiny_model, tmp_path_factory.mktemp("made") / "out")
        return kept[key]

    return make


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme["bits"] not in (5, 6)])
def test_it_holds_what_autogptqs_format_holds(made: Made, scheme: dict[str, Any]) -> None:
    ours, plain = (read_layers(made(scheme, form).path) for form in ("compressed-tensors", "gptq"))
    assert ours.keys() == plain.keys()
    for name, layer in ours.items():
        for part in ("q", "scales", "zero_point", "g_idx"):
            assert torch.equal(getattr(layer, part).int(), getattr(plain[name], part).int()), (name, part)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_its_own_library_unpacks_the_same_weights(made: Made, scheme: dict[str, Any]) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    folder = made(scheme).path
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    theirs = QuantizationScheme(**config["config_groups"]["group_0"])
    tensors = load_file(folder / "model.safetensors")
    for name, layer in read_layers(folder).items():
        own = {part: tensors[f"{name}.{part}"] for part in pack_quantized.PARTS if f"{name}.{part}" in tensors}
        found = PackedQuantizationCompressor.decompress(own, theirs)["weight"]
        torch.testing.assert_close(found.float(), layer.dequantize(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme["sym"]])
def test_transformers_reads_it(made: Made, scheme: dict[str, Any]) -> None:
    """Symmetric ones: with zero points, version 0.20 prepares places for them that are not packed, and refuses."""
    compare(made(scheme).path)


@pytest.mark.parametrize(
    "scheme", [pytest.param(scheme, marks=[pytest.mark.slow] if scheme["sym"] else []) for scheme in SCHEMES]
)
def test_transformers_dequantizes_it(made: Made, scheme: dict[str, Any]) -> None:
    """With zero points too, which the packed way refuses; symmetric ones, which it reads, where slow tests run."""
    pytest.importorskip("compressed_tensors")
    from transformers import CompressedTensorsConfig

    asked = CompressedTensorsConfig(dequantize=True)
    compare(made(scheme).path, quantization_config=asked)


def compare(folder: Path, **settings: Any) -> None:
    """Hold transformers' logits against those of our own dequantization."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, wanted = theirs(ids).logits, load_dequantized(folder)(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_that_fill_words_in_part_are_packed_as_its_library_packs_them(bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight = torch.randn(11, 72, generator=torch.Generator().manual_seed(bits))
    layer = rtn_quantize(weight, Scheme(bits, 8, sym=False))
    parts = pack_quantized.packed("layer", layer, bits, sym=False)
    signed = (layer.q.int() - 2 ** (bits - 1)).to(torch.int8)
    zeros = (layer.zero_point - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(parts["weight_packed"], pack_to_int32(signed, bits))
    assert torch.equal(parts["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))
    back = pack_quantized.unpacked(parts, bits, 8)
    for part in ("q", "scales", "zero_point", "g_idx"):
        assert torch.equal(getattr(back, part), getattr(layer, part)), part


def test_groups_are_of_the_size_that_the_file_names() -> None:
    parts = pack_quantized.packed("layer", rtn_quantize(torch.randn(8, 96), Scheme(4, 48)), 4, sym=True)
    found = pack_quantized.unpacked(parts, 4, 64)
    assert found.g_idx.tolist() == [column // 64 for column in range(96)]
    for size in (32, None):
        with pytest.raises(ValueError, match=f"96 columns with group_size={size} do not make 2 groups"):
            pack_quantized.unpacked(parts, 4, size)


def test_zero_points_that_are_not_stored_are_not_counted(made: Made) -> None:
    bits = [(made(scheme).manifest.scheme or {})["bits_per_weight"] for scheme in SCHEMES[:2]]
    assert bits == [4 + 16 / 32, 4 + 20 / 32]
    assert (made(SCHEMES[0], "gptq").manifest.scheme or {})["bits_per_weight"] == 4 + 20 / 32


@pytest.mark.parametrize("bits", [5, 6])
def test_five_and_six_bits_from_gptq_to_an_engine(tiny_model: Artifact, tmp_path: Path, bits: Any) -> None:
    rows = CalibrationSet(np.random.default_rng(0).integers(0, 512, (8, 16)))
    config = Gptq(bits=bits, group_size=16, sym=False, checkpoint="compressed-tensors")
    done = run(config, tiny_model, tmp_path / "out", calibration=rows)
    coarse = run(Gptq(bits=4, group_size=16, sym=False), tiny_model, tmp_path / "coarse", calibration=rows)
    errors = [one.manifest.notes["mean_relative_error"] for one in (done, coarse)]
    assert errors[0] < 0.6 * errors[1]
    assert max(int(layer.q.max()) for layer in read_layers(done.path).values()) == 2**bits - 1
    assert bits < done.manifest.scheme["bits_per_weight"] < bits + 2
    assert done.manifest.notes["vllm"]["reads"] == [f"compressed-tensors of {bits} bits; vLLM reads 4, 8"]


@pytest.mark.parametrize("bits", [5, 6])
def test_exports_without_those_bits_refuse_before_any_work(tiny_model: Artifact, bits: Any) -> None:
    from edgetune.compress.checkpoint import read_config
    from edgetune.export import onnx, tensorrt
    from edgetune.recipe_export import OnnxExport, TensorrtExport

    made, config = Rtn(bits=bits, group_size=16, checkpoint="compressed-tensors"), read_config(tiny_model.path)
    for precision in ("int4", "int8"):
        with pytest.raises(UnsupportedError, match=f"onnx precision {precision} cannot hold bits={bits}; use bits"):
            onnx.check(OnnxExport(builder="own", precision=precision), config, made)
    with pytest.raises(UnsupportedError, match="bits: 4"):
        tensorrt.check(TensorrtExport(precision="int4"), config, made)


def test_engines_run_it_as_any_checkpoint(made: Made, tmp_path: Path) -> None:
    folder = made(SCHEMES[0]).path
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "manifest.json").unlink()  # as someone else's
    found = find(copy)
    assert found.kind == "gptq"
    engine = load_engine(found.engines[0], copy, n_ctx=64, n_threads=1)
    logits = engine.score([5, 6, 7])
    wanted = load_dequantized(folder)(torch.tensor([[5, 6, 7]])).logits[0]
    torch.testing.assert_close(torch.from_numpy(logits), wanted, atol=1e-2, rtol=0)
    engine.close()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "naive-quantized"},
        {"config_groups": {}},
        {"config_groups": ["a"]},
        {"config_groups": {"a": "b"}},
        {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"}}}},
        {"config_groups": {"a": {"weights": {"type": "float", "num_bits": 4, "strategy": "group"}}}},
        {"config_groups": {"a": {"weights": {"type": "int", "num_bits": 4, "strategy": "group"},
                                 "input_activations": {"num_bits": 8}}}},
    ],
)  # fmt: skip
def test_another_kind_is_one_line(made: Made, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(made(SCHEMES[0]).path, tmp_path / "changed"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="of compressed-tensors, pack-quantized can be read: integers of"):
        read_layers(folder)


def test_columns_that_left_their_groups_are_refused(tiny_model: Artifact) -> None:
    from edgetune.compress.checkpoint import read_config

    config = Gptq(checkpoint="compressed-tensors", group_size=32, desc_act=True, static_groups=False)
    with pytest.raises(UnsupportedError, match="set static_groups: true"):
        check(config, read_config(tiny_model.path))
    layer = next(iter(read_layers_of(tiny_model).values()))
    layer.g_idx[0], layer.g_idx[-1] = int(layer.g_idx[-1]), int(layer.g_idx[0])
    with pytest.raises(UnsupportedError, match="keeps columns in their groups"):
        pack_quantized.packed("layer", layer, 4, sym=True)


def read_layers_of(source: Artifact) -> Any:
    return {"layer": rtn_quantize(torch.randn(64, 64), Scheme(4, 32, sym=True))}


def test_the_genai_builder_is_told(tiny_model: Artifact) -> None:
    from edgetune.compress.checkpoint import read_config
    from edgetune.export import onnx
    from edgetune.recipe_export import OnnxExport

    config = read_config(tiny_model.path)
    with pytest.raises(UnsupportedError, match="reads checkpoints in AutoGPTQ's format"):
        onnx.check(OnnxExport(), config, Rtn(group_size=32, checkpoint="compressed-tensors"))
    onnx.check(OnnxExport(builder="own"), config, Rtn(group_size=32, checkpoint="compressed-tensors"))


@pytest.mark.parametrize(
    ("form", "scheme", "shape", "reads", "marlin"),
    [
        ("gptq", Scheme(4, 64, sym=True), (128, 256), [], []),
        ("gptq", Scheme(4, 64, sym=False), (128, 256), [], ["zero points"]),
        ("compressed-tensors", Scheme(4, 64, sym=False), (128, 256), [], []),
        ("compressed-tensors", Scheme(3, 64, sym=True), (128, 256), ["of 3 bits; vLLM reads 4, 8"], ["3 bits"]),
        ("gptq", Scheme(2, 16, sym=True), (576, 576), [], ["2 bits", "group_size 16", "x is 576 x 576"]),
    ],
)
def test_vllms_rules(form: str, scheme: Scheme, shape: tuple[int, int], reads: list[str], marlin: list[str]) -> None:
    found = broken_rules(form, [scheme], {"x": shape})
    for told, wanted in ((found["reads"], reads), (found["marlin"], marlin)):
        assert len(told) == len(wanted), told
        assert all(part in line for part, line in zip(wanted, told, strict=True)), told
