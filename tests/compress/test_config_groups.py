"""Layers of several schemes in one checkpoint of compressed-tensors: written, read by its own library, and by ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.artifact import Artifact
from edgetune.compress import sensitivity
from edgetune.compress.allocate import layer_schemes
from edgetune.compress.architectures import linear_shapes
from edgetune.compress.checkpoint import load_dequantized, read_config, read_layers
from edgetune.compress.config_groups import matched, read_groups, written_groups
from edgetune.compress.pack_quantized import FORMAT, PARTS
from edgetune.compress.quantize import check, run
from edgetune.compress.scheme import Scheme
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError, UnsupportedError
from edgetune.export.decoder_source import open_source, quantizer_of
from edgetune.recipe import Rtn
from tests.conftest import make_tiny_model

ROWS = CalibrationSet(np.random.default_rng(0).integers(0, 512, (2, 16)))
CHOICES: Any = [2, 5, {"bits": 4, "group_size": 16}, {"bits": 6, "group_size": -1}, 8]


def config(*, sym: bool, budget: float = 5.2) -> Rtn:
    allocate: Any = {"budget": budget, "choices": CHOICES}
    return Rtn(group_size=32, sym=sym, checkpoint="compressed-tensors", allocate=allocate)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_tiny_model(tmp_path_factory.mktemp("groups") / "model", layers=12)


def losses(model: Artifact) -> dict[str, dict[int | str, float]]:
    """As if measured: every group wants another choice."""
    rng, labels = np.random.default_rng(1), (2, "4g16", 5, "6row", 8)
    names = [name for name in linear_shapes(read_config(model.path)) if name.endswith(("q_proj", "o_proj", "gate_proj",
             "down_proj"))]  # fmt: skip
    return {name: dict(zip(labels, sorted(rng.exponential(1, 5), reverse=True), strict=True)) for name in names}


@pytest.fixture(scope="module", params=[True, False], ids=["sym", "asym"])
def made(request: pytest.FixtureRequest, model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder, asked = tmp_path_factory.mktemp("made"), config(sym=request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sensitivity, "measure", lambda *_, **__: losses(model))
        measured = sensitivity.run(asked, model, folder / "measured", measured=ROWS)
    assert sensitivity.read(measured) == losses(model)
    found = run(asked, model, folder / "made", sensitivity=measured)
    of = layer_schemes(asked, read_config(model.path), losses(model))
    assert len(set(of.values())) >= 4, "else this shows little"
    scheme: Any = found.manifest.scheme
    assert scheme["bits_of"] == {name: one.bits for name, one in of.items()}
    assert scheme["group_size_of"] == {name: one.group_size for name, one in of.items()}
    assert 4.5 < scheme["bits_per_weight"] <= 5.2
    return found


def schemes_of(made: Artifact) -> dict[str, tuple[int, int]]:
    scheme: Any = made.manifest.scheme
    return {name: (bits, scheme["group_size_of"][name]) for name, bits in scheme["bits_of"].items()}


def test_we_read_it_back(made: Artifact) -> None:
    for name, layer in read_layers(made.path).items():
        bits, columns = schemes_of(made)[name]
        C, G = layer.q.shape[1], layer.scales.shape[1]
        assert G * (C if columns == -1 else columns) == C, name
        assert int(layer.q.max()) < 2**bits, name
    source, found = open_source(made), quantizer_of(made)
    assert source.bits == {name: bits for name, (bits, _) in schemes_of(made).items()}
    assert found.allocate is not None
    assert {(grid.bits, grid.group_size) for grid in found.allocate.grids} == set(schemes_of(made).values())


def test_its_own_library_unpacks_the_same_weights(made: Artifact) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import match_targets
    from safetensors.torch import load_file

    stored = json.loads((made.path / "config.json").read_text())["quantization_config"]
    theirs = QuantizationConfig(**{key: value for key, value in stored.items() if key != "meta"})
    of = {target: group for group in theirs.config_groups.values() for target in group.targets}
    tensors = load_file(made.path / "model.safetensors")
    for name, layer in read_layers(made.path).items():
        (target,) = match_targets(name, torch.nn.Linear(1, 1), of)
        own = {part: tensors[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in tensors}
        found = PackedQuantizationCompressor.decompress(own, of[target])["weight"]
        torch.testing.assert_close(found.float(), layer.dequantize(), atol=1e-3, rtol=1e-3)


def test_transformers_gives_our_logits(made: Artifact) -> None:
    """Symmetric ones: version 0.20 prepares places for zero points that are not packed, and refuses the file."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    if not (made.manifest.scheme or {})["sym"]:
        pytest.skip("zero points are not read")
    theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found, wanted = theirs(ids).logits, load_dequantized(made.path)(ids).logits
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)
    with pytest.raises((RuntimeError, ValueError)):  # it takes the first group for all layers
        AutoModelForCausalLM.from_pretrained(made.path, quantization_config=CompressedTensorsConfig(dequantize=True))


def test_targets_match_one_group_each_and_fused_names(model: Artifact) -> None:
    names = linear_shapes(read_config(model.path))
    of = {name: Scheme(4, 32) for name in names}
    of |= dict.fromkeys((name for name in names if name.startswith("model.layers.1.self_attn.") and "o_p" not in name),
                        Scheme(4, 16))  # fmt: skip
    of["model.layers.11.mlp.down_proj"] = Scheme(8, 32)
    groups = written_groups(of)
    assert groups["group_0"]["targets"] == [r"re:model\.layers\.(11)\.mlp\.down_proj$"]
    assert groups["group_1"]["targets"] == [r"re:model\.layers\.(1)\.self_attn\.(q|k|v|qkv)_proj$"]
    found = read_groups(groups, FORMAT)
    assert found is not None
    for name, scheme in of.items():
        group = matched(name, found)
        assert group is not None
        assert (group.bits, group.group_size) == (scheme.bits, scheme.group_size)
    for fused, columns in (("1.self_attn.qkv_proj", 16), ("11.self_attn.qkv_proj", 32), ("1.mlp.gate_up_proj", 32)):
        group = matched(f"model.layers.{fused}", found)
        assert group is not None
        assert group.group_size == columns
    assert matched("lm_head", found) is None
    assert [group["targets"] for group in written_groups(dict.fromkeys(names, Scheme(4, 32))).values()] == [["Linear"]]


def test_names_count_before_patterns_and_these_before_the_class() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        weights = {"type": "int", "num_bits": bits, "strategy": "group", "group_size": 32}
        return {"targets": list(targets), "weights": weights}

    found = read_groups({"a": group(2, "Linear"), "b": group(3, "re:.*q_proj"), "c": group(4, "x.q_proj")}, FORMAT)
    assert found is not None
    bits = [one.bits for name in ("x.q_proj", "y.q_proj", "y.k_proj") if (one := matched(name, found))]
    assert bits == [4, 3, 2]
    assert read_groups({"a": group(2, "re:(")}, FORMAT) is None
    assert read_groups({"a": group(2) | {"format": "int-quantized"}}, FORMAT) is None
    assert read_groups({"a": group(2, "Linear"), "b": group(7, "re:x")}, FORMAT) is None


def test_a_layer_of_no_group_is_one_line(made: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.path, tmp_path / "changed"))
    stored = json.loads((folder / "config.json").read_text())
    stored["quantization_config"]["config_groups"].pop("group_0")
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"layer model\..* is in no group of config_groups; make it again"):
        read_layers(folder)


def test_what_cannot_be_is_refused_before_any_work(model: Artifact) -> None:
    from edgetune.export import onnx, tensorrt
    from edgetune.recipe_export import OnnxExport, TensorrtExport

    model_config, choices = read_config(model.path), [4, {"bits": 8, "group_size": 48}]
    wide: Any = {"budget": 6, "choices": choices}
    with pytest.raises(UnsupportedError, match="group_size=48 does not divide in_features=64"):
        check(Rtn(group_size=32, checkpoint="compressed-tensors", allocate=wide), model_config)
    with pytest.raises(
        UnsupportedError, match=r"allocate\.budget=2: 2 bits for all layers take 2\.5 with group_size=32"
    ):
        check(config(sym=True, budget=2), model_config)
    mixed: Any = {"budget": 6, "choices": [4, {"bits": 8, "group_size": 32}]}
    asked = Rtn(group_size=64, checkpoint="compressed-tensors", allocate=mixed)
    with pytest.raises(UnsupportedError, match="onnx has one group_size for all layers"):
        onnx.check(OnnxExport(builder="own"), model_config, asked)
    with pytest.raises(UnsupportedError, match="in place of allocate"):
        tensorrt.check(TensorrtExport(precision="int4"), model_config, asked)


def test_both_formats_share_a_measurement() -> None:
    asked: Any = {"budget": 5, "choices": [4, 8]}
    planned = {
        sensitivity.planned_identity(Rtn(group_size=32, checkpoint=form, allocate=asked), "m" * 64, None, "r" * 64)
        for form in ("gptq", "compressed-tensors")
    }
    assert len(planned) == 1
