"""Peers of the benchmarks, each pinned, made once in the user's cache and used again: `python benchmarks/peers.py`.

`llama-bench`, `llama-imatrix` and `llama-quantize` come from the source distribution of the llama-cpp-python that is
bound, compiled with the switches that `scripts/install.py` chose for this machine, so that they are of the very engine
that edgetune runs. A compile that was stopped goes on where it was. gptqmodel, transformers with it, and transformers
with compressed-tensors get environments of their own beside ours; so does sentencepiece, which llama.cpp's converter
reads tokenizers with.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from install import cmake_flags  # noqa: E402

GPTQMODEL = [
    "gptqmodel==7.7.0",
    "defuser==0.0.28",
    "device-smi==0.5.7",
    "logbar==0.4.15",
    "pypcre==0.6.4",
    "tokenicer==0.0.14",
    "torchao==0.18.0",
]
OPTIMUM = "optimum==2.3.0"  # through which transformers asks gptqmodel for its layers
COMPRESSED_TENSORS = ["compressed-tensors==0.20.1", "loguru==0.7.3"]
SENTENCEPIECE = ["sentencepiece==0.2.3"]
LLAMA_OPTIONS = ["-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DGGML_CCACHE=OFF"]


def cache() -> Path:
    """Where peers live, outside of the checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgetune" / "peers"


def llama_bench(jobs: int = 2) -> Path:
    """Give the llama-bench of the llama-cpp-python that is installed, compiling it where it is not there."""
    return llama_tool("llama-bench", jobs)


def llama_tool(name: str, jobs: int = 2) -> Path:
    """Give a tool of the llama-cpp-python that is installed, compiling it where it is not there."""
    version = metadata.version("llama-cpp-python")
    flags = [*cmake_flags(), *LLAMA_OPTIONS]
    key = hashlib.sha256(repr([version, flags]).encode()).hexdigest()[:12]
    folder = cache() / f"llama-bench-{version}-{key}"  # one build for all tools
    made, done = folder / "build" / "bin" / name, folder / ("done" if name == "llama-bench" else f"done-{name}")
    if done.is_file() and made.is_file():
        return made
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            sys.exit(f"{tool} is needed for {name}; on Debian: apt-get install cmake g++")
    source = llama_source(version) / "vendor" / "llama.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    _run(["cmake", "-S", source, "-B", folder / "build", "-DCMAKE_BUILD_TYPE=Release", *flags])
    _run(["cmake", "--build", folder / "build", "--target", name, "-j", str(jobs)])
    done.write_text(version + "\n", encoding="utf-8")
    return made


def gptqmodel() -> Path:
    """Give the Python of an environment with gptqmodel, made where it is not there.

    It asks for a later torch than ours, but runs on this one.
    """
    return environment("gptqmodel", GPTQMODEL)


def gptqmodel_reader() -> Path:
    """Give the Python of an environment in which transformers loads checkpoints with gptqmodel."""
    return environment("gptqmodel-optimum", [*GPTQMODEL, OPTIMUM])


def compressed_tensors() -> Path:
    """Give the Python of an environment in which transformers loads checkpoints with compressed-tensors."""
    return environment("compressed-tensors", COMPRESSED_TENSORS)


def sentencepiece() -> Path:
    """Give the Python of an environment in which llama.cpp's converter reads SentencePiece's files."""
    return environment("sentencepiece", SENTENCEPIECE)


def environment(name: str, packages: list[str]) -> Path:
    """Give the Python of an environment with pinned packages, made where it is not there; one process makes it.

    It reads torch and transformers from the environment that runs this, so both sides compute with the same ones. What
    a peer needs beside them is its own.
    """
    versions = f"{packages[0].rpartition('=')[2]}-torch-{metadata.version('torch')}"
    folder = cache() / f"{name}-{versions}"
    python = folder / "bin" / "python"
    cache().mkdir(parents=True, exist_ok=True)
    with (cache() / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / "done").is_file() and python.is_file():
            return python
        _run([sys.executable, "-m", "venv", "--clear", folder])
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        _run([python, "-m", "pip", "install", "-q", "--no-deps", *packages])
        (folder / "done").write_text(versions + "\n", encoding="utf-8")
    return python


def llama_source(version: str) -> Path:
    """Give the unpacked source distribution of a llama-cpp-python, from the package index where it is not there."""
    folder = cache() / f"llama_cpp_python-{version}"
    if folder.is_dir():
        return folder
    parts = cache() / f".sdist.{os.getpid()}"
    asked = f"llama-cpp-python=={version}"
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-binary",
            "llama-cpp-python",
            "--no-deps",
            asked,
            "-d",
            parts,
        ]
    )
    (archive,) = parts.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(parts, filter="data")
    (parts / f"llama_cpp_python-{version}").rename(folder)
    shutil.rmtree(parts)
    return folder


def _run(command: list[str | Path]) -> None:
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        sys.exit(f"failed: {' '.join(map(str, command))}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for tool in ("llama-bench", "llama-imatrix", "llama-quantize"):
        print(llama_tool(tool))
    for made in (gptqmodel, gptqmodel_reader, compressed_tensors, sentencepiece):
        print(made())
