"""What a path is that an engine is to run: an artifact, or a file or folder that something else made.

Nothing is read out of a name: a GGUF file begins with its magic, an ONNX folder holds `genai_config.json`, a GPTQ or
Hugging Face folder a `config.json` that says which of the two it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.artifact import MANIFEST, Artifact, Store, file_digest, json_digest
from edgetune.errors import UnsupportedError, UsageError
from edgetune.gguf_header import read_header
from edgetune.quant_config import is_quantized
from edgetune.runtime.engine import ALSO_RUN_BY, ENGINE_OF_KIND
from edgetune.runtime.worker import Job

GENAI_CONFIG, MODEL_CONFIG = "genai_config.json", "config.json"


@dataclass(frozen=True)
class Found:
    """Something that can be run, and what it is."""

    path: Path  # what an engine loads: of an adapter its base
    kind: str
    digest: str
    size_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)  # of the engine's load, without which it does not run

    @property
    def engines(self) -> tuple[str, ...]:
        """Engines that run it, the one that ships it first."""
        return (ENGINE_OF_KIND[self.kind], *ALSO_RUN_BY.get(self.kind, ()))

    def job(self, name: str, engine: str, *, n_threads: int, **settings: Any) -> Job:
        return Job(
            name, self.kind, engine, self.path, self.digest, self.size_bytes, n_threads, self.settings | settings
        )


def find(path: Path) -> Found:
    """Say what a file or folder is. Raises UsageError or ArtifactError where no engine runs it."""
    if not path.exists():
        raise UsageError(f"{path} is not there; give a .gguf file or the folder of a model")
    if path.is_file():
        read_header(path)
        return Found(path, "gguf", file_digest(path), path.stat().st_size)
    if (path / MANIFEST).is_file():
        artifact = Artifact.open(path)
        kind = artifact.manifest.kind
        if kind not in ENGINE_OF_KIND:
            raise UsageError(f"{path} is of kind {kind!r}, which no engine runs; known: {', '.join(ENGINE_OF_KIND)}")
        if kind == "adapter":
            base, settings = base_of(artifact)
            return Found(base.path, kind, artifact.digest, base.size_bytes + artifact.size_bytes, settings)
        return Found(path, kind, artifact.digest, artifact.size_bytes)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    digests = {str(file.relative_to(path)): file_digest(file) for file in files}
    return Found(path, _kind(path), json_digest(digests), sum(file.stat().st_size for file in files))


def jobs(paths: Sequence[Path], engines: Sequence[str], *, n_threads: int) -> list[Job]:
    """Make a job for each path in each asked engine that runs it, else in the one that ships its kind.

    Raises UsageError where an engine was asked for and runs none of the paths.
    """
    made: list[Job] = []
    names = [path.name or path.resolve().name for path in paths]
    for path, name in zip(paths, names, strict=True):
        found, short = find(path), name if names.count(name) == 1 else str(path)
        chosen = [engine for engine in engines if engine in found.engines] or [found.engines[0]]
        for engine in chosen:
            label = f"{short} ({engine})" if len(chosen) > 1 else short
            made.append(found.job(label, engine, n_threads=n_threads))
    idle = [engine for engine in engines if engine not in {job.engine for job in made}]
    if idle:
        raise UsageError(f"engine {idle[0]!r} runs none of {', '.join(map(str, paths))}; leave it out")
    twice = [job.name for job in made if sum(other.name == job.name for other in made) > 1]
    if twice:
        raise UsageError(f"{twice[0]} was given twice; give each path once")
    return made


def base_of(adapter: Artifact) -> tuple[Artifact, dict[str, object]]:
    """Find the base of an adapter in the store that holds it, and how the engine puts them together."""
    place = adapter.path.resolve()
    base = Store(place.parent).get(next(iter(adapter.manifest.parents)))
    if base is None:
        raise UsageError(f"{adapter.path}: its base is not in {place.parent}; give an adapter where it was made")
    config = adapter.manifest.config
    four_bit = "qlora" in (config["method"], config.get("adapter")) or config.get("base_bits") == 4
    return base, {"adapter": str(place), "quantize_base": four_bit}


def _kind(folder: Path) -> str:
    if (folder / GENAI_CONFIG).is_file():
        return "onnx"
    if list(folder.glob("*.onnx")):
        raise UnsupportedError(
            f"{folder} holds an ONNX graph without {GENAI_CONFIG}, which tells how its cache is fed; make it with "
            "`edgetune export` or the onnxruntime-genai builder"
        )
    if (folder / MODEL_CONFIG).is_file():
        return "gptq" if is_quantized(folder) else "model"
    graphs = list(folder.glob("*.gguf"))
    if len(graphs) == 1:
        read_header(graphs[0])
        return "gguf"
    if graphs:
        raise UsageError(f"{folder} holds {len(graphs)} .gguf files; name one of them")
    raise UsageError(f"{folder} holds no model: neither {MODEL_CONFIG} nor {GENAI_CONFIG} nor a .gguf file is in it")
