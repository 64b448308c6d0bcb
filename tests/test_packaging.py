"""The wheel holds what it must and nothing else, the pins are whole, and no file names a machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MUST_HOLD = (
    "edgetune/cli.py",
    "edgetune/compress/gptq.py",
    "edgetune/data/golden.py",
    "edgetune/data/general_probe.jsonl",
    "edgetune/export/gguf.py",
    "edgetune/runtime/engines/llama_engine.py",
    "edgetune/runtime/report/page.html.jinja",
    "edgetune/runtime/report/page.css",
    "edgetune/runtime/report/page.js",
)
# Paths of a machine and hosts of registries have no place in what we publish.
MACHINE = re.compile(r"/(home|root|tmp|work|Users)/|pypi\.org|pythonhosted|index-url", re.I)
PUBLISHED = (
    "recipes/",
    "docs/",
    "README.md",
    "scripts/",
    "edgetune/",
    "export/",
    "runtime/",
    "benchmarks/",
    "Makefile",
)


def tracked() -> list[str]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    ended = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in ended.stdout.split("\0") if name and (ROOT / name).exists()]


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return found


def normalised(requirement: str) -> str:
    """Give the name of a requirement as PEP 503 writes it."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None, requirement
    return re.sub(r"[-_.]+", "-", name.group()).lower()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel that is built from a copy of the tracked tree."""
    folder = tmp_path_factory.mktemp("tree")
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    assert (folder / "edgetune" / "export").is_symlink()
    out = tmp_path_factory.mktemp("wheel")
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (made,) = out.glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        return archive.namelist()


def test_edgetune_is_the_only_top_level_name(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel} == {"edgetune", f"edgetune-{project()['version']}.dist-info"}


@pytest.mark.parametrize("name", MUST_HOLD)
def test_the_wheel_holds(wheel: list[str], name: str) -> None:
    assert name in wheel


def test_the_wheel_holds_every_module_and_nothing_beside(wheel: list[str]) -> None:
    code = [name for name in wheel if not name.split("/")[0].endswith(".dist-info")]
    strays = [name for name in code if re.search(r"tests?/|benchmarks|calib_data|recipes|\.jsonl$|\.pyc$", name)]
    assert strays == ["edgetune/data/general_probe.jsonl"]
    ours = {
        name for name in tracked() if name.endswith(".py") and name.startswith(("edgetune/", "export/", "runtime/"))
    }
    expected = {name if name.startswith("edgetune/") else f"edgetune/{name}" for name in ours}
    assert {name for name in code if name.endswith(".py")} == expected


def test_the_licence_travels(wheel: list[str]) -> None:
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in wheel)


def test_every_direct_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {normalised(line): line for line in lines if line.strip() and not line.startswith("#")}
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=\s]+", line) for line in pins.values())
    assert len(pins) == len([line for line in lines if line.strip() and not line.startswith("#")])
    extras = project()["optional-dependencies"]
    named = project()["dependencies"] + [requirement for extra in extras.values() for requirement in extra]
    wanted = {normalised(requirement) for requirement in named} - {"edgetune"}
    assert wanted - pins.keys() == set()


def test_no_published_file_names_a_machine_or_a_registry() -> None:
    found = []
    for name in tracked():
        if not name.startswith(PUBLISHED) or name.startswith("benchmarks/results/") or (ROOT / name).is_symlink():
            continue
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if MACHINE.search(line):
                found.append(f"{name}:{number}: {line.strip()[:100]}")
    assert found == []


def test_what_git_tracks_is_no_output() -> None:
    assert not [name for name in tracked() if re.search(r"__pycache__|\.pyc$|^runs/|\.safetensors$|\.gguf$", name)]
