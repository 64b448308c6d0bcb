"""What a recipe writes of itself: identities are digests of it, so a key that is unset must not show."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from edgetune.recipe import Recipe, parse_recipe
from tests.test_recipe import gptq, raw


def test_a_recipe_never_changes() -> None:
    recipe = parse_recipe(raw())
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.data.train = "x"  # type: ignore[misc]


def test_a_recipe_survives_its_own_json() -> None:
    recipe = parse_recipe(gptq(calibration={"n_samples": 4}))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert parse_recipe(yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize(
    "adapt",
    [
        {"method": "full", "unfreeze_steps": 3, "l2": 0.1},
        {"method": "prefix", "virtual_tokens": 7},
        {"method": "ia3", "base_bits": 4, "best_by": "exact_match"},
        {"merge": "auto"},
    ],
)
def test_a_method_s_own_keys_survive_and_those_that_it_does_not_read_are_not_written(adapt: dict[str, Any]) -> None:
    recipe = parse_recipe(raw(adapt=adapt, candidates={"a": {}}))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    dumped = recipe.model_dump()["adapt"]
    assert adapt.items() <= dumped.items()
    assert ("r" in dumped) == (recipe.adapt is not None and recipe.adapt.method == "qlora")
    assert "prefer" not in recipe.model_dump()
    assert "score_timeout_s" not in recipe.model_dump()["data"]


def test_what_yesterday_s_recipes_wrote_is_what_they_write_today() -> None:
    """Identities are digests of these keys: a key that is unset must not show."""
    recipe = parse_recipe(raw(adapt={"r": 8}))
    assert recipe.adapt is not None
    assert set(recipe.adapt.model_dump()) == {
        "method", "r", "alpha", "dropout", "learning_rate", "loraplus_lr_ratio", "epochs", "max_steps", "batch_size",
        "micro_batch_size", "keep_dense", "warmup_ratio", "weight_decay", "max_grad_norm", "eval_steps", "eval_rows",
        "patience", "report_to",
    }  # fmt: skip


def test_how_a_student_is_taught_survives() -> None:
    taught = {
        "on_policy": 0.5,
        "max_new_tokens": 8,
        "hidden_weight": 1.0,
        "hidden_layers": [0, 2],
        "answers": "teacher",
    }
    step = {"distill": {"student": "base", **taught}}
    recipe = parse_recipe(raw(candidates={"a": {"compress": [step]}}))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert taught.items() <= recipe.candidates["a"].compress[0].model_dump()["distill"].items()


@pytest.mark.parametrize("probe", [None, "mine.jsonl"])
def test_a_general_probe_survives_and_one_that_is_unset_does_not_show(probe: str | None) -> None:
    recipe = parse_recipe(raw())
    assert recipe.probe == "pkg:edgetune"
    assert "general_probe" not in recipe.model_dump()["data"]
    asked = parse_recipe(raw(data=raw()["data"] | {"general_probe": probe}))
    assert Recipe.model_validate_json(asked.model_dump_json()) == asked
    assert asked.probe == probe
    assert parse_recipe(raw(adapt=None)).probe is None


@pytest.mark.parametrize(
    ("export", "unread"),
    [
        ({"gguf": {"type": "Q8_0"}}, {"imatrix", "calibration"}),
        ({"gguf": {"type": "F16", "imatrix": False}}, {"imatrix", "calibration"}),
        ({"gguf": {"imatrix": False}}, {"calibration"}),
        ({"gguf": {"imatrix": False, "gptq": True, "calibration": {"n_samples": 4}}}, set()),
        ({"gguf": {}}, set()),
        ({"onnx": {"precision": "fp16"}}, {"accuracy_level", "head_bits"}),
        ({"onnx": {"precision": "int8"}}, set()),
    ],
)
def test_what_an_export_does_not_read_is_no_part_of_its_identity(export: dict[str, Any], unread: set[str]) -> None:
    recipe = parse_recipe(raw(candidates={"a": {"export": export}}))
    ((form, dumped),) = recipe.model_dump(exclude_none=True)["candidates"]["a"]["export"].items()
    keys = {"gguf": {"imatrix", "calibration"}, "onnx": {"accuracy_level", "head_bits"}}[form]
    assert keys - dumped.keys() == unread
    parse_recipe(recipe.model_dump(mode="json"))


def test_runtime_keys_reach_the_engine_and_absent_ones_change_nothing() -> None:
    settings = {"kv_type": "q8_0", "flash_attention": True}
    recipe = parse_recipe(raw(candidates={"a": {"export": {"gguf": {}}, "runtime": {"llama_cpp": settings}}}))
    runtime = recipe.candidates["a"].runtime
    assert runtime is not None
    assert (runtime.engine, runtime.settings) == ("llama.cpp", settings)
    known = parse_recipe(raw(candidates={"a": {"export": {"onnx": {}}, "runtime": {"onnxruntime_genai": {}}}}))
    runtime = known.candidates["a"].runtime
    assert runtime is not None
    assert (runtime.engine, runtime.settings) == ("onnxruntime-genai", {})


def test_bench_keys_that_are_left_out_leave_the_identity_as_it_was() -> None:
    before = {"case_timeout_s": 300.0, "new_tokens": 64, "prompt_tokens": [32, 256], "repeats": 5, "threads": 2}
    assert parse_recipe(raw()).bench.as_config() == before | {"warmup": 2, "runs": 2}
    assert parse_recipe(raw(bench={"runs": 3, "new_tokens": [16, 64]})).bench.output_lengths == [16, 64]


def test_a_vocabulary_survives_and_one_that_is_unset_does_not_show() -> None:
    for sizes in ({"layers": 2}, {"vocabulary": 800}):
        recipe = parse_recipe(raw(candidates={"a": {"compress": [{"prune": sizes}]}}))
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
        (step,) = recipe.candidates["a"].compress
        assert step.prune is not None
        assert ("vocabulary" in step.prune.model_dump()) == ("vocabulary" in sizes)
        assert ("calibration" in step.prune.model_dump()) == ("layers" in sizes)
        assert "search_samples" not in step.prune.model_dump()
