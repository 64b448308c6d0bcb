"""What the machine tells about itself while it measures: clock, throttling, energy, and what of a file is in memory.

Each reading is None where the machine does not give it. `root` is where the kernel's files lie.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

from edgetune.backends import require
from edgetune.errors import MissingBackendError
from edgetune.runtime.evidence import CpuState

ROOT = Path("/")
PAGE = mmap.PAGESIZE


def cpu_state(root: Path = ROOT) -> CpuState:
    """Read the mean clock of all cores and how often the kernel says that they were throttled since it started."""
    cores = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*"))
    clocks = [khz / 1000 for core in cores if (khz := _number(core / "cpufreq/scaling_cur_freq")) is not None]
    clocks = clocks or _clocks_of_cpuinfo(root / "proc/cpuinfo")
    counts = [n for core in cores if (n := _number(core / "thermal_throttle/core_throttle_count")) is not None]
    return CpuState(
        mhz=round(sum(clocks) / len(clocks), 1) if clocks else None, throttled=int(sum(counts)) if counts else None
    )


class EnergyMeter:
    """Joules of the processor packages, by RAPL. A counter that wraps is counted on.

    Other zones would count twice: `psys`, the whole platform, holds the packages, and these hold those within them.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._zones = [
            zone
            for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
            if zone.name.count(":") == 1 and _text(zone / "name").startswith("package")
        ]
        self._before = self._read()

    @property
    def why_not(self) -> str | None:
        """Say in one line why there is no reading; None where there is one."""
        if not self._zones:
            return "this machine has no RAPL counter"
        return None if self._before is not None else "the RAPL counter may be read by root only"

    def joules(self) -> float | None:
        """Give what was used since the meter was made."""
        after = self._read()
        if self._before is None or after is None:
            return None
        used = 0.0
        for zone, start, end in zip(self._zones, self._before, after, strict=True):
            wrap = _number(zone / "max_energy_range_uj") or 0.0
            used += (end - start if end >= start else end - start + wrap) / 1e6
        return used

    def _read(self) -> list[float] | None:
        found = [_number(zone / "energy_uj") for zone in self._zones]
        return [value for value in found if value is not None] if found and None not in found else None


class GpuEnergyMeter:
    """Joules of all NVIDIA GPUs, by the counters of NVML (Volta and later); `why_not` says why there is no reading."""

    def __init__(self) -> None:
        self.why_not: str | None = None
        self._before = self._read()

    def joules(self) -> float | None:
        """Give what was used since the meter was made."""
        after = self._read()
        return None if self._before is None or after is None else after - self._before

    def _read(self) -> float | None:
        """Joules since the driver was loaded."""
        try:
            nvml = require("pynvml")
        except MissingBackendError as error:
            self.why_not = str(error)
            return None
        try:
            nvml.nvmlInit()
            gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            return sum(float(nvml.nvmlDeviceGetTotalEnergyConsumption(gpu)) for gpu in gpus) / 1e3
        except nvml.NVMLError as error:
            self.why_not = f"NVML gives no reading ({error})"
            return None


def drop_from_page_cache(files: Sequence[Path]) -> float | None:
    """Ask the kernel to forget files, and give the share of them that is in memory still; None where it cannot tell."""
    if not hasattr(os, "posix_fadvise"):
        return None
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)  # dirty pages stay
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return resident_share(files)


def resident_share(files: Sequence[Path]) -> float | None:
    """Give the share of the files' pages that is in the page cache, by mincore; None where there is no such call."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        return None
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    resident = pages = 0
    for file in files:
        size = file.stat().st_size
        if size == 0:
            continue
        handle = os.open(file, os.O_RDONLY)
        try:
            start = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, handle, 0)
        finally:
            os.close(handle)
        if start in (None, ctypes.c_void_p(-1).value):
            return None
        n = -(-size // PAGE)
        found = (ctypes.c_ubyte * n)()
        told = libc.mincore(start, size, found)
        libc.munmap(start, size)
        if told != 0:
            return None
        resident += sum(page & 1 for page in found)
        pages += n
    return resident / pages if pages else None


def _clocks_of_cpuinfo(file: Path) -> list[float]:
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [float(line.partition(":")[2]) for line in lines if line.lower().startswith("cpu mhz")]


def _number(file: Path) -> float | None:
    try:
        return float(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    """Give what a file holds; nothing where it cannot be read."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
