"""Exporters on a disk that fills while they write: a real one of 16 MiB, most of which a neighbour takes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from edgetune.artifact import Artifact
from edgetune.export import gguf, onnx
from tests.conftest import Call

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")
EXPORTS = {
    "gguf F32": (gguf, ["--type", "F32"]),
    "gguf Q8_0": (gguf, ["--type", "Q8_0"]),  # written by a child
    "onnx fp32": (onnx, ["--format", "onnx", "--builder", "own", "--precision", "fp32"]),
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may make a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def crowd(patch: pytest.MonkeyPatch, stage: ModuleType, disk: Path, left: int) -> None:
    """Let a neighbour take all but `left` bytes once the stage has seen that there is room."""
    ask = stage.require_space

    def seen_then_taken(folder: Path, n_bytes: int) -> None:
        ask(folder, n_bytes)
        (disk / "neighbour").write_bytes(bytes(shutil.disk_usage(disk).free - left))

    patch.setattr(stage, "require_space", seen_then_taken)


@pytest.mark.parametrize("share", [0.1, 0.98])  # of what is written: while weights are, and near the end
@pytest.mark.parametrize("name", EXPORTS)
def test_one_line_nothing_left_and_with_room_it_works(
    tiny_model_wide: Artifact, tmp_path: Path, disk: Path, call: Call, name: str, share: float
) -> None:
    stage, flags = EXPORTS[name]
    source, store = str(tiny_model_wide.path), ["--store", str(tmp_path / "store")]
    code, _, said = call("export", source, "--out", str(tmp_path / "roomy"), *flags, *store)
    assert code == 0, said
    wanted = Artifact.open(tmp_path / "roomy")
    with pytest.MonkeyPatch.context() as patch:
        crowd(patch, stage, disk, int(share * wanted.size_bytes))
        code, _, said = call("export", source, "--out", str(disk / "out"), *flags, *store)
    lines = [line for line in said.splitlines() if line.startswith("edgetune:")]
    assert (code, lines) == (2, [f"edgetune: no space left on the disk of {disk} while writing out"]), said
    assert "Traceback" not in said
    assert {path.name for path in disk.rglob("*") if path.is_file()} <= {"neighbour", ".out.lock"}
    (disk / "neighbour").unlink()
    code, _, said = call("export", source, "--out", str(disk / "out"), *flags, *store)
    assert code == 0, said
    made = Artifact.open(disk / "out")
    made.verify()
    assert made.manifest.files == wanted.manifest.files
