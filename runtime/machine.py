"""What the measuring machine is, and how busy others keep it."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from edgetune.runtime.evidence import Load, Machine

BUSY_SHARE = 0.1  # of all cores, used by others
# What the kernels of llama.cpp, ONNX Runtime and oneDNN choose by; ARM's names at the end.
FLAGS = (
    "sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "neon", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def describe() -> Machine:
    """Describe this machine. Probes no GPU library that is not loaded already."""
    name, flags = _cpu()
    return Machine(
        cpu=name,
        cpu_flags=[flag for flag in FLAGS if flag in flags],
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_mib=psutil.virtual_memory().total // 2**20,
        gpu=_gpu(),
        platform=platform.platform(),
        python=platform.python_version(),
    )


def facts() -> list[str | int | None]:
    """Give what tells this machine from others that measure: what was timed on one is not taken for another's."""
    machine = describe()
    return [machine.cpu, machine.cores, machine.memory_mib, machine.gpu, machine.platform]


def _cpu() -> tuple[str, set[str]]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    facts: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts.setdefault(key.strip().lower(), value.strip())
    flags = set((facts.get("flags") or facts.get("features") or "").split())
    return facts.get("model name") or facts.get("hardware") or platform.machine(), flags


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        asked = [tool, "--query-gpu=name", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else None


class LoadMeter:
    """Measures the share of all cores that is used by processes that are not ours.

    Ours are this process and what it started. Time that a hypervisor took away counts as used by others.
    """

    def __init__(self, before_s: float = 0.25) -> None:
        """Watch for `before_s` seconds how busy others are before we begin; blocks for that time."""
        first = self._sample()
        time.sleep(before_s)
        self._others_before = _share(first, self._sample())
        self._start = self._sample()

    def stop(self) -> Load:
        """Give the load since the meter was made."""
        during = _share(self._start, self._sample())
        return Load(others_before=self._others_before, others_during=during, busy=during > BUSY_SHARE)

    @staticmethod
    def _sample() -> tuple[float, float, float]:
        """Give seconds of all cores together: in total, not idle, and ours."""
        times = psutil.cpu_times()._asdict()
        guest = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # already inside user and nice
        total = sum(times.values()) - guest
        return total, total - times["idle"] - times.get("iowait", 0.0), _own_seconds()


def _own_seconds() -> float:
    """CPU seconds of this process, its living descendants and those that were waited for."""
    me = psutil.Process()
    seconds = 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        seconds += times.user + times.system + times.children_user + times.children_system
    return seconds


def _share(before: tuple[float, float, float], after: tuple[float, float, float]) -> float:
    total, used, own = (b - a for a, b in zip(before, after, strict=True))
    return round(min(1.0, max(0.0, used - own) / total), 4) if total > 0 else 0.0
