"""Artifact folders: a manifest, digests, atomic writing, and the content-addressed store.

An artifact is a folder with `manifest.json`. It is written beside its place and renamed into it, so a folder that
exists was whole when it was made. Opening one compares sizes; only `Artifact.verify` reads the files and compares
digests. Manifests hold no time of day: the same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from edgetune.errors import ArtifactError, DiskSpaceError, is_full_disk

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
Kind = Literal["model", "adapter", "gptq", "gguf", "gguf-adapter", "onnx", "onnx-adapter", "tensorrt", "evidence"]


class FileEntry(BaseModel):
    """Digest and size in bytes of one file of an artifact."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    size: int


class Manifest(BaseModel):
    """What an artifact is, what it was made from and by what."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    kind: Kind
    identity: str
    stage: str  # name/version, such as "compress.gptq/1"
    config: dict[str, Any]
    parents: dict[str, str]  # identity -> digest
    sources: dict[str, str]  # what the stage read beside its parents: name -> digest
    files: dict[str, FileEntry]
    versions: dict[str, str]
    seed: int | None = None
    calibration: str | None = None  # digest of the token ids used
    scheme: dict[str, Any] | None = None
    fallbacks: list[str] = []
    notes: dict[str, Any] = {}  # what the stage proved or measured, deterministic


@dataclass(frozen=True)
class Artifact:
    """An artifact folder with all its files."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path) -> Artifact:
        """Read the manifest and check that each file is there in its size, and within the folder.

        Raises ArtifactError where the folder is no artifact or a file is missing or cut. A file of the right size is
        not read, so that changed bytes are not seen here.
        """
        try:
            manifest = Manifest.model_validate_json((path / MANIFEST).read_bytes())
        except OSError as error:
            raise ArtifactError(f"{path} is not an artifact: {MANIFEST} cannot be read ({error.strerror})") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path / MANIFEST} is damaged at {where or 'its start'}: {first['msg']}") from error
        for name, entry in manifest.files.items():
            file = path / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{path / MANIFEST} names {name[:80]!r}, which lies outside of its folder")
            size = file.stat().st_size if file.is_file() else None
            if size != entry.size:
                raise ArtifactError(f"{file} has {size} bytes, its manifest says {entry.size}; make it again")
        return cls(path, manifest)

    def verify(self) -> None:
        """Read every file and compare its digest. Raises ArtifactError at the first difference."""
        for name, entry in self.manifest.files.items():
            if file_digest(self.path / name) != entry.sha256:
                raise ArtifactError(f"{self.path / name} is not the file that was made: its sha256 differs")

    @property
    def identity(self) -> str:
        return self.manifest.identity

    @property
    def digest(self) -> str:
        """Digest of the manifest, and through it of every file."""
        return file_digest(self.path / MANIFEST)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size for entry in self.manifest.files.values())


@dataclass
class Draft:
    """An artifact while it is written. Files go under `path`; `work` survives a kill and holds checkpoints."""

    path: Path
    work: Path
    seed: int | None = None
    calibration: str | None = None
    scheme: dict[str, Any] | None = None
    fallbacks: list[str] = field(default_factory=list)
    notes: dict[str, Any] = field(default_factory=dict)
    _artifact: Artifact | None = None

    @property
    def artifact(self) -> Artifact:
        """The finished artifact, after the `with` block."""
        assert self._artifact is not None, "a draft has no artifact before its block ends"
        return self._artifact


def file_digest(path: Path) -> str:
    """Give the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Give the sha256 of a JSON value in its canonical form, in hex."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def list_digest(values: Iterable[Any]) -> str:
    """Give the `json_digest` of a list whose values need not be in memory together."""
    found = hashlib.sha256(b"[")
    for index, value in enumerate(values):
        found.update((b"," if index else b"") + _canonical(value))
    found.update(b"]")
    return found.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def identity(
    stage: str, config: dict[str, Any], parents: Sequence[str] = (), sources: dict[str, str] | None = None
) -> str:
    """Give the identity of what a stage would make: known before it runs."""
    return json_digest({"stage": stage, "config": config, "parents": list(parents), "sources": sources or {}})


@contextmanager
def draft(
    out: Path,
    *,
    kind: Kind,
    stage: str,
    config: dict[str, Any],
    parents: Sequence[Artifact] = (),
    sources: dict[str, str] | None = None,
    versions: dict[str, str] | None = None,
) -> Iterator[Draft]:
    """Write an artifact beside `out` and rename it into place when the block ends well.

    A block that raises leaves nothing but its `work` folder. Raises DiskSpaceError where the disk is full
    and ArtifactError where `out` already holds something else.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    made = identity(stage, config, [p.identity for p in parents], sources)
    with FileLock(out.parent / f".{out.name}.lock"):
        path, work = out.parent / f".{out.name}.draft", out.parent / f".{out.name}.work"
        shutil.rmtree(path, ignore_errors=True)
        pending = Draft(path, work)
        try:
            path.mkdir()
            work.mkdir(exist_ok=True)
            yield pending
            manifest = Manifest(
                kind=kind, identity=made, stage=stage, config=config, parents={p.identity: p.digest for p in parents},
                sources=sources or {}, files=_entries(path), versions=versions or {}, seed=pending.seed,
                calibration=pending.calibration, scheme=pending.scheme, fallbacks=pending.fallbacks,
                notes=pending.notes,
            )  # fmt: skip
            write_text(path / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
            _settle(path, out, made)
        except BaseException as error:
            shutil.rmtree(path, ignore_errors=True)
            if isinstance(error, Exception) and not isinstance(error, DiskSpaceError) and is_full_disk(error):
                raise DiskSpaceError(f"no space left on the disk of {out.parent} while writing {out.name}") from error
            raise
        shutil.rmtree(work, ignore_errors=True)
        pending._artifact = Artifact.open(out)


def _entries(path: Path) -> dict[str, FileEntry]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    return {
        str(file.relative_to(path)): FileEntry(sha256=file_digest(file), size=file.stat().st_size) for file in files
    }


def _settle(path: Path, out: Path, made: str) -> None:
    """Rename a finished draft into place; one that is already there with the same identity wins."""
    if out.exists():
        if Artifact.open(out).identity != made:
            raise ArtifactError(f"{out} already holds another artifact; choose another folder or remove it")
        shutil.rmtree(path)
        return
    path.rename(out)
    folder = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise DiskSpaceError where the disk of `folder` has less than `n_bytes` free."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < n_bytes:
        raise DiskSpaceError(
            f"{n_bytes / 2**20:.0f} MiB are needed below {folder}, {free / 2**20:.0f} MiB are free; make room"
        )


@dataclass(frozen=True)
class Store:
    """Artifacts by identity, one folder each, shared by all runs that name the same root."""

    root: Path

    def place(self, made: str) -> Path:
        return self.root / made[:20]

    def get(self, made: str) -> Artifact | None:
        """Give the artifact of that identity if it is there and its files have their sizes, else None."""
        path = self.place(made)
        if not path.exists():
            return None
        try:
            found = Artifact.open(path)
        except ArtifactError:
            return None
        return found if found.identity == made else None

    def forget(self, made: str) -> None:
        """Remove what has that identity, under the same lock under which it is made."""
        with FileLock(self.root / f".{made[:20]}.once.lock"):
            if self.get(made) is not None:
                shutil.rmtree(self.place(made))

    def once(self, made: str, make: Callable[[Path], Artifact]) -> tuple[Artifact, bool]:
        """Give the artifact of an identity, making it where it is missing; the flag says that it was made now.

        A second process that wants the same one waits for the first. One that lacks a file, or has one of another size,
        is made again; digests are not compared, which would read gigabytes at each hit.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / f".{made[:20]}.once.lock"):
            found = self.get(made)
            if found is not None:
                return found, False
            place = self.place(made)
            if place.exists():
                shutil.rmtree(place)
            result = make(place)
            if result.identity != made:
                raise ArtifactError(f"{place}: planned identity {made[:12]}, made {result.identity[:12]}")
            return result, True
