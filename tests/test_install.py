"""scripts/install.py with a pip that only notes what it was asked: which wheel is compiled, and which is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
AMX_CPU = "fpu avx avx2 fma f16c bmi2 avx_vnni avx512f avx512vbmi avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16"
PIP = """#!{python}
import json, os, pathlib, sys
seen = {{name: os.environ.get(name) for name in ("CMAKE_ARGS", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}}
with open({log!r}, "a") as stream:
    stream.write(json.dumps([sys.argv[1:], seen]) + "\\n")
if "wheel" in sys.argv and "-w" in sys.argv:
    folder = pathlib.Path(sys.argv[sys.argv.index("-w") + 1])
    folder.mkdir(parents=True)
    (folder / "llama_cpp_python-0.3.36-py3-none-any.whl").write_text(os.environ["CMAKE_ARGS"])
sys.exit({code})
"""


class Desk:
    """The installer, a folder for environments, and the pip in one of them."""

    def __init__(self, folder: Path, module: ModuleType) -> None:
        self.folder, self.module = folder, module
        self.venv = folder / "venv"
        self.cpuinfo = folder / "cpuinfo"
        self.add_pip(self.venv)
        self.set_cpu("fpu avx avx2")

    def add_pip(self, venv: Path, code: int = 0) -> None:
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        self.program(
            venv / "bin" / "python", PIP.format(python=sys.executable, log=str(self.folder / "log"), code=code)
        )
        self.program(venv / "bin" / "pip", "#!/bin/sh\n")

    def set_cpu(self, flags: str) -> None:
        self.cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")

    def program(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def install(
        self, extras: list[str] | None = None, *, rebuild: bool = False
    ) -> list[tuple[list[str], dict[str, Any]]]:
        """Install, and give what pip was asked for: arguments after `-m pip`, and what it saw of its settings."""
        log = self.folder / "log"
        log.write_text("")
        self.module.install(self.venv, extras or ["demo"], rebuild=rebuild)
        asked = [json.loads(line) for line in log.read_text().splitlines()]
        return [([a for a in arguments if a not in ("-m", "pip", "-q")][1:], seen) for arguments, seen in asked]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = Desk(tmp_path, module)
    monkeypatch.setattr(module, "CPUINFO", made.cpuinfo)
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made.program(tmp_path / "tools" / "c++", "#!/bin/sh\necho c++ 12.2\n")
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    return made


def wheels(asked: list[tuple[list[str], dict[str, Any]]]) -> list[Path]:
    """Give the wheels that were installed, each of which must replace one of the same version."""
    found = []
    for arguments, _ in asked:
        if arguments[0] == "install" and arguments[-1].endswith(".whl"):
            assert arguments[1:-1] == ["--force-reinstall", "--no-deps"]
            found.append(Path(arguments[-1]))
    return found


def compiled(asked: list[tuple[list[str], dict[str, Any]]]) -> list[str]:
    """Give the flags of each compilation."""
    return [seen["CMAKE_ARGS"] for arguments, seen in asked if arguments[0] == "wheel"]


def test_a_first_install_compiles_and_a_second_does_nothing(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    asked = desk.install()
    assert [arguments[0] for arguments, _ in asked] == ["install", "wheel", "install", "install", "install"]
    assert len(compiled(asked)) == 1
    assert asked[-1][0] == ["install", "-e", f"{ROOT}[demo]"]
    assert desk.install() == []
    assert "complete" in capsys.readouterr().out


def test_a_rebuilt_wheel_replaces_the_installed_one_of_the_same_version(desk: Desk) -> None:
    desk.install()
    asked = desk.install(rebuild=True)
    assert len(compiled(asked)) == 1
    assert len(wheels(asked)) == 1


def test_other_flags_are_another_wheel_which_replaces_the_installed_one(desk: Desk) -> None:
    (first,) = wheels(desk.install())
    desk.set_cpu("fpu avx avx2 avx512f")
    asked = desk.install()
    (second,) = wheels(asked)
    assert first.name == second.name
    assert first.parent != second.parent
    assert "-DGGML_AVX512=ON" in second.read_text()
    desk.set_cpu("fpu avx avx2")
    asked = desk.install()
    assert compiled(asked) == []  # it is in the cache
    assert wheels(asked) == [first]


def test_versions_are_pinned_for_what_is_built_too(desk: Desk) -> None:
    pins = (ROOT / "constraints.txt").as_uri()
    for _, seen in desk.install():
        assert seen["PIP_CONSTRAINT"] == seen["PIP_BUILD_CONSTRAINT"] == pins
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"cmake", "ninja", "scikit-build-core", "setuptools"} <= pinned


@pytest.mark.parametrize("flags", ["fpu sse2", "fpu avx avx2 fma f16c bmi2", AMX_CPU])
def test_amx_is_never_compiled_and_all_else_is_what_the_processor_has(desk: Desk, flags: str) -> None:
    desk.set_cpu(flags)
    found = desk.module.cmake_flags()
    assert "-DGGML_NATIVE=OFF" in found  # it would bring AMX back
    assert not [flag for flag in found if "AMX" in flag]
    have = flags.split()
    for flag, switch in desk.module.X86_SWITCHES.items():
        assert f"-D{switch}={'ON' if flag in have else 'OFF'}" in found


def test_cuda_where_its_compiler_and_a_gpu_are(desk: Desk) -> None:
    desk.set_cpu(AMX_CPU)
    plain = desk.module.cmake_flags()
    tools = desk.folder / "tools"
    desk.program(tools / "nvcc", "#!/bin/sh\n")
    assert desk.module.cmake_flags() == plain  # a build for a GPU that is not there
    desk.program(tools / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert desk.module.cmake_flags() == plain
    desk.program(tools / "nvidia-smi", "#!/bin/sh\n")
    assert desk.module.cmake_flags() == ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native", *plain]
    (tools / "nvcc").unlink()
    assert desk.module.cmake_flags() == plain


def test_a_processor_of_another_kind_is_compiled_as_it_is(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.module.platform, "machine", lambda: "aarch64")
    assert desk.module.cmake_flags() == ["-DGGML_NATIVE=ON"]


def test_a_failed_pip_leaves_nothing_that_looks_complete(desk: Desk) -> None:
    desk.install()
    desk.add_pip(desk.venv, code=1)
    with pytest.raises(SystemExit, match=r"failed: .*pip"):
        desk.install(rebuild=True)
    desk.add_pip(desk.venv)
    assert len(wheels(desk.install())) == 1


def test_what_is_missing_on_a_bare_machine_is_named(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk.folder / "tools" / "c++").unlink()
    with pytest.raises(SystemExit, match=r"a C\+\+ compiler is needed .* apt-get install g\+\+ make"):
        desk.install()
    bare = desk.folder / "bare"
    monkeypatch.setattr(desk.module.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="it has no ensurepip; on Debian: apt-get install python3-venv"):
        desk.module.install(bare, ["demo"], rebuild=False)
    assert not bare.exists()


def test_an_environment_without_pip_is_completed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    (desk.venv / "bin" / "pip").unlink()
    made: list[Path] = []
    monkeypatch.setattr(desk.module.venv, "create", lambda folder, with_pip: made.append(folder))
    desk.install()
    assert made == [desk.venv]
    assert os.access(desk.venv / "bin" / "python", os.X_OK)
