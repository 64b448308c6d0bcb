"""Base models: a folder, a GGUF file or a package becomes the same artifact; damage is one line."""

from __future__ import annotations

import json
import random
import shutil
import struct
import tracemalloc
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from edgetune import sources
from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.errors import SourceError
from edgetune.gguf_header import read_header
from edgetune.recipe_export import GgufExport


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


def header_end(file: Path) -> int:
    from gguf import GGUFReader

    return int(GGUFReader(file).data_offset)


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


def read_or_refuse(file: Path) -> bool:
    """Read a header and its config; only success or a one-line SourceError are answers."""
    try:
        sources.gguf_config(read_header(file), file)
    except SourceError as error:
        assert "\n" not in str(error), repr(str(error))  # noqa: PT017
        assert str(file) in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize("seed", range(20))
def test_a_gguf_file_cut_anywhere_is_refused(gguf_file: Path, tmp_path: Path, seed: int) -> None:
    whole = gguf_file.read_bytes()
    rng = random.Random(seed)
    limit = header_end(gguf_file) if seed % 2 else len(whole)
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: rng.randrange(limit - 1)])
    with pytest.raises(SourceError, match=r"cut\.gguf: truncated or damaged GGUF file \(.+\); get it again$"):
        read_header(file)
    with pytest.raises(SourceError):
        sources.find(str(file))


@pytest.mark.parametrize("seed", range(8))
def test_flipped_header_bytes_are_refused_or_read_and_never_cost_memory(
    gguf_file: Path, tmp_path: Path, seed: int
) -> None:
    whole, end = gguf_file.read_bytes(), header_end(gguf_file)
    rng = random.Random(seed)
    file = tmp_path / "flipped.gguf"
    tracemalloc.start()
    try:
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 1, 4, 16])):
                data[rng.randrange(4, rng.choice([24, 400, end]))] = rng.randrange(256)
            file.write_bytes(data)
            tracemalloc.reset_peak()
            start = tracemalloc.get_traced_memory()[0]
            read_or_refuse(file)
            assert tracemalloc.get_traced_memory()[1] - start < 4 * len(whole) + 2**20
    finally:
        tracemalloc.stop()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, keys: bytes = b"", n_keys: int = 0, tensors: bytes = b"", n_tensors: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + keys + tensors


HUGE = 2**63
BAD_HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "4 bytes wanted at byte 0, the file ends at 0"),
    "not GGUF": (b"PK\x03\x04" + b"\0" * 100, "does not begin with 'GGUF'"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + b"\0" * 16, "version 50331648, 2 and 3 are known"),
    "version 1": (header(version=1), "version 1"),
    "too many tensors": (header(n_tensors=HUGE), "9223372036854775808 tensors are not plausible"),
    "too many keys": (header(n_keys=2**24 + 1), "16777217 keys are not plausible"),
    "a string longer than the file": (header(keys=struct.pack("<Q", HUGE), n_keys=1), "bytes wanted"),
    "a key that is not UTF-8": (header(keys=struct.pack("<Q", 1) + b"\xff" + b"\0" * 8, n_keys=1), "utf-8"),
    "unknown value type": (header(keys=text("k") + struct.pack("<I", 77), n_keys=1), "unknown value type 77"),
    "array longer than the file": (
        header(keys=text("k") + struct.pack("<IIQ", 9, 4, 2**24), n_keys=1), "67108864 bytes wanted",
    ),
    "implausible array": (header(keys=text("k") + struct.pack("<IIQ", 9, 8, HUGE), n_keys=1), "array items are not"),
    "array of arrays": (header(keys=text("k") + struct.pack("<IIQ", 9, 9, 1), n_keys=1), "unknown array type 9"),
    "alignment 0": (header(keys=text("general.alignment") + struct.pack("<II", 4, 0), n_keys=1), "alignment 0"),
    "alignment a text": (
        header(keys=text("general.alignment") + struct.pack("<I", 8) + text("x"), n_keys=1), "alignment x",
    ),
    "no dimensions": (header(tensors=text("t") + struct.pack("<I", 0), n_tensors=1), "tensor t has 0 dimensions"),
    "many dimensions": (header(tensors=text("t") + struct.pack("<I", 2**31), n_tensors=1), "2147483648 dimensions"),
    "unknown ggml type": (
        header(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 999, 0), n_tensors=1), "999 is not a valid",
    ),
    "behind the end": (
        header(tensors=text("t") + struct.pack("<IQIQ", 1, 32, 0, 0), n_tensors=1), "ends behind the end of the file",
    ),
    "a tensor of 2^256 bytes": (
        header(tensors=text("t") + struct.pack("<IQQQQIQ", 4, *[HUGE] * 4, 0, 0), n_tensors=1), "ends behind the end",
    ),
    "an offset behind the end": (
        header(tensors=text("t") + struct.pack("<IQIQ", 1, 1, 0, HUGE), n_tensors=1), "ends behind the end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_each_damage_to_a_header_has_its_reason(tmp_path: Path, case: str) -> None:
    data, says = BAD_HEADERS[case]
    file = tmp_path / "x.gguf"
    file.write_bytes(data)
    with pytest.raises(SourceError, match=says) as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


def test_a_header_of_another_architecture_or_of_none(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(header(keys=text("general.architecture") + struct.pack("<I", 8) + text("bert"), n_keys=1))
    with pytest.raises(SourceError, match=r"architecture 'bert'; known: llama, qwen2, qwen3"):
        sources.gguf_config(read_header(file), file)
    file.write_bytes(header())
    with pytest.raises(SourceError, match="architecture None"):
        sources.gguf_config(read_header(file), file)
    file.write_bytes(header(keys=text("general.architecture") + struct.pack("<I", 8) + text("llama"), n_keys=1))
    with pytest.raises(SourceError, match=r"the GGUF header lacks what llama needs \('llama.attention.head_count'\)"):
        sources.gguf_config(read_header(file), file)


def test_an_infinite_number_of_heads_is_refused(tmp_path: Path) -> None:
    keys = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    keys += text("llama.attention.head_count") + struct.pack("<If", 6, float("inf"))
    file = tmp_path / "x.gguf"
    file.write_bytes(header(keys=keys, n_keys=2))
    with pytest.raises(SourceError):
        sources.gguf_config(read_header(file), file)
