"""The AutoGPTQ format: words by hand, round trips, and damage that is said in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPTQConfig

from edgetune.artifact import Artifact
from edgetune.compress.checkpoint import load_dequantized, read_layers
from edgetune.compress.packing import check_pack, pack, unpack
from edgetune.compress.quantize import run
from edgetune.errors import ArtifactError, UnsupportedError
from edgetune.recipe import Rtn


@pytest.fixture(scope="module")
def rounded(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return run(Rtn(bits=4, group_size=32, sym=True), tiny_model, tmp_path_factory.mktemp("rtn") / "out")


@pytest.fixture
def folder(rounded: Artifact, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(rounded.path, tmp_path / "copy"))


def change(folder: Path, **settings: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


def test_words_by_hand() -> None:
    assert pack(torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]]), 4).tolist() == [[0x87654321 - 2**32]]
    assert pack(torch.tensor([[1], [2], [3], [255]]), 8).tolist() == [[0xFF030201 - 2**32]]
    assert pack(torch.tensor([[3]] + [[0]] * 14 + [[1]]), 2).tolist() == [[(1 << 30) + 3]]
    # AutoGPTQ's three-bit layout: value 10 lies in words 0 and 1, value 21 in words 1 and 2
    three = torch.zeros(32, 1, dtype=torch.int32)
    three[10], three[21], three[31] = 0b101, 0b110, 0b011
    assert pack(three, 3).tolist() == [[0b01 << 30], [0b1], [(0b11) | (0b011 << 29)]]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_packing_round_trip(bits: int) -> None:
    values = torch.randint(0, 2**bits, (96, 5), generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    words = pack(values, bits)
    assert words.dtype == torch.int32
    assert words.shape == (96 * bits // 32, 5)
    assert torch.equal(unpack(words, bits), values)


def test_a_layer_that_does_not_fill_words_is_refused() -> None:
    check_pack("layer", 8, 16, 4)
    with pytest.raises(
        UnsupportedError, match=r"bits=3 packs 32 values .* divide out_features=40 of layer; use bits=4"
    ):
        check_pack("layer", 40, 64, 3)


def test_version_one_stores_zero_minus_one(rounded: Artifact) -> None:
    stored = load_file(rounded.path / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    assert (stored[f"{name}.qzeros"] == 0x77777777).all()
    assert stored[f"{name}.qweight"].shape == (192 // 8, 64)
    assert stored[f"{name}.qzeros"].shape == (192 // 32, 64 // 8)
    assert stored[f"{name}.scales"].shape == (192 // 32, 64)
    assert stored[f"{name}.scales"].dtype == torch.float16
    assert stored[f"{name}.g_idx"].tolist() == [i // 32 for i in range(192)]
    assert "lm_head.weight" not in stored  # tied embeddings stay tied
    assert all(t.dtype in (torch.float16, torch.int32) for t in stored.values())


def test_settings_are_said_twice_and_the_tokenizer_comes_along(rounded: Artifact, tiny_model: Artifact) -> None:
    config = json.loads((rounded.path / "config.json").read_text())
    assert config["quantization_config"] == json.loads((rounded.path / "quantize_config.json").read_text())
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    assert config["quantization_config"].items() >= (wanted | {"checkpoint_format": "gptq"}).items()
    assert config["dtype"] == "float16"
    GPTQConfig.from_dict(config["quantization_config"])  # what transformers checks before it loads
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "golden.json"):
        assert (rounded.path / name).read_bytes() == (tiny_model.path / name).read_bytes()


def test_settings_in_a_file_of_their_own_are_enough(folder: Path) -> None:
    before = load_dequantized(folder).state_dict()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    after = load_dequantized(folder).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_columns_without_g_idx_lie_in_groups_of_the_file_s_own_size(folder: Path) -> None:
    before, name = read_layers(folder), "model.layers.0.mlp.down_proj"
    stored = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.endswith("g_idx")}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(read_layers(folder)[name].g_idx, before[name].g_idx)
    for size in (64, 0, "32", None):
        change(folder, group_size=size)
        with pytest.raises(ArtifactError, match=r"is damaged .*group_size=.* do not make \d groups"):
            read_layers(folder)
    # 192 columns in groups of 128: the second has 64
    parts = {"scales": stored[f"{name}.scales"][:2], "qzeros": stored[f"{name}.qzeros"][:2]}
    kept = {n: t for n, t in stored.items() if n.startswith(name)} | {f"{name}.{n}": t for n, t in parts.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, group_size=128)
    assert read_layers(folder)[name].g_idx.tolist() == [column // 128 for column in range(192)]


def test_version_two_is_read_as_it_is(folder: Path) -> None:
    before = read_layers(folder)
    stored = load_file(folder / "model.safetensors")
    for name in stored:
        if name.endswith("qzeros"):
            stored[name] += 0x11111111
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder, checkpoint_format="gptq_v2")
    after = read_layers(folder)
    for name, layer in before.items():
        assert torch.equal(layer.zero_point, after[name].zero_point)
        assert torch.equal(layer.dequantize(), after[name].dequantize())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "awq"}, "can be read"),
        ({"bits": 5}, "can be read"),
        ({"dynamic": {"x": {}}}, "can be read"),
        ({"dynamic": ["x"]}, "can be read"),
        ({"dynamic": {"-:x": False}}, "can be read"),
        ({"dynamic": {"+:(": {"bits": 4}}}, r"`dynamic` has '\(', no regular expression"),
        ({"dynamic": {"+:(.|.)*(.|.)*[!?]$": {"bits": 4}}}, r"is not matched with model\.layers.* within 1 s"),
    ],
)
def test_what_cannot_be_read_is_refused(folder: Path, settings: dict[str, object], says: str) -> None:
    change(folder, **settings)
    with pytest.raises(UnsupportedError, match=says):
        read_layers(folder)


def test_damage_is_one_line(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 4, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError) as caught:
            read_layers(folder)
        assert "\n" not in str(caught.value)
    weights.unlink()
    with pytest.raises(ArtifactError, match="missing"):
        load_dequantized(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read"):
        read_layers(folder)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_tensors_that_do_not_fit_are_refused(folder: Path, part: str) -> None:
    stored = load_file(folder / "model.safetensors")
    name = f"model.layers.1.self_attn.q_proj.{part}"
    stored[name] = stored[name][:-1].contiguous() if part != "g_idx" else stored[name] + 7
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layer model\.layers\.1\.self_attn\.q_proj is damaged"):
        read_layers(folder)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales", "g_idx"])
def test_tensors_of_other_dimensions_are_refused(folder: Path, part: str) -> None:
    stored = load_file(folder / "model.safetensors")
    name = f"model.layers.1.self_attn.q_proj.{part}"
    stored[name] = stored[name][None] if part == "g_idx" else stored[name].flatten()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layer model\.layers\.1\.self_attn\.q_proj is damaged"):
        read_layers(folder)


def test_settings_and_an_index_that_are_no_objects_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": ["gptq"]}))
    with pytest.raises(ArtifactError, match=r"quantization_config of config\.json is no JSON object"):
        read_layers(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors"]}')
    with pytest.raises(ArtifactError, match="does not say where tensors lie"):
        read_layers(folder)


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"tensor model\.norm\.weight is missing"):
        load_dequantized(folder)
