"""What the machine is, and who else keeps it busy."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from edgetune.runtime import machine
from edgetune.runtime.machine import LoadMeter


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found.cpu
    assert found.cores >= 1
    assert found.memory_mib == psutil.virtual_memory().total // 2**20
    assert set(found.cpu_flags) <= set(machine.FLAGS)
    assert found.python == ".".join(map(str, sys.version_info[:3]))


class Clock:
    """Scripted CPU seconds: of all cores, and ours."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.samples: Iterator[tuple[float, float, float]] = iter(())
        monkeypatch.setattr(LoadMeter, "_sample", lambda *_: next(self.samples))


def test_time_of_others_is_what_is_not_idle_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    # total, used, own: before, 0.2 of 1 s used and none ours; during, 19 of 20 s used and 18 ours
    clock.samples = iter([(0, 0, 0), (1, 0.2, 0), (1, 0.2, 0), (21, 19.2, 18)])
    load = LoadMeter(before_s=0).stop()
    assert (load.others_before, load.others_during, load.busy) == (0.2, 0.05, False)
    clock.samples = iter([(0, 0, 0), (1, 0, 0), (1, 0, 0), (11, 6, 4)])
    load = LoadMeter(before_s=0).stop()
    assert (load.others_during, load.busy) == (0.2, True)


BURN = "import time; end = time.process_time() + {s}\nwhile time.process_time() < end: pass"


def test_our_children_are_not_others_even_after_they_ended() -> None:
    before = machine._own_seconds()
    process = subprocess.Popen([sys.executable, "-c", BURN.format(s=0.5)])
    deadline = time.monotonic() + 20
    while machine._own_seconds() - before < 0.3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert machine._own_seconds() - before >= 0.3  # while it lives
    process.wait()
    assert machine._own_seconds() - before >= 0.5  # and when it was waited for


def test_a_process_that_is_not_ours_is_seen() -> None:
    """Its parent ends at once, so it is nobody's child."""
    start = (
        "import subprocess, sys; "
        f"print(subprocess.Popen([sys.executable, '-c', {BURN.format(s=20)!r}], stdout=subprocess.DEVNULL).pid)"
    )
    pid = int(subprocess.run([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True, check=True).stdout)
    other = psutil.Process(pid)
    try:
        meter = LoadMeter(before_s=0.1)
        used = sum(other.cpu_times()[:2])
        time.sleep(0.7)
        share = (sum(other.cpu_times()[:2]) - used) / 0.7 / (psutil.cpu_count() or 1)
        load = meter.stop()
    finally:
        other.kill()
    assert load.others_during > 0.7 * share  # other helpers of this machine may add to it
