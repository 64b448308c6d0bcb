"""The verb bench: files without a manifest, ranked and remembered; a broken one is a row."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from edgetune import bench as benching
from edgetune import bench_detail, past
from edgetune.artifact import Artifact
from edgetune.errors import ArtifactError, UsageError
from edgetune.export import gguf
from edgetune.recipe import Bench
from edgetune.runtime import history
from edgetune.runtime.evidence import Failure, Generation, Latency, LatencyCase, ServedCase, ServedRequest, Timings
from edgetune.runtime.latency import make_prompts, measure
from edgetune.runtime.report import beside
from edgetune.runtime.report.write import read_report, write_report
from edgetune.runtime.statistics import repeatability
from tests.conftest import Call
from tests.export.test_onnx import exported
from tests.fakes import fake_job
from tests.report_sample import sample_report
from tests.runtime.test_history import timings
from tests.test_found import bare

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime_genai")
QUICK = Bench(prompt_tokens=[8], new_tokens=4, repeats=2, runs=1, warmup=1, threads=1)


def test_whatever_is_made_elsewhere_is_timed_without_a_recipe(
    tiny_model: Artifact, tiny_gguf: Artifact, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A GPTQ folder, an ONNX folder and a GGUF file without manifests, and a Hugging Face folder that is cut."""
    made = [bare(exported(kind, tiny_model, tmp_path_factory), tmp_path / kind) for kind in ("gptq", "fp32")]
    file = Path(shutil.copy(tiny_gguf.path / gguf.FILE, tmp_path / "tiny.gguf"))
    broken = bare(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut")
    screen = Console(file=io.StringIO(), width=200)
    place, raw = tmp_path / "history.sqlite", tmp_path / "raw.json"
    assert not benching.bench([*made, file, broken], QUICK, screen, json=raw, history=place)
    *timed, failed = Timings.model_validate_json(raw.read_bytes()).results
    assert [(one.subject.kind, one.subject.engine) for one in timed if isinstance(one, Latency)] == [
        ("gptq", "torch"), ("onnx", "onnxruntime"), ("gguf", "llama.cpp"),
    ]  # fmt: skip
    assert isinstance(failed, Failure)
    assert failed.reason.startswith("torch failed while loading: SafetensorError")
    assert isinstance(screen.file, io.StringIO)
    said = screen.file.getvalue()
    assert "failed" in said
    assert "one run tells no noise floor" in said
    assert "tiny.gguf: load " in said
    assert {case.subject for case in Timings.model_validate_json(raw.read_bytes()).figures} == {
        one.subject.name for one in timed if isinstance(one, Latency)
    }
    trend = next(trend for trend in history.trends(place) if trend.subject == "tiny.gguf")
    past.history(place, screen, artifact=trend.artifact[:6], machine="", add=raw)
    assert f"tiny.gguf {trend.artifact[:8]}" in screen.file.getvalue()
    with pytest.raises(UsageError, match="holds nothing of that kind"):
        past.history(place, screen, artifact="none", machine="", add=None)


@pytest.mark.alone
@pytest.mark.usefixtures("fakes_in_child")
def test_ids_are_folded_into_the_smallest_vocabulary_and_ranks_tell_chance() -> None:
    jobs = [fake_job("slow", decode_s=0.02), fake_job("fast", decode_s=0.002), fake_job("as fast", decode_s=0.002)]
    bench = QUICK.model_copy(update={"repeats": 3, "runs": 3})
    found = measure(jobs, bench, make_prompts([31, 32, 900], [8]), fold=True)
    timed = [one for one in found if isinstance(one, Latency)]
    ranks = benching.ranked(timed)
    assert ranks[-1][:2] == (3, found[0])
    assert ranks[-1][2].low > 2
    assert {rank for rank, *_ in ranks[:2]} <= {1, 2}
    assert [rank for rank, *_ in benching.ranked([first_run(one) for one in timed])] == [1, 1, 1]  # no noise floor
    direct = measure(jobs[:1], QUICK, make_prompts([31, 0, 900 % 32], [8]))
    assert isinstance(direct[0], Latency)
    assert isinstance(found[0], Latency)
    assert direct[0].workload == found[0].workload


def first_run(one: Latency) -> Latency:
    """What would be known had it all been done once."""
    cases = [case.model_copy(update={"generations": [g for g in case.generations if g.run == 0]}) for case in one.cases]
    return one.model_copy(update={"cases": cases})


@pytest.mark.usefixtures("fakes_in_child")
def test_repeated_runs_are_fresh_processes_and_give_a_noise_floor() -> None:
    bench = QUICK.model_copy(update={"runs": 2, "new_tokens": [3, 5]})
    told: list[tuple[int, int, str]] = []
    jobs = [fake_job("a", decode_s=0.002), fake_job("dies", fail="crash", at="decode", after=10)]
    good, lost = measure(jobs, bench, make_prompts([1, 2], [8]), progress=lambda *p: told.append(p))
    assert (told[0], told[-1]) == ((0, 20, "loading"), (20, 20, "rounds"))
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert isinstance(good, Latency)
    assert isinstance(lost, Failure)
    assert [(c.prompt_tokens, c.new_tokens) for c in good.cases] == [(8, 3), (8, 5)]
    for case in good.cases:
        assert [g.run for g in case.generations if not g.warmup] == [0, 0, 1, 1]
        assert {len(g.itl_ms) for g in case.generations} == {case.new_tokens - 1}
    assert any("noise floor" in line for line in benching.remarks([good]))


@pytest.mark.usefixtures("fakes_in_child")
def test_what_was_timed_is_printed_before_a_history_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benching.found, "jobs", lambda *_, **__: [fake_job("mine")])
    monkeypatch.setattr(benching, "prompt_ids", lambda *_: [3, 4, 5])
    screen, raw = Console(file=io.StringIO(), width=200), tmp_path / "raw.json"
    with pytest.raises(ArtifactError, match="cannot be used as history"):
        benching.bench([Path("mine")], QUICK, screen, json=raw, history=tmp_path)
    assert "1  mine" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert Timings.model_validate_json(raw.read_bytes()).results


def test_the_noise_floor_of_a_rank_is_that_of_what_is_ranked() -> None:
    """First tokens that differ from run to run, and further ones that never do."""

    def one(name: str, firsts: list[float]) -> Latency:
        (found, _) = timings(1.0).results
        assert isinstance(found, Latency)
        generations = [
            Generation(ttft_ms=first, itl_ms=[1.0] * 3, warmup=False, run=run)
            for run, first in enumerate(firsts) for _ in range(5)
        ]  # fmt: skip
        case = LatencyCase(prompt_tokens=8, new_tokens=4, generations=generations)
        subject = found.subject.model_copy(update={"name": name})
        return found.model_copy(update={"subject": subject, "cases": [case, case]})

    fast, far, near = one("fast", [90.0, 92.0, 91.0]), one("far", [930.0, 931.0, 929.0]), one("near", [97, 122, 147])
    assert [(rank, found.subject.name) for rank, found, _ in benching.ranked([far, near, fast])] == [
        (1, "fast"), (1, "near"), (3, "far"),
    ]  # fmt: skip
    share = repeatability([2 * 100, 2 * 125, 2 * 150])
    assert f"may differ by {share:.1%} by chance" in benching.remarks([fast, far, near])[-1]


def test_a_trend_says_what_may_be_chance(tmp_path: Path) -> None:
    place = tmp_path / "history.sqlite"
    said = []
    for day, itl in enumerate((10.0, 10.1, 10.0, 10.1, 13.0), start=1):
        history.record(place, timings(itl, day=day))
        said.append(past.change(history.trends(place)[0]))
    assert said[0] == "first run"
    assert said[1] == "+1.0%; two quiet runs before it would tell a noise floor"
    assert "within the noise" in said[3]
    assert said[4].startswith("+29.4%, slower beyond the noise of ")


def test_evidence_of_another_form_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(ArtifactError, match="schema_version 9"):
        past.read_timings(tmp_path / "x.json")


def test_evidence_of_another_machine_is_merged_by_digest(tmp_path: Path) -> None:
    report = sample_report(n_rows=20)
    mine = report.latency[0].subject
    far = timings(7.0, cpu="far away", digest=mine.artifact_digest)
    file = tmp_path / "box.json"
    file.write_text(far.model_dump_json())
    merged = past.merge_timings(report, file)
    (elsewhere,) = merged.elsewhere
    (found,) = elsewhere.results
    assert isinstance(found, Latency)
    assert found.subject.name == mine.name  # it had another name there
    assert past.merge_timings(merged, file) == merged
    write_report(merged, tmp_path)
    assert read_report(tmp_path / "report.json") == merged
    for page in ("report.md", "report.html"):
        assert "on far away, 2 cores" in (tmp_path / page).read_text()
    file.write_text(timings(7.0, digest="of something else").model_dump_json())
    with pytest.raises(UsageError, match="timed and scored none of the files"):
        past.merge_timings(report, file)
    assert past.read_timings(tmp_path).results == [*merged.latency]


def test_one_file_in_two_engines_keeps_both_apart(tmp_path: Path) -> None:
    report = sample_report(n_rows=20)
    mine = next(one for one in report.latency if one.subject.name == "q4-onnx")

    def ran(name: str, engine: str) -> Latency:
        return mine.model_copy(update={"subject": mine.subject.model_copy(update={"name": name, "engine": engine})})

    report = report.model_copy(update={"latency": [*report.latency, ran("q4-genai", "onnxruntime-genai")]})
    engines = ("onnxruntime", "onnxruntime-genai", "torch")
    far = timings(7.0).model_copy(update={"results": [ran("box.onnx", engine) for engine in engines]})
    (tmp_path / "box.json").write_text(far.model_dump_json())
    merged = past.merge_timings(report, tmp_path / "box.json")
    found = [one.subject.name for one in merged.elsewhere[0].results if isinstance(one, Latency)]
    assert found == ["q4-onnx", "q4-genai", "q4-onnx"]  # of an engine that the report has not, by digest alone
    said = [line.text for line in beside.lines(merged) if line.source.startswith("elsewhere")]
    assert [line.partition(", prompts")[0].rpartition(" in ")[2] for line in said[::2]] == list(engines)


def test_flags_are_the_recipes_keys(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Bench] = []

    def keep(_paths: object, settings: Bench, *_: object, **__: object) -> bool:
        asked.append(settings)
        return True

    monkeypatch.setattr(benching, "bench", keep)
    assert call("bench", "a.gguf", "--warmup", "5", "--case-timeout-s", "9.5")[0] == 0
    assert call("bench", "a.gguf")[0] == 0
    assert [(one.warmup, one.case_timeout_s) for one in asked] == [(5, 9.5), (2, 300)]


def test_a_file_that_failed_elsewhere_is_merged_with_its_reason(tmp_path: Path) -> None:
    report = sample_report(n_rows=20)
    mine = report.latency[1].subject
    far = timings(7.0, cpu="far away", digest="of something else")
    lost = Failure(
        subject="box-name", stage="latency", reason="llama.cpp died of SIGILL", artifact_digest=mine.artifact_digest
    )
    file = tmp_path / "box.json"
    file.write_text(far.model_copy(update={"results": [*far.results, lost]}).model_dump_json())
    (elsewhere,) = past.merge_timings(report, file).elsewhere
    assert elsewhere.results == [lost.model_copy(update={"subject": mine.name})]  # by digest; the others are unknown
    merged = past.merge_timings(report, file)
    write_report(merged, tmp_path / "page")
    for page in ("report.md", "report.html"):
        assert (
            "on far away, 2 cores: latency failed: llama.cpp died of SIGILL" in (tmp_path / "page" / page).read_text()
        )
    (tmp_path / "run").mkdir()
    failed = report.model_copy(update={"latency": [], "failures": [*report.failures, lost]})
    write_report(failed, tmp_path / "run")
    assert past.read_timings(tmp_path / "run").results == [lost]  # a run's report tells what it could not time


@pytest.mark.usefixtures("fakes_in_child")
def test_details_have_intervals_and_rates_and_fit_a_terminal() -> None:
    bench = QUICK.model_copy(update={"repeats": 4, "new_tokens": 5})
    found = measure(
        [fake_job("a-rather-long-name-of-a-file.Q4_K_M.gguf", decode_s=0.002)], bench, make_prompts([1], [8])
    )
    (one,) = found
    assert isinstance(one, Latency)
    figures = bench_detail.figures(found)
    (case,) = figures
    waits = [x for g in one.cases[0].generations if not g.warmup for x in g.itl_ms]
    value, low, high = case.figures["itl_p95"]
    assert value == pytest.approx(np.percentile(waits, 95))
    assert low is not None
    assert min(waits) < low <= value
    assert high is None  # four generations do not bound it
    assert case.figures["ttft_p50"][1:] == (None, None)
    assert case.figures["decode"] == (pytest.approx(1000 / np.mean(waits)), None, None)
    assert {f"{name}_p{q}" for name in ("ttft", "itl", "tpot") for q in (50, 90, 95, 99)} < set(case.figures)
    big = case.model_copy(
        update={"figures": {k: (v[0] * 1e4, v[0] * 9e3, v[0] * 2e4) for k, v in case.figures.items()}}
    )
    for shown in (case, big):
        screen = Console(file=io.StringIO(), width=100)
        for table in bench_detail.details(found, [shown]):
            screen.print(table)
        assert isinstance(screen.file, io.StringIO)
        said = screen.file.getvalue()
        assert "…" not in said
        assert len(said.splitlines()) == 5  # title, heads, TTFT, ITL, TPOT
        assert f"first run {one.first_run_ms:.0f} ms" in said
        for part in ("p50 (95 %)", "p90", "p99", " prefill", " decode", " to " if shown is big else " or more)"):
            assert part in said


def test_a_server_s_cases_have_intervals() -> None:
    requests = [ServedRequest(sent_s=0, done_s=1, ttft_ms=40 + n, itl_ms=[9.0, 11.0 + n], n_tokens=3) for n in range(8)]
    lost = ServedRequest(sent_s=0, error="HTTP 500")
    cases = [
        ServedCase(concurrency=2, rate=None, seconds=1, requests=[*requests, lost]),
        ServedCase(concurrency=None, rate=0.5, seconds=1, requests=[lost]),
    ]
    screen = Console(file=io.StringIO(), width=100)
    screen.print(bench_detail.served_detail(cases))
    assert isinstance(screen.file, io.StringIO)
    rows = screen.file.getvalue().splitlines()[2:]
    assert [row.split()[:2] for row in rows] == [["2", "TTFT"], ["ITL", "10.0"], ["TPOT", "11.8"]]
    assert "43.5 (" in rows[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["bench", "a.gguf", "--engine", "abacus"], "unknown engine 'abacus'; known: torch, llama.cpp"),
        (["bench", "nowhere.gguf"], "nowhere.gguf is not there"),
        (["bench", "a.gguf", "--case-timeout-s", "0"], "bench: case_timeout_s: Input should be greater than 0"),
        (["bench", "a.gguf", "--probe", "mood"], "bench: probes.0: Input should be 'cold_start'"),
        (["bench-http", "localhost"], "'localhost' is no address of a server"),
        (["history", "--history", "none.sqlite"], "none.sqlite holds nothing of that kind; edgetune bench fills it"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from edgetune import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["edgetune", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"edgetune: {said}")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
