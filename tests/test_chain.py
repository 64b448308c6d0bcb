"""Chains of compress steps: identities, names, refusals before work, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune import plan
from edgetune.adapt import sft
from edgetune.artifact import Artifact, Store
from edgetune.compress import chain, quantize
from edgetune.data.render import Rendered
from edgetune.errors import EdgetuneError, UnsupportedError
from edgetune.graph import last_hop, scored_steps
from edgetune.recipe import Adapt, Candidate, Gptq, Rtn
from tests.test_pipeline import make_recipe, run

CALIBRATION = {"n_samples": 4, "n_tokens": 32}
PRUNE = {"layers": 1, "intermediate_size": 96, "kv_heads": 1, "calibration": CALIBRATION}
DISTILL = {"batch_size": 8, "max_steps": 2, "eval_steps": 2, "eval_rows": 4}
GPTQ = {"group_size": 32, "sym": False, "calibration": CALIBRATION}
STUDENT = {
    "compress": [{"prune": PRUNE}, {"distill": DISTILL}, {"gptq": GPTQ}],
    "export": {"onnx": {}},
}


def test_identities_of_recipes_without_a_chain_stay_as_they_were() -> None:
    rows = [Rendered((1, 2, 3), (False, True, True), 1, "x", 1)]
    assert sft.planned_identity(Adapt(), "b" * 64, rows, 0).startswith("380f02296a4ca6a0")
    assert quantize.planned_identity(Gptq(), "m" * 64, "c" * 64).startswith("d7cc52c9ffcb32c7")
    assert quantize.planned_identity(Rtn(bits=8), "m" * 64, None).startswith("2d7e10df60b0a1f6")


def test_steps_and_hops_have_names() -> None:
    candidate = Candidate.model_validate(STUDENT)
    names = ["prune 1 layers ffn 96 1 kv heads", "distill forward", "gptq int4 g32"]
    assert chain.step_names(candidate) == names
    assert scored_steps(candidate) == names[:2]
    assert last_hop(candidate) == "gptq int4 g32, onnx int4"
    again = Candidate.model_validate({"compress": [*STUDENT["compress"][:2], *STUDENT["compress"][:2]]})
    assert chain.step_names(again)[2:] == [f"{name} #2" for name in names[:2]]
    assert scored_steps(again) == chain.step_names(again)[:3]  # the last model is what ships, scored as such
    assert last_hop(again) == "distill forward #2"


@pytest.mark.parametrize(
    ("candidate", "says"),
    [
        ({"compress": [{"prune": {"layers": 2}}]}, r"candidates\.a: prune\.layers=2 removes nothing, the model has 2"),
        (
            {"compress": [{"prune": {"intermediate_size": 104}}, {"gptq": {"group_size": 32}}]},
            r"candidates\.a: group_size=32 does not divide in_features=104 of model\.layers\.0\.mlp\.down_proj",
        ),
        (
            {"compress": [{"prune": {"hidden_size": 40}}], "export": {"gguf": {"type": "Q8_0"}}},
            r"candidates\.a: prune\.hidden_size leaves rows of 40, Q8_0 packs weights by 32; choose a multiple",
        ),
        (
            {"compress": [{"prune": {"kv_heads": 1}}, {"prune": {"kv_heads": 1}}]},
            r"candidates\.a: prune\.kv_heads=1 removes nothing, the model has 1",
        ),
        ({"compress": [{"prune": {"kv_heads": 1}}], "export": {"onnx": {}}}, r"candidates\.a: onnx precision int4"),
        ({"compress": [{"distill": {"student": "./nowhere"}}]}, r"candidates\.a: base './nowhere': no such folder"),
    ],
)
def test_what_a_chain_cannot_do_is_refused_before_work(
    candidate: dict[str, Any], says: str, tmp_path: Path, tiny_model_wide: Artifact
) -> None:
    recipe = make_recipe(tmp_path, tiny_model_wide.path, candidates={"a": candidate})
    with pytest.raises(EdgetuneError, match=says):
        run(recipe, tmp_path)
    assert not (tmp_path / "store").exists()


def test_a_student_of_another_vocabulary_is_refused(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model_wide.path.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 600}))
    candidate = Candidate.model_validate({"compress": [{"distill": {"student": str(other)}}]})
    with pytest.raises(UnsupportedError, match=r"has a vocabulary of 600, its teacher one of 512"):
        chain.check(candidate, config)


def test_llama_cpp_loads_no_qwen2_whose_queries_are_narrower_than_its_hidden_size() -> None:
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 160,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
    }  # fmt: skip
    export = {"gguf": {"type": "F32"}}
    alike = {"compress": [{"prune": {"kv_heads": 1, "hidden_size": 32}}], "export": export}
    plan.check_candidate(Candidate.model_validate(alike), config)
    apart = {"compress": [{"prune": {"kv_heads": 1}}], "export": export}
    with pytest.raises(UnsupportedError, match="Qwen2ForCausalLM with queries of 32 and hidden_size=64 is not loaded"):
        plan.check_candidate(Candidate.model_validate(apart), config)


def test_a_chain_from_base_to_report(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    candidates = {
        "student": STUDENT,
        "gguf": {"compress": STUDENT["compress"][:2], "export": {"gguf": {"type": "Q4_0", "calibration": CALIBRATION}}},
        "base-student": {"compress": [{"distill": {**DISTILL, "student": "base"}}]},
    }
    recipe = make_recipe(tmp_path, tiny_model_wide.path, candidates=candidates)
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    assert [seam.hop for seam in report.seams][3:] == [
        "student: prune 1 layers ffn 96 1 kv heads",
        "student: distill forward",
        "student: gptq int4 g32, onnx int4",
        "gguf: prune 1 layers ffn 96 1 kv heads",
        "gguf: distill forward",
        "gguf: gguf Q4_0",
        "base-student: distill forward",
    ]
    # One pass of the teacher and one pruned model serve both chains.
    made = {stage["name"]: stage for stage in report.stages}
    assert not made["student: teacher's distributions"]["done_before"]
    for name in ("prune 1 layers ffn 96 1 kv heads", "teacher's distributions", "distill forward"):
        assert made[f"gguf: {name}"]["done_before"]
        assert made[f"gguf: {name}"]["identity"] == made[f"student: {name}"]["identity"]
    store = Store(tmp_path / "store")
    shipped = Artifact.open(tmp_path / "run" / "candidates" / "student")
    (integers,) = shipped.manifest.parents
    distilled = store.get(next(iter(store.get(integers).manifest.parents)))  # type: ignore[union-attr]
    assert distilled is not None
    pruned, teacher, said = (store.get(parent) for parent in distilled.manifest.parents)
    assert pruned is not None
    assert teacher is not None
    assert said is not None
    assert [one.manifest.stage for one in (distilled, pruned, teacher, said)] == [
        "compress.distill/1", "compress.prune/1", "adapt.merge/1", "compress.teacher/1",
    ]  # fmt: skip
    assert pruned.manifest.notes["parameters"] < pruned.manifest.notes["parameters_before"]
    weighed = store.get(made["gguf: importance matrix"]["identity"])
    assert weighed is not None
    assert list(weighed.manifest.parents) == [distilled.identity]

    planned = plan.plan(recipe, store)
    first = [stage["name"] for stage in report.stages if not stage["done_before"]]
    assert {stage.name for stage in planned} == set(first)  # what candidates share is planned once
    assert all(stage.done is not False for stage in planned)
    assert all(stage.cost.seconds > 0 and stage.cost.memory_mib > 0 for stage in planned)
    unmade = plan.plan(recipe, Store(tmp_path / "empty"))
    assert [stage.name for stage in unmade] == [stage.name for stage in planned]
