"""Types within a budget of time: what a token takes in each is measured, and the choice is held to the sum."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgetune import pipeline, plan
from edgetune.artifact import Artifact, Store
from edgetune.compress import moments
from edgetune.compress.allocate import linear_groups
from edgetune.compress.architectures import linear_shapes
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError, RecipeError, StageError, UnsupportedError
from edgetune.export import gguf, gguf_sensitivity, gguf_times
from edgetune.export.gguf_allocation import check_times, layer_types, predicted_ms
from edgetune.export.gguf_write import read_config
from edgetune.graph import stage_names
from edgetune.recipe import Bench, Candidate, parse_as
from edgetune.recipe_export import AllocateTypes, GgufExport, TokenTime
from edgetune.recipe_runtime import LlamaCpp, Runtime
from edgetune.runtime import latency
from edgetune.runtime.evidence import Failure, Generation, Latency, LatencyCase, Load
from edgetune.runtime.worker import Job
from edgetune.stages import Stages
from edgetune.steps import Steps
from tests.conftest import make_tiny_model
from tests.test_pipeline import make_recipe

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here", "known_speeds")

RNG = np.random.default_rng(0)
ROWS, SHOWN = (CalibrationSet(RNG.integers(3, 500, (4, 16))) for _ in range(2))
BENCH = Bench(prompt_tokens=[16, 8], new_tokens=4, repeats=2, warmup=1, threads=1)
RUNTIME = Runtime(llama_cpp=LlamaCpp(mmap=True))
CHOICES: Any = ["Q4_K", "Q4_0", "Q8_0"]
TIMES = {"Q4_K": 3.0, "Q4_0": 4.0, "Q8_0": 7.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """All rows are too narrow for Q4_K, so no file has it."""
    return make_tiny_model(tmp_path_factory.mktemp("times") / "model")


@pytest.fixture(scope="module")
def weighed(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return moments.run(model, tmp_path_factory.mktemp("weighed") / "moments", calibration=SHOWN)


def config(ms: float, choices: Any = CHOICES) -> GgufExport:
    return GgufExport(type="Q4_0", allocate=AllocateTypes(budget=TokenTime(ms_per_token=ms), choices=choices))


def wide(tmp_path: Path) -> dict[str, Any]:
    return read_config(make_tiny_model(tmp_path / "wide", layers=1, hidden=256).path)


class FakeTimer:
    """Gives each file its time, as `latency.measure` would."""

    def __init__(self, ms: dict[str, float], *, busy: bool = False, fails: bool = False) -> None:
        self.ms, self.busy, self.fails = ms, busy, fails
        self.asked: list[tuple[list[str], Bench, list[int]]] = []

    def __call__(self, jobs: Any, bench: Bench, prompts: Any, **_: Any) -> list[Latency | Failure]:
        assert all(job.path.is_file() for job in jobs)
        self.asked.append(([job.name for job in jobs], bench, list(prompts)))
        return [self._one(job, bench) for job in jobs]

    def _one(self, job: Job, bench: Bench) -> Latency | Failure:
        if self.fails:
            return Failure(subject=job.name, stage="latency", reason="crashed")
        ms = self.ms[job.name]
        seen = [Generation(ttft_ms=1, itl_ms=[90.0, 90.0], warmup=True)]
        seen += [Generation(ttft_ms=1, itl_ms=[ms, ms, 5 * ms], warmup=False)]
        case = LatencyCase(prompt_tokens=bench.prompt_tokens[0], new_tokens=4, generations=seen)
        load = Load(others_before=0, others_during=0.4 if self.busy else 0, busy=self.busy)
        return Latency(subject=job.subject("1"), workload="w", load_ms=1, first_run_ms=1, cases=[case],
                       peak_rss_bytes=1, load=load)  # fmt: skip


def run(model: Artifact, weighed: Artifact, out: Path, asked: GgufExport | None = None) -> Artifact:
    return gguf_times.run(asked or config(5), model, out, moments=weighed, measured=ROWS, bench=BENCH, runtime=RUNTIME)


def planned(asked: GgufExport, model: Artifact, weighed: Artifact, runtime: Runtime | None = RUNTIME) -> str:
    return gguf_times.planned_identity(asked, BENCH, runtime, model.identity, weighed.identity, ROWS.digest)


def test_llama_cpp_decodes_a_file_of_each_type(model: Artifact, weighed: Artifact, tmp_path: Path) -> None:
    made = run(model, weighed, tmp_path / "times", config(5, ["Q4_0", "Q8_0"]))
    found = gguf_times.read(made)
    assert list(found) == ["Q4_0", "Q8_0"]
    assert all(0 < ms < 10_000 for ms in found.values())
    assert not list(made.path.glob("*.gguf"))
    (made.path / gguf_times.FILE).write_text("[]")
    with pytest.raises(ArtifactError, match=r"times\.json is damaged"):
        gguf_times.read(made)


def test_times_are_medians_of_what_was_measured(
    model: Artifact, weighed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timer = FakeTimer({"Q4_0": 4, "Q8_0": 7}, busy=True)
    monkeypatch.setattr(latency, "measure", timer)
    made = run(model, weighed, tmp_path / "times")
    ((names, bench, prompts),) = timer.asked
    assert (names, prompts, bench.runs) == (["Q4_0", "Q8_0"], [8], 1)
    assert gguf_times.read(made) == {"Q4_0": 4, "Q8_0": 7}
    assert made.manifest.fallbacks == ["others used 40% of the machine while types were timed; they may be faster"]
    monkeypatch.setattr(latency, "measure", FakeTimer({}, fails=True))
    with pytest.raises(StageError, match="Q4_0: crashed"):
        run(model, weighed, tmp_path / "failed")


def test_a_type_that_fits_some_rows_is_told_from_its_stand_in(model: Artifact) -> None:
    model_config, asked = read_config(model.path) | {"intermediate_size": 256}, config(5).allocate
    assert asked is not None
    assert gguf_times.stand_in(asked, model_config) == "Q4_0"
    share = 256 * 64 / (2 * 64 * 64 + 2 * 32 * 64 + 3 * 256 * 64)  # down_proj, whose rows Q4_K divides
    found = gguf_times.type_times({"Q4_K": 3.7, "Q4_0": 4, "Q8_0": 7}, asked, model_config)
    assert found == pytest.approx({"Q4_K": (3.7 - (1 - share) * 4) / share, "Q4_0": 4, "Q8_0": 7}, rel=1e-4)
    with pytest.raises(StageError, match="Q4_K packs 27% of the weights, too few to be timed here"):
        gguf_times.type_times({"Q4_K": 0.1, "Q4_0": 4, "Q8_0": 7}, asked, model_config)


def test_what_was_timed_here_is_not_another_machines(
    model: Artifact, weighed: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = planned(config(5), model, weighed)
    assert planned(config(9), model, weighed) == here  # two budgets share it
    assert planned(config(5), model, weighed, None) != here
    assert planned(config(5, ["Q4_0", "Q8_0"]), model, weighed) != here
    monkeypatch.setattr(gguf_times, "facts", lambda: ["another processor", 64, 1, None, "there"])
    assert planned(config(5), model, weighed) != here


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_within_the_time(seed: int, tmp_path: Path) -> None:
    model_config, rng = wide(tmp_path), np.random.default_rng(seed)
    groups, shapes = linear_groups(model_config), linear_shapes(model_config)
    losses = {first: dict(zip(CHOICES, rng.exponential(1, 3), strict=True)) for first in groups}
    n = sum(R * C for R, C in shapes.values())
    share = {first: sum(shapes[name][0] * shapes[name][1] for name in names) / n for first, names in groups.items()}
    for ms in (3.21, 4.51, 6.13):  # no sum is within a tick of one
        best = min(
            (sum(losses[first][kind] for first, kind in zip(groups, each, strict=True)), each)
            for each in itertools.product(CHOICES, repeat=len(groups))
            if sum(share[first] * TIMES[kind] for first, kind in zip(groups, each, strict=True)) <= ms
        )
        asked = config(ms).allocate
        assert asked is not None
        found = layer_types(asked, model_config, losses, TIMES)
        assert tuple(found[first] for first in groups) == best[1]
        assert predicted_ms(model_config, found, TIMES) <= ms
    with pytest.raises(
        UnsupportedError, match=r"ms_per_token=2: the fastest choices take 3 ms a token on this machine"
    ):
        check_times(AllocateTypes(budget=TokenTime(ms_per_token=2), choices=CHOICES), model_config, TIMES)


def test_a_recipe_is_refused_before_more_is_measured(
    model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure", FakeTimer({"Q4_0": 4.0, "Q8_0": 7.0}))
    rows = {"n_samples": 2, "n_tokens": 16}

    def ships(ms: float) -> dict[str, Any]:
        asked = {"budget": {"ms_per_token": ms}, "choices": ["Q4_0", "Q8_0"], "rows": rows}
        return {"export": {"gguf": {"type": "Q4_0", "allocate": asked, "calibration": rows}}}

    recipe = make_recipe(tmp_path, model.path, adapt=None, candidates={"fast": ships(3), "held": ships(5.5)})
    store = Store(tmp_path / "store")
    stages = Stages(store, tmp_path / "run", Console(file=io.StringIO()))
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), stages)
    line.prepare()
    line.steps = Steps(recipe, stages, line.graph, line.base, line.adapt())
    assert line.build("fast", recipe.candidates["fast"]) is None
    assert ["the fastest choices take 4 ms" in failure.reason for failure in stages.failures] == [True]
    (shipped,) = line.build("held", recipe.candidates["held"]) or []
    assert shipped.identity == line.graph.shipped(recipe.candidates["held"])
    assert 4 < shipped.manifest.notes["predicted_ms_per_token"] <= 5.5
    ran = [stage["name"] for stage in stages.done if not stage["done_before"]]
    assert ran == [
        "base", "fast: importance matrix", "fast: times of types", "held: sensitivity of layers",
        "held: gguf Q4_0 5.5 ms",
    ]  # fmt: skip
    named = [name.partition(": ")[2] for name in stage_names(recipe)]
    assert named[1:] == ["importance matrix", "times of types", "sensitivity of layers", "gguf Q4_0 3 ms",
                         "gguf Q4_0 5.5 ms"]  # fmt: skip
    stage = {one.name: one for one in plan.plan(recipe, store)}["fast: times of types"]
    assert stage.done
    assert stage.cost is not None
    assert stage.cost.seconds > 0


def test_files_are_chosen_by_both_pieces_of_evidence(
    model: Artifact, weighed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "measure", FakeTimer({"Q4_0": 4.0, "Q8_0": 7.0}))
    asked = config(5, ["Q4_0", "Q8_0"])
    assert asked.allocate is not None
    times = run(model, weighed, tmp_path / "times", asked)
    cost = gguf_sensitivity.run(asked.allocate, model, tmp_path / "cost", moments=weighed, measured=ROWS)
    made = gguf.run(
        asked, model, tmp_path / "made", moments=moments.read(weighed), calibration_digest=SHOWN.digest,
        sensitivity=cost, times=times,
    )  # fmt: skip
    assert made.identity == gguf.planned_identity(asked, model.identity, SHOWN.digest, cost.identity, times.identity)
    assert set((made.manifest.scheme or {})["type_of"].values()) == {"Q4_0", "Q8_0"}


def test_keys() -> None:
    assert AllocateTypes(budget=5).model_dump()["budget"] == 5.0
    assert config(5).model_dump()["allocate"]["budget"] == {"ms_per_token": 5.0}
    for budget, says in (({"ms": 5}, "ms_per_token' is missing"), (-1, r"allocate\.budget: Input should be greater")):
        with pytest.raises(RecipeError, match=says):
            parse_as(Candidate, {"export": {"gguf": {"allocate": {"budget": budget}}}}, "recipe")
