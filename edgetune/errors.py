"""The error tree.

EdgetuneError                 base of everything that edgetune raises on purpose
├── UsageError                the user's input is wrong: exit code 2
│   ├── RecipeError           a recipe key or value
│   ├── DataError             a training, held-out or calibration row
│   ├── SourceError           a base model that cannot be read or is refused
│   ├── UnsupportedError      an architecture x method x format that cannot be done
│   └── MissingBackendError   an optional package that is not installed
└── StageError                something failed while working: exit code 1
    ├── ArtifactError         a folder that is not a whole artifact, or is damaged: exit code 2
    ├── ContractError         an export that broke its contract and was removed
    ├── DiskSpaceError        the disk is full or will be: exit code 2
    └── EngineError           an engine crashed, hung or gave a wrong answer

A message says what was asked, what was found and what to do, in one line.
"""

from __future__ import annotations

import errno
import re

# What a full disk is called by those who raise no OSError with its number: safetensors and tokenizers; torch and
# llama.cpp, which write through C++ streams; numpy.
_FULL_DISK = re.compile(
    r"no space left|disk quota exceeded|basic_ios::clear|unexpected pos \d+ vs|\d+ requested and \d+ written", re.I
)


class EdgetuneError(Exception):
    """Base of every error that edgetune raises on purpose."""

    exit_code = 1


class UsageError(EdgetuneError):
    """The user's input is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe key or value is wrong."""


class DataError(UsageError):
    """A data row or file is wrong."""


class SourceError(UsageError):
    """A base model cannot be read, or is refused."""


class UnsupportedError(UsageError):
    """A combination of architecture, method and format that cannot be done."""


class MissingBackendError(UsageError):
    """An optional package is not installed."""


class StageError(EdgetuneError):
    """A stage failed while working."""


class ArtifactError(StageError):
    """A folder is not a whole artifact, or is damaged."""

    exit_code = 2


class ContractError(StageError):
    """An export broke its contract and was removed."""


class DiskSpaceError(StageError):
    """The disk is full, or would be."""

    exit_code = 2


class EngineError(StageError):
    """An engine crashed, hung or gave a wrong answer."""


def is_full_disk(error: BaseException) -> bool:
    """Tell whether a full disk is what an error, or one that it came from, speaks of: by number or in words."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        if isinstance(found, DiskSpaceError) or _FULL_DISK.search(str(found)):
            return True
        if isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        seen.append(found)
        found = found.__cause__ or found.__context__
    return False
