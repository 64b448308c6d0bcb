"""Probes: each in its own process, each failure a line; and what they say of a machine whose files we write."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from edgetune.recipe import Bench, Budgets
from edgetune.runtime import roofline, sensors
from edgetune.runtime.evidence import CpuState, Failure, Generation, Latency, LatencyCase, Probes, SweepPoint
from edgetune.runtime.latency import make_prompts, measure, noise_floor
from edgetune.runtime.probes import crossover
from edgetune.runtime.report import beside
from edgetune.runtime.statistics import repeatability
from edgetune.runtime.verdict import judge
from tests.fakes import fake_job

BENCH = Bench(prompt_tokens=[4, 9], new_tokens=5, threads=1, repeats=2, runs=1, warmup=1, case_timeout_s=20)
PROMPTS = make_prompts(range(3, 30), [4, 9])


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root with the kernel's files of two cores and one processor package."""
    for core, (khz, throttled) in enumerate(((2_000_000, 3), (3_000_000, 4))):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}"
        (folder / "cpufreq").mkdir(parents=True)
        (folder / "thermal_throttle").mkdir()
        (folder / "cpufreq/scaling_cur_freq").write_text(f"{khz}\n")
        (folder / "thermal_throttle/core_throttle_count").write_text(f"{throttled}\n")
    zone = tmp_path / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (zone / "name").write_text("package-0\n")
    (zone / "energy_uj").write_text("9000000\n")
    (zone / "max_energy_range_uj").write_text("10000000\n")
    (zone.parent / "intel-rapl:0:0").mkdir()  # a part of the package, which must not count twice
    platform = zone.parent / "intel-rapl:1"  # and the package is a part of this
    platform.mkdir()
    (platform / "name").write_text("psys\n")
    (platform / "energy_uj").write_text("7000000\n")
    return tmp_path


def test_sensors_read_what_the_kernel_tells(machine: Path, tmp_path: Path) -> None:
    state = sensors.cpu_state(machine)
    assert (state.mhz, state.throttled) == (2500.0, 7)
    meter = sensors.EnergyMeter(machine)
    assert meter.why_not is None
    (machine / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("2500000")  # it has wrapped
    (machine / "sys/class/powercap/intel-rapl:1/energy_uj").write_text("19000000")
    assert meter.joules() == pytest.approx(3.5)
    none = sensors.EnergyMeter(tmp_path / "nowhere")
    assert (none.joules(), none.why_not) == (None, "this machine has no RAPL counter")
    (machine / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("")
    assert sensors.EnergyMeter(machine).why_not == "the RAPL counter may be read by root only"
    empty = sensors.cpu_state(tmp_path / "nowhere")
    assert (empty.mhz, empty.throttled) == (None, None)


class NVMLError(Exception):
    pass


class FakeNvml(ModuleType):
    """Two GPUs that have used 2 and 3 J, and 1 J each with every further reading."""

    NVMLError = NVMLError

    def __init__(self, fails: str = "") -> None:
        super().__init__("pynvml")
        self.fails, self.millijoules = fails, [2000, 3000]

    def nvmlInit(self) -> None:  # noqa: N802 - its name
        if self.fails == "init":
            raise NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:  # noqa: N802
        if self.fails == "read" and self.millijoules[1] > 3000:
            raise NVMLError("Not Supported")
        self.millijoules[handle] += 1000
        return self.millijoules[handle]


def test_gpus_are_read_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    meter = sensors.GpuEnergyMeter()
    assert (meter.joules(), meter.why_not) == (2.0, None)
    for fails, said in (("init", "(Driver Not Loaded)"), ("read", "(Not Supported)")):
        monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(fails))
        meter = sensors.GpuEnergyMeter()
        assert (meter.joules(), meter.why_not) == (None, f"NVML gives no reading {said}")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = sensors.GpuEnergyMeter()
    assert meter.joules() is None
    assert meter.why_not is not None
    assert "pip install 'edgetune[tensorrt]'" in meter.why_not


@pytest.mark.usefixtures("fakes_in_child")
def test_an_engine_on_a_gpu_has_the_energy_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgetune.runtime.engine.ON_GPU", ("gpu",))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    bench = BENCH.model_copy(update={"probes": ["energy"]})
    found = measure([fake_job("here"), fake_job("there", engine="gpu")], bench, PROMPTS)
    energies = [one.probes.energy for one in found if isinstance(one, Latency) and one.probes is not None]
    assert [e is not None and e.gpu_joules for e in energies] == [None, 2.0]
    lines = [said.text for one in found[1:] if isinstance(one, Latency) for said in beside.probed(one)]
    (said,) = [line for line in lines if "GPU" in line]
    assert said.startswith("energy of the GPU: 0.250 J a token (")  # 4 + 4 tokens


def test_files_are_dropped_from_the_page_cache(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"x" * 4_000_000)
    assert file.read_bytes()
    before = sensors.resident_share([file])
    assert before is None or before > 0.9
    after = sensors.drop_from_page_cache([file])
    assert after is None or after < 0.1 or after == before  # tmpfs keeps everything


def test_a_roofline_is_bytes_over_bandwidth() -> None:
    found = roofline.roofline(90_000_000, 100_000.0, 100, 10.0, 20e9)
    assert found.bytes_per_token == 100_000_000
    assert found.share == pytest.approx(0.5)
    assert 1e8 < roofline.memory_bandwidth(1, n_bytes=2**24) < 1e13


@pytest.mark.usefixtures("fakes_in_child")
def test_all_probes_of_all_candidates() -> None:
    asked = {
        "sweep_rows": [1, 2, 8], "sweep_threads": [2],
        "probes": ["cold_start", "memory", "energy", "frequency", "roofline"],
    }  # fmt: skip
    jobs = [
        fake_job("int4", decode_s=0.002, row_s=0.002, ballast_mb=120),
        fake_job("16-bit", decode_s=0.012, row_s=0.0001),
        fake_job("breaks", fail="crash", at="decode_rows"),
        fake_job("lost", fail="crash", at="load"),
    ]
    small, large, breaks, lost = measure(jobs, BENCH.model_copy(update=asked), PROMPTS)
    assert isinstance(lost, Failure)
    assert isinstance(breaks, Latency)
    assert breaks.probes is not None
    points = {(p.n_threads, p.n_rows): p for p in breaks.probes.sweep if p.reason}
    assert set(points) == {(1, 2), (1, 8)}
    assert points[1, 2].reason == "fake died of SIGSEGV while generating several rows"
    assert isinstance(small, Latency)
    assert isinstance(large, Latency)
    found = small.probes
    assert found is not None
    assert [(p.n_threads, p.n_rows) for p in found.sweep] == [(2, 1), (1, 1), (1, 2), (1, 8)]
    assert all(sum(not g.warmup for g in p.generations) == 3 for p in found.sweep)
    assert found.memory is not None
    assert found.memory.prefill_peak > found.memory.loaded + 100e6
    assert found.memory.decode_peak < found.memory.prefill_peak - 80e6
    assert found.cold_start is not None
    assert found.cold_start.load_ms > 0
    assert found.roofline is not None
    assert found.roofline.bytes_per_token == 10**6 + 100 * (4 + 5 // 2)
    assert found.cpu_after is not None
    ratios = {rows: (value, low, high) for rows, value, low, high in crossover(small, large)}
    assert ratios[1][1] > 1
    assert ratios[8][2] < 1  # 18 ms against 13
    (said,) = beside.crossed(small, large)
    assert said.text.endswith("; without repeated runs (bench.runs) that may be chance")
    lines = "\n".join(said.text for said in beside.probed(small))
    for part in (
        "threads: 1: ",
        "rows at once: ",
        "cold start",
        "resident memory",
        "energy: ",
        "roofline: ",
        "clock: ",
    ):
        assert part in lines
    assert "8: failed (fake died of SIGSEGV" in "\n".join(said.text for said in beside.probed(breaks))


def swept(waits: dict[int, float], *, spread: float = 0.0, runs: tuple[float, ...] = (10.0, 10.0)) -> Latency:
    """A candidate whose steps of so many rows take so many ms, and whose runs have these medians."""
    points = [
        SweepPoint(
            n_threads=2, n_rows=n, prompt_tokens=4,
            generations=[
                Generation(ttft_ms=5, itl_ms=[wait * (1 + spread * way)] * 4, warmup=False) for way in (-1, 0, 1)
            ],
        )
        for n, wait in waits.items()
    ]  # fmt: skip
    (one,) = measure_of(repeated(list(runs)))
    return one.model_copy(update={"probes": Probes(sweep=points)})


@pytest.mark.parametrize(
    ("small", "large", "said"),
    [
        ({1: 5, 4: 8, 8: 15, 16: 30}, {1: 10, 4: 11, 8: 15, 16: 24}, "no longer faster from 8 rows on"),
        ({1: 5, 4: 8}, {1: 10, 4: 11}, "still faster at 4"),
        ({1: 12, 4: 20}, {1: 10, 4: 11}, "faster at none of them"),
        ({1: 10, 4: 8, 8: 16}, {1: 10, 4: 11, 8: 15}, "no longer faster from 8 rows on"),  # noise at one row
    ],
)
def test_the_crossover_is_where_smaller_weights_stop_being_faster(
    small: dict[int, float], large: dict[int, float], said: str
) -> None:
    (line,) = beside.crossed(swept(small), swept(large))
    assert line.text.endswith("; " + said)


def test_a_crossover_is_no_finer_than_spread_and_noise_floor() -> None:
    small, large = {1: 9.0, 4: 20.0}, {1: 10.0, 4: 21.0}
    assert "no longer faster from 4 rows on" in next(beside.crossed(swept(small, spread=0.06), swept(large))).text
    sides = swept(small, runs=(10.0, 10.2)), swept(large)  # the floor of two runs is wide
    assert "faster at none of them" in next(beside.crossed(*sides)).text
    (said,) = beside.crossed(swept(small, runs=(10.0,)), swept(large))
    assert said.text.endswith("; without repeated runs (bench.runs) that may be chance")


def test_a_longer_context_is_said_to_cost_more() -> None:
    from tests.runtime.test_history import timings

    (one, _) = timings(1.0).results
    assert isinstance(one, Latency)
    cases = [
        LatencyCase(
            prompt_tokens=n, new_tokens=5, steady=True,
            generations=[Generation(ttft_ms=n, itl_ms=[wait] * 4, warmup=False)] * 3,
        )
        for n, wait in ((32, 10.0), (2048, 15.0))
    ]  # fmt: skip
    (said,) = beside.probed(one.model_copy(update={"cases": cases}))  # no probe is asked for
    assert said.text == "context: ITL p50 10.00 ms after 32 tokens, 15.00 ms after 2048: +50%"
    assert said.field == "cases[].generations[].itl_ms"


@pytest.mark.parametrize(
    ("points", "lines"),
    [
        ([(1, 1)], ["threads: 1: 200.0 tokens/s"]),
        ([(2, 1)], ["threads: 2: 200.0 tokens/s"]),
        ([(2, 4)], ["rows at once: 4: 800.0 tokens/s in all"]),
        ([(2, 1), (2, 4)], ["rows at once: 1: 200.0, 4: 800.0 tokens/s in all"]),
        ([(1, 1), (2, 4)], ["threads: 1: 200.0 tokens/s", "rows at once: 4: 800.0 tokens/s in all"]),
    ],
)
def test_a_sweep_of_one_point_is_said(points: list[tuple[int, int]], lines: list[str]) -> None:
    one = swept({})
    generation = Generation(ttft_ms=5, itl_ms=[5.0] * 4, warmup=False)
    sweep = [SweepPoint(n_threads=t, n_rows=n, prompt_tokens=4, generations=[generation]) for t, n in points]
    assert [said.text for said in beside.probed(one.model_copy(update={"probes": Probes(sweep=sweep)}))] == lines
    lost = [sweep[0].model_copy(update={"generations": [], "reason": "died"})]
    said = [line.text for line in beside.probed(one.model_copy(update={"probes": Probes(sweep=lost)}))]
    assert len(said) == 1
    assert "failed (died)" in said[0]


@pytest.mark.parametrize(("before", "after"), [(None, 2600.0), (2600.0, None)])
def test_a_clock_that_is_told_once_is_not_told(before: float | None, after: float | None) -> None:
    states = [CpuState(mhz=mhz, throttled=None) for mhz in (before, after)]
    probes = Probes(cpu_before=states[0], cpu_after=states[1])
    (said,) = beside.probed(swept({}).model_copy(update={"probes": probes}))
    assert said.text == "clock: not told; throttled not told how often meanwhile"


def test_speeds_of_two_devices_have_no_ratio() -> None:
    small, large = swept({1: 5, 4: 8}), swept({1: 10, 4: 11})
    cuda = small.model_copy(update={"subject": small.subject.model_copy(update={"settings": {"device": "cuda:0"}})})
    (said,) = beside.crossed(cuda, large)
    assert said.text == f"no speed over {large.subject.name}: it ran on the CPU and this one on a GPU"


@pytest.mark.usefixtures("fakes_in_child")
def test_each_kind_of_failure_is_a_row_and_the_others_go_on() -> None:
    failures = {
        "crash": "fake died of SIGSEGV while generating",
        "killed": "fake died of SIGKILL while generating; something killed it, most often the machine ran out of "
        "memory",
        "hang": "fake gave no answer in 2 s while generating and was stopped",
        "nan": "fake gave logits that are not finite after 0 new tokens",
    }
    bench = BENCH.model_copy(update={"case_timeout_s": 2.0})
    jobs = [fake_job(fail, fail=fail, at="prefill", after=4) for fail in failures]
    *broken, good = measure([*jobs, fake_job("good")], bench, PROMPTS)
    assert isinstance(good, Latency)
    assert [(lost.subject, lost.stage, lost.reason) for lost in broken if isinstance(lost, Failure)] == [
        (name, "latency", said) for name, said in failures.items()
    ]
    assert [lost.artifact_digest for lost in broken if isinstance(lost, Failure)] == [j.artifact_digest for j in jobs]


def repeated(medians: list[float], n: int = 2) -> LatencyCase:
    """A case whose runs of n generations each have these medians."""
    generations = [
        Generation(ttft_ms=5, itl_ms=[m] * 4, warmup=False, run=run) for run, m in enumerate(medians) for _ in range(n)
    ]
    return LatencyCase(prompt_tokens=4, new_tokens=5, generations=generations, steady=True)


def test_no_verdict_is_finer_than_the_noise_floor() -> None:
    assert noise_floor(repeated([10.0]), "itl_ms") is None
    floor = noise_floor(repeated([10.0, 10.4, 9.8]), "itl_ms")
    assert floor == pytest.approx(repeatability([10.0, 10.4, 9.8]))
    (quiet,) = measure_of(repeated([10.0, 10.4, 9.8], 60))
    sharp = judge("q4", Budgets(itl_ms_p95=11.0), latency=quiet)
    assert sharp.verdict == "inconclusive"
    assert "runs differ by" in sharp.reason
    assert judge("q4", Budgets(itl_ms_p95=20.0), latency=quiet).verdict == "ship"
    (once,) = measure_of(repeated([10.4], 180))
    for limit in (1.0, 11.0, 1000.0):  # a floor that is not known is not zero
        found = judge("q4", Budgets(itl_ms_p95=limit), latency=once)
        assert found.verdict == "inconclusive"
        assert "one run has no noise floor" in found.reason


def measure_of(case: LatencyCase) -> list[Latency]:
    from tests.runtime.test_history import timings

    (found, _) = timings(1.0).results
    assert isinstance(found, Latency)
    return [found.model_copy(update={"cases": [case]})]
