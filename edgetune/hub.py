"""Downloads a model from a Hugging Face hub, the weights only where they are wanted."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from edgetune.errors import DiskSpaceError, SourceError, is_full_disk
from edgetune.progress import Report

SMALL, LICENCES = ("*.json", "*.jinja", "*.txt", "tokenizer.model"), ("LICENSE*", "NOTICE*")
WEIGHTS = "*.safetensors"
MB = 10**6


@dataclass(frozen=True)
class Snapshot:
    """A folder in the hub's cache, and the names of all files of the repository where they are known."""

    folder: Path
    names: list[str] | None


def is_hub_id(base: str) -> bool:
    """Tell whether a base is an id on a hub, org/model, as far as its writing tells."""
    return base.count("/") == 1 and not base.startswith((".", "/", "~", "pkg:")) and not base.endswith(".gguf")


def download(base: str, revision: str | None, *, weights: bool, progress: Report) -> Snapshot:
    """Download a model; without `weights` what says what it is. Raises SourceError, DiskSpaceError."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HfHubHTTPError, IncompleteSnapshotError

    patterns = [*SMALL, WEIGHTS] if weights else [*SMALL]
    ask = partial(snapshot_download, base, revision=revision, tqdm_class=_bars(progress))
    try:
        try:
            folder = ask(allow_patterns=[*patterns, *LICENCES])
        except IncompleteSnapshotError:  # no network, and a cache that was filled without licences
            folder = ask(allow_patterns=patterns)
    except (HfHubHTTPError, OSError, ValueError) as error:
        if is_full_disk(error):
            raise DiskSpaceError(f"base {base!r}: no space left on the disk of the hub's cache; make room") from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SourceError(f"base {base!r}: no such folder, and the hub did not give it ({first})") from error
    try:
        names = [file.path for file in get_cached_repo_tree(base, revision=revision)]
    except CachedRepoTreeNotFoundError:  # the cache was filled by an older library
        names = None
    return Snapshot(Path(folder), names)


def _bars(progress: Report) -> Any:
    """Give the class of bars that the hub's library fills; those of bytes are told to `progress`, in MB."""
    from tqdm import tqdm

    bars: list[Any] = []

    class Bar(tqdm):  # type: ignore[misc]
        """One of several: bytes received, bytes written, files. Whichever counts bytes and is ahead is told."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})
            if self.unit == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> bool | None:
            moved: bool | None = super().update(n)
            if self in bars and n:
                done, total = (max(getattr(bar, part) or 0 for bar in bars) for part in ("n", "total"))
                progress(int(done // MB), int(max(done, total) // MB), "MB")
            return moved

    return Bar
