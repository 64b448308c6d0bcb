"""Any file held to the contract of a reference model: `export REFERENCE --check FILE`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgetune.artifact import Artifact
from edgetune.data.golden import Golden
from edgetune.errors import ArtifactError, SourceError
from edgetune.export import gguf, gguf_verify
from edgetune.export.check import check
from edgetune.export.gguf_child import run_child
from edgetune.recipe_export import GgufExport
from tests.conftest import Call, make_tiny_model
from tests.export.test_gguf_families import make

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here")
NAMES = ["chat template", "BOS", "stop set", "token ids", "logits", "perplexity", "end of generation"]


@pytest.fixture(scope="module")
def file(children_here: None, tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("check") / "gguf"
    gguf.run(GgufExport(type="F32"), tiny_model, out, moments=None)
    return out / gguf.FILE


@pytest.fixture(scope="module")
def folder(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime_genai")
    from tests.export.test_onnx import exported

    return exported("fp32", tiny_model, tmp_path_factory).path


def broken(path: Path, reference: Artifact, max_kl: float = 1e-6) -> dict[str, str]:
    found = check(path, reference, max_kl=max_kl)
    assert [one.name for one in found] == NAMES
    return {one.name: one.found for one in found if not one.holds}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_export_of_the_reference_holds(request: pytest.FixtureRequest, tiny_model: Artifact, kind: str) -> None:
    assert broken(request.getfixturevalue(kind), tiny_model) == {}


def test_a_reference_of_any_family_that_is_exported(tmp_path: Path) -> None:
    phi = make(tmp_path / "phi", "phi3")
    made = gguf.run(GgufExport(type="F32", imatrix=False), phi, tmp_path / "gguf", moments=None)
    assert broken(made.path / gguf.FILE, phi) == {}


def test_a_reference_that_lacks_a_tensor_is_refused(file: Path, tiny_model: Artifact, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks the tensor model\.norm\.weight; make it again$"):
        check(file, Artifact(folder, tiny_model.manifest), max_kl=0.1)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_other_weights_break_the_logits_alone(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    other = make_tiny_model(tmp_path / "other", seed=7)
    found = broken(request.getfixturevalue(kind), other)
    assert list(found) == ["logits"]  # one random model foretells a text as well as another
    assert "mean KL" in found["logits"]


def test_what_training_saw_is_held_line_by_line(file: Path, tiny_model: Artifact, tmp_path: Path) -> None:
    """A reference whose template, stop set and ids are others: each of the three is named, the logits still hold."""
    shutil.copytree(tiny_model.path, tmp_path / "model")
    golden = Golden.read(tiny_model.path)
    first, *rest = golden.texts
    shifted = first.model_copy(update={"ids": [*first.ids, 5]})
    changed = golden.model_copy(
        update={"chat_template": golden.chat_template + " ", "stop_ids": [2, 7], "texts": [shifted, *rest]}
    )
    changed.write(tmp_path / "model")
    found = broken(file, Artifact(tmp_path / "model", tiny_model.manifest))
    assert list(found) == ["chat template", "stop set", "token ids", "end of generation"]
    assert "it would run past [7]" in found["stop set"]
    assert "goes on behind the end token 7" in found["end of generation"]


@pytest.mark.parametrize(
    ("name", "says"), [("text.txt", r"neither a \.gguf file nor an ONNX folder"), ("nothing", "no such file or folder")]
)
def test_neither_a_file_nor_a_folder_of_a_runtime(tiny_model: Artifact, tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "text.txt").write_text("words")
    with pytest.raises(SourceError, match=says):
        check(tmp_path / name, tiny_model, max_kl=0.1)


def test_a_file_that_llama_cpp_cannot_load(
    tiny_model: Artifact, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a child, since a damaged file may kill the process."""
    monkeypatch.setattr(gguf_verify, "run_child", run_child)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(SourceError, match="data is not within the file bounds"):
        check(cut, tiny_model, max_kl=0.1)


def test_the_verb_says_which_line_is_broken(call: Call, file: Path, tiny_model: Artifact, tmp_path: Path) -> None:
    code, out, _ = call("export", str(tiny_model.path), "--check", str(file))
    assert (code, out.count("holds")) == (0, 7)
    other = make_tiny_model(tmp_path / "other", seed=7)
    code, out, _ = call("export", str(other.path), "--check", str(file), "--max-kl", "1e-6")
    assert (code, out.count("holds"), out.count("broken")) == (3, 6, 1)
    code, _, err = call("export", str(tiny_model.path), "--check", str(tmp_path / "no.gguf"))
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = call("export", str(tiny_model.path))
    assert (code, "give --out" in err) == (2, True)
