"""Base models: a folder, a GGUF file or a package becomes the same artifact; what would lack a part is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from edgetune import sources
from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.errors import SourceError
from edgetune.recipe_export import GgufExport

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def folder(tiny_model: Artifact, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder that a test may damage."""
    return Path(shutil.copytree(tiny_model.path, tmp_path / "base"))


@pytest.fixture(scope="module")
def gguf_file(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from edgetune.export import gguf

    config = GgufExport(type="F16", imatrix=False)
    out = tmp_path_factory.mktemp("gguf") / "out"
    return gguf.run(config, tiny_model, out, moments=None, calibration_digest=None).path / gguf.FILE


def weights(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_folder_becomes_a_model_artifact(tiny_model: Artifact, folder: Path, tmp_path: Path) -> None:
    import torch

    found = sources.find(str(folder))
    assert (found.form, found.config) == ("folder", {"base": "base"})
    assert found.model_config()["hidden_size"] == 64
    made = sources.run(found, tmp_path / "out")
    assert made.identity == found.identity
    assert made.manifest.kind == "model"
    assert made.manifest.notes["parameters"] > 10_000
    before, after = weights(tiny_model.path), weights(made.path)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight, before[name].bfloat16(), rtol=0, atol=0)
    golden = Golden.read(made.path)
    assert golden.stop_ids == [2]
    assert golden.texts == Golden.read(tiny_model.path).texts
    assert [c.messages for c in golden.conversations] == list(sources.GOLDEN)
    assert str(tmp_path) not in "".join(p.read_text() for p in made.path.glob("*.json"))
    assert sources.run(found, tmp_path / "again").digest == made.digest


def test_the_identity_follows_the_bytes_and_not_the_place(folder: Path, tmp_path: Path) -> None:
    first = sources.find(str(folder)).identity
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "base"))
    assert sources.find(str(moved)).identity == first
    (moved / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert sources.find(str(moved)).identity != first


def test_a_gguf_file_gives_the_same_model(tiny_model: Artifact, gguf_file: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    found = sources.find(str(gguf_file))
    assert found.form == "gguf"
    config = found.model_config()
    original = json.loads((tiny_model.path / "config.json").read_text())
    for key in config.keys() - {"head_dim"}:
        assert config[key] == original[key], key
    assert config["head_dim"] == 16
    made = sources.run(found, tmp_path / "out")
    assert made.identity == found.identity
    before, after = weights(tiny_model.path), weights(made.path)
    assert before.keys() == after.keys()
    for name, weight in after.items():
        torch.testing.assert_close(weight, before[name].half().float().bfloat16(), rtol=0, atol=0, msg=name)
    ours, theirs = (AutoTokenizer.from_pretrained(p) for p in (tiny_model.path, made.path))
    for text in ("set the light to 30", '{"level": 30}', "Grüße, 東京 👩‍🔧", "<|im_start|>user\nhi<|im_end|>"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours(text, add_special_tokens=False)["input_ids"]
    golden, reference = Golden.read(made.path), Golden.read(tiny_model.path)
    assert golden.texts == reference.texts
    assert golden.stop_ids == reference.stop_ids
    assert golden.chat_template == reference.chat_template
    assert golden.n_bos == reference.n_bos


def write_gguf(model: Artifact, file: Path, *, tensors: dict[str, Any], special: dict[str, int], **config: Any) -> str:
    """Write a GGUF file that nothing verifies, with other tensors (None: without), special tokens or keys."""
    from edgetune.export import gguf_write
    from edgetune.export.gguf_vocab import read_vocabulary
    from edgetune.progress import silent

    settings = gguf_write.read_config(model.path)
    stored = gguf_write.folder_weights(model.path, settings)
    vocabulary = read_vocabulary(model.path, settings["vocab_size"])
    shapes = stored.shapes | {name: tuple(found.shape) for name, found in tensors.items() if found is not None}
    shapes = {name: shape for name, shape in shapes.items() if tensors.get(name, shape) is not None}
    weights = gguf_write.Weights(
        shapes, stored.dtype, lambda name: tensors[name] if name in tensors else stored.get(name)
    )
    types = dict.fromkeys(gguf_write.written_shapes(weights, settings | config), "F32")
    vocabulary = replace(vocabulary, special=vocabulary.special | special)
    gguf_write.write_gguf(file, weights, settings | config, vocabulary, types, "F32", silent)
    return str(file)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"rope_parameters": LINEAR}, r"llama\.rope\.scaling\.type is 'linear', .*; give the safetensors folder"),
        ({"rope_parameters": LLAMA3}, r"tensor rope_freqs\.weight has no place .*; give the safetensors folder"),
        ({"num_hidden_layers": 1}, r"llama\.block_count is 1, the tensors are of 2 blocks up to 1; get the file again"),
        ({"num_hidden_layers": 3}, r"llama\.block_count is 3, the tensors are of 2 blocks up to 1; get the file again"),
        ({"intermediate_size": 96}, r"Transformers cannot read this GGUF file \(.+\)$"),
    ],
)
def test_a_gguf_file_that_would_lose_what_its_header_says(
    tiny_model: Artifact, tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    file = write_gguf(tiny_model, tmp_path / "m.gguf", tensors={}, special={}, **config)
    with pytest.raises(SourceError, match=says) as caught:
        sources.run(sources.find(file), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_that_has_more_tensors_or_fewer(tiny_model: Artifact, tmp_path: Path) -> None:
    import torch

    bias = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    for tensors, says in (
        (bias, r"tensor blk\.0\.attn_q\.bias has no place in Transformers' LlamaForCausalLM; give the safetensors"),
        ({"model.layers.1.mlp.up_proj.weight": None}, r"tensor model\.layers\.1\.mlp\.up_proj\.weight is not in it"),
    ):
        file = write_gguf(tiny_model, tmp_path / "m.gguf", tensors=tensors, special={})
        with pytest.raises(SourceError, match=says):
            sources.run(sources.find(file), tmp_path / "out")


def test_all_end_tokens_of_a_gguf_file_end_an_answer(tiny_model: Artifact, tmp_path: Path) -> None:
    file = write_gguf(tiny_model, tmp_path / "m.gguf", tensors={}, special={"eot": 0, "eom": 4711})
    made = sources.run(sources.find(file), tmp_path / "out")
    assert Golden.read(made.path).stop_ids == [0, 2]  # there is no token 4711
    assert json.loads((made.path / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_an_untied_gguf_says_so(tmp_path: Path) -> None:
    from edgetune.export import gguf
    from tests.conftest import make_tiny_model

    model = make_tiny_model(tmp_path / "model", tie=False, layers=1)
    config = GgufExport(type="F16", imatrix=False)
    out = gguf.run(config, model, tmp_path / "out", moments=None, calibration_digest=None)
    assert sources.find(str(out.path / gguf.FILE)).model_config()["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ("pkg:no-such-package-xyz", r"package no-such-package-xyz is not installed; run: pip install no-such-package"),
        ("pkg:pytest", r"base pkg:pytest: the package holds 0 \.gguf files, one is needed"),
        ("./nowhere", r"base './nowhere': no such folder; give a folder, a \.gguf file, pkg:NAME or a hub id"),
        ("/nowhere/at/all", r"no such folder; give a folder"),
        ("word", r"base 'word': no such folder; give a folder"),
        ("a/b/c", r"base 'a/b/c': no such folder; give a folder"),
        ("nowhere.gguf", r"base 'nowhere\.gguf': no such file nowhere\.gguf"),
        ("models/my model", r"base 'models/my model': no such folder, and the hub did not give it \(Repo id must"),
    ],
)
def test_what_is_not_there(base: str, says: str) -> None:
    with pytest.raises(SourceError, match=says) as caught:
        sources.find(base)
    assert "\n" not in str(caught.value)


def test_a_revision_is_for_the_hub(folder: Path, gguf_file: Path) -> None:
    for base in (str(folder), str(gguf_file)):
        with pytest.raises(SourceError, match=r"is no hub model, revision 'v1' is not read; leave revision out$"):
            sources.find(base, "v1")


def test_a_package_with_one_gguf_file(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class File:
        name = gguf_file.name

        def locate(self) -> Path:
            return gguf_file

    class Distribution:
        files = [File()]

    monkeypatch.setattr(metadata, "distribution", lambda _: Distribution())
    found = sources.find("pkg:tiny")
    assert (found.path, found.config) == (gguf_file, {"base": "pkg:tiny"})


def test_a_truncated_safetensors_file_is_refused_before_it_is_read(folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for n_bytes in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:n_bytes])
        with pytest.raises(SourceError, match=r"model\.safetensors: truncated or damaged safetensors file") as caught:
            sources.find(str(folder))
        assert "\n" not in str(caught.value)


def test_pickle_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match=r"pickle weights \(pytorch_model\.bin\) are refused; convert them"):
        sources.find(str(folder))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(SourceError, match="safetensors weights are needed, none is there"):
        sources.find(str(folder))


def shard(folder: Path, *names: str) -> None:
    """Put the weights of a folder into files of these names, with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / sources.WEIGHTS)
    (folder / sources.WEIGHTS).unlink()
    where = {tensor: names[place % len(names)] for place, tensor in enumerate(tensors)}
    for name in names:
        part = {tensor: tensors[tensor] for tensor, place in where.items() if place == name}
        save_file(part, folder / name, {"format": "pt"})
    (folder / sources.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_what_is_read_of_a_folder_are_the_shards_that_its_index_names(folder: Path, tmp_path: Path) -> None:
    whole = sources.find(str(folder)).n_parameters()
    shard(folder, "a.safetensors", "b.safetensors")
    found = sources.find(str(folder))
    shutil.copyfile(folder / "a.safetensors", folder / "consolidated.safetensors")
    assert sources.find(str(folder)).digest == found.digest
    assert found.n_parameters() == whole
    made = sources.run(found, tmp_path / "out")
    assert made.manifest.notes["parameters"] == whole
    with (folder / sources.INDEX).open("a") as index:
        index.write("\n")
    assert sources.find(str(folder)).digest != found.digest
    (folder / "b.safetensors").unlink()
    with pytest.raises(SourceError, match=r"b\.safetensors is not there; get the model again$"):
        sources.find(str(folder))


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "a.bin"])
def test_an_index_names_safetensors_of_its_folder(folder: Path, name: str) -> None:
    (folder / sources.WEIGHTS).rename(folder / "a.safetensors")
    with pytest.raises(SourceError, match=r"weights are needed, as model\.safetensors .*; a\.safetensors is there$"):
        sources.find(str(folder))
    (folder / sources.INDEX).write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(SourceError, match="which is no safetensors file of its folder"):
        sources.find(str(folder))
    (folder / sources.INDEX).write_text("[]")
    with pytest.raises(SourceError, match=r"index\.json cannot be read \(.+\); get it again$"):
        sources.find(str(folder))


def test_a_missing_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / sources.WEIGHTS)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / sources.WEIGHTS, {"format": "pt"})
    with pytest.raises(SourceError, match=r"tensor model\.layers\.1\.mlp\.down_proj\.weight is not in it; get the"):
        sources.run(sources.find(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_generation_config_goes_on_as_it_came(folder: Path, tmp_path: Path) -> None:
    """Some hubs' hold settings of sampling that Transformers refuses to save once one of them was changed."""
    came = {"eos_token_id": 0, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(came))
    made = sources.run(sources.find(str(folder)), tmp_path / "out")
    wrote = json.loads((made.path / "generation_config.json").read_text())
    assert wrote.items() >= (came | {"eos_token_id": [0, 2]}).items()
    assert Golden.read(made.path).stop_ids == [0, 2]


def test_licences_and_templates_go_along_and_are_in_the_identity(folder: Path, tmp_path: Path) -> None:
    seen = {sources.find(str(folder)).identity}
    (folder / "additional_chat_templates").mkdir()
    names = ["LICENSE", "NOTICE.txt", "additional_chat_templates/tool_use.jinja"]
    for name in names:
        (folder / name).write_text("{{ messages }}")
        seen.add(sources.find(str(folder)).identity)
    assert len(seen) == 4
    made = sources.run(sources.find(str(folder)), tmp_path / "out")
    (tmp_path / "next").mkdir()
    sources.copy_tokenizer(made.path, tmp_path / "next")
    for name in names:
        assert (tmp_path / "next" / name).read_text() == "{{ messages }}"


def test_a_template_that_asks_for_the_day_is_told_the_same_one_always(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from edgetune.data.formats import Row
    from edgetune.data.render import render

    template = folder / "chat_template.jinja"
    template.write_text("  {% if 1 %}{{ strftime_now('%-d %b %B %Y') }} {% endif %}\n" + template.read_text())
    made = sources.run(sources.find(str(folder)), tmp_path / "out")
    golden = Golden.read(made.path)
    assert golden.conversations[0].text.startswith("26 Jul July 2024 <|im_start|>user\nName")
    assert golden.chat_template == template.read_text()
    row = render(Row((("user", "a"), ("assistant", "b")), None, 1), AutoTokenizer.from_pretrained(made.path), [2])
    assert row.ids[:8] == tuple(golden.conversations[0].ids[:8])


def test_remote_code_is_refused(folder: Path) -> None:
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('ran')")
    with pytest.raises(SourceError, match=r"config\.json asks for remote code \(auto_map\), which is refused"):
        sources.find(str(folder))


@pytest.mark.parametrize("text", ["", "{", "\udcff"])
def test_a_config_that_cannot_be_read(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SourceError, match=r"config\.json cannot be read \(.+\)$"):
        sources.find(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"config\.json cannot be read"):
        sources.find(str(folder))


@pytest.mark.parametrize("text", ["3", "null", "[]", '"text"'])
def test_a_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json"):
        sources.find(str(folder))


def test_a_quantized_base_is_refused(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(SourceError, match="already quantized; give the 16-bit model"):
        sources.run(sources.find(str(folder)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_tokenizer_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    for name in sources.TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(SourceError) as caught:
        sources.run(sources.find(str(folder)), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.draft").exists()
