"""Lets the C library keep what a training step frees: the next step asks for the same hundred megabytes again.

glibc gives large blocks back to the kernel, which must clear each page anew when it is touched: 25,000 page faults and
a tenth of a second of system time in a step of 8 short rows of a 135M model.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of mallopt(3)
_KEEP, _USUAL_TRIM, _USUAL_MMAPS = 2**31 - 1, 128 * 1024, 65536


def give_back() -> None:
    """Give what is free back: to the kernel (glibc only), and a GPU's to what else runs on it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    torch = sys.modules.get("torch")  # a plan loads none
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def resident_bytes() -> int | None:
    """Give what this process has in memory, where the kernel tells (Linux)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block freed memory stays with the process; afterwards what is free goes back. glibc only."""
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_TRIM_THRESHOLD, _KEEP)
    libc.mallopt(_MMAP_MAX, 0)
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _USUAL_TRIM)
        libc.mallopt(_MMAP_MAX, _USUAL_MMAPS)
        libc.malloc_trim(0)
