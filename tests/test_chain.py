"""Chains of compress steps: identities, names, refusals before work, and a whole run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgetune import pipeline, plan
from edgetune.adapt import sft
from edgetune.artifact import Artifact, Store
from edgetune.compress import chain, quantize
from edgetune.compress.architectures import linear_shapes
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered
from edgetune.errors import DataError, EdgetuneError, UnsupportedError
from edgetune.export_names import last_hop
from edgetune.graph import scored_steps, stage_names
from edgetune.recipe import Candidate, Gptq, Rtn, load_recipe
from edgetune.recipe_training import Adapt
from edgetune.runtime.engines.torch_engine import TorchEngine
from edgetune.stages import Stages
from edgetune.steps import Steps
from tests.test_estimate import SMOLLM2
from tests.test_pipeline import make_recipe, run

pytestmark = pytest.mark.usefixtures("known_speeds")
CALIBRATION = {"n_samples": 4, "n_tokens": 32}
PRUNE = {"layers": 1, "intermediate_size": 96, "kv_heads": 1, "calibration": CALIBRATION}
DISTILL = {"batch_size": 8, "max_steps": 2, "eval_steps": 2, "eval_rows": 4}
GPTQ = {"group_size": 32, "sym": False, "calibration": CALIBRATION}
NAMES = ["prune 1 layers ffn 96 1 kv heads", "distill forward", "gptq int4 g32"]
STUDENT: dict[str, Any] = {
    "compress": [{"prune": PRUNE}, {"distill": DISTILL}, {"gptq": GPTQ}],
    "export": {"onnx": {}},
}


def test_identities_of_recipes_without_a_chain_stay_as_they_were() -> None:
    rows = [Rendered((1, 2, 3), (False, True, True), 1, "x", 1)]
    golden = Golden(conversations=[], texts=[], stop_ids=[2], bos_id=None, n_bos=0, chat_template="")
    assert sft.planned_identity(Adapt(), "b" * 64, rows, 0, golden=golden).startswith("4d4de94158772056")
    assert quantize.planned_identity(Gptq(), "m" * 64, "c" * 64).startswith("3e4e6cb1ff187623")
    assert quantize.planned_identity(Rtn(bits=8), "m" * 64, None).startswith("b10c074a9e70993a")


def test_steps_and_hops_have_names() -> None:
    candidate = Candidate.model_validate(STUDENT)
    assert chain.step_names(candidate) == NAMES
    assert scored_steps(candidate) == NAMES
    assert last_hop(candidate) == "onnx int4"
    again = Candidate.model_validate({"compress": [*STUDENT["compress"][:2], *STUDENT["compress"][:2]]})
    assert chain.step_names(again)[2:] == [f"{name} #2" for name in NAMES[:2]]
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
        (
            {"compress": [{"distill": {"student": "base", "hidden_weight": 1, "hidden_layers": [2]}}]},
            r"candidates\.a: distill\.hidden_layers names block 2, the student's are 0 to 1",
        ),
        (
            {"compress": [{"prune": {"kv_heads": 1}}, {"distill": {"relation_weight": 1, "relation_heads": 3}}]},
            r"candidates\.a: distill\.relation_heads=3 does not divide queries, keys and values of 16, 32, 64;",
        ),
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


def test_the_recipe_of_the_repository_makes_a_student_of_28_million_parameters() -> None:
    recipe = load_recipe(Path(__file__).resolve().parents[1] / "recipes" / "student.yaml")
    for name in ("student-f16", "student-q4", "student-int4"):
        made = chain.check(recipe.candidates[name], SMOLLM2)
        n_linear = sum(R * C for R, C in linear_shapes(made).values())
        n_norms = (2 * made["num_hidden_layers"] + 1) * made["hidden_size"]
        assert n_linear + n_norms + made["hidden_size"] * made["vocab_size"] == 27_432_864
    assert len({chain.so_far(recipe.candidates[name], 2) for name in recipe.candidates if name != "gguf-q4"}) == 1


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


def test_steps_are_made_once_and_a_student_may_be_another_model(tmp_path: Path, tiny_model: Artifact) -> None:
    sharing = {"compress": STUDENT["compress"][:2]}
    another = shutil.copytree(tiny_model.path, tmp_path / "another")  # another base, by its name
    other = {"compress": [{"distill": {**DISTILL, "student": str(another)}}]}
    grid = {"group_size": 32, "sym": False}
    scaled = {"compress": [{"awq": {**grid, "calibration": CALIBRATION}}, {"rtn": grid}]}
    rows = {"choices": [4, 8], "rows": {"n_samples": 2, "n_tokens": 16}}
    few, more = (
        {"compress": [{"gptq": GPTQ | {"allocate": {"budget": budget, **rows}}}]} for budget in (5, 6)
    )  # fmt: skip
    candidates = {
        "student": {"compress": STUDENT["compress"]}, "sharing": sharing, "other": other, "scaled": scaled,
        "few": few, "more": more,
    }  # fmt: skip
    recipe = make_recipe(tmp_path, tiny_model.path, adapt=None, candidates=candidates)
    store, said = Store(tmp_path / "store"), Console(file=io.StringIO())
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), Stages(store, tmp_path / "run", said))
    base = line.prepare()
    steps = Steps(recipe, line.stages, line.graph, base, line.adapt())
    made = {name: steps.run(name, candidate) for name, candidate in recipe.candidates.items()}
    assert not line.stages.failures
    found = {name: [artifact.identity for artifact in artifacts or []] for name, artifacts in made.items()}
    assert found == {name: line.graph.steps(candidate) for name, candidate in recipe.candidates.items()}
    assert found["sharing"] == found["student"][:2]
    pruned, distilled, integers = made["student"] or []
    assert [one.manifest.kind for one in (pruned, distilled, integers)] == ["model", "model", "gptq"]
    assert pruned.manifest.notes["parameters"] == distilled.manifest.notes["parameters"]
    assert pruned.manifest.notes["parameters"] < pruned.manifest.notes["parameters_before"]
    student, teacher, words = (store.get(parent) for parent in distilled.manifest.parents)
    assert student is not None
    assert teacher is not None
    assert words is not None
    assert (student.identity, teacher.identity) == (pruned.identity, base.identity)
    assert words.manifest.stage == "compress.teacher/1"
    ran = [stage["name"] for stage in line.stages.done if not stage["done_before"]]
    assert ran == [
        "base", *(f"student: {name}" for name in NAMES[:1]), "student: teacher's distributions",
        *(f"student: {name}" for name in NAMES[1:]), "other: student", "other: distill forward",
        "scaled: awq", "scaled: rtn int4 g32",
        "few: sensitivity of layers", "few: gptq 5 bits g32", "more: gptq 6 bits g32",
    ]  # fmt: skip
    assert [stage for stage in stage_names(recipe) if stage in ran] == ran
    assert [stage.name for stage in plan.plan(recipe, store)][: len(ran)] == ran


def test_integers_are_made_once_and_trained_further(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    """Both candidates train the same integers by what the teacher said once; what is made is what was planned."""
    rtn = {"rtn": {"group_size": 32, "sym": False}}
    candidates = {
        name: {"compress": [rtn, {"distill": DISTILL | {"into": into}}], "export": {"gguf": {"type": "F16"}}}
        for name, into in (("scales", "scales"), ("beside", "adapter"))
    }
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates=candidates)
    store, said = Store(tmp_path / "store"), Console(file=io.StringIO())
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), Stages(store, tmp_path / "run", said))
    base = line.prepare()
    steps = Steps(recipe, line.stages, line.graph, base, line.adapt())
    made = {name: steps.run(name, candidate) for name, candidate in recipe.candidates.items()}
    assert not line.stages.failures
    for name, candidate in recipe.candidates.items():
        assert [one.identity for one in made[name] or []] == line.graph.steps(candidate)
        assert [one.manifest.kind for one in made[name] or []] == ["gptq", "gptq"]
        assert scored_steps(candidate) == ["rtn int4 g32", f"distill forward into {candidate.distilled[0].into}"]
        assert line.graph.floats(candidate) == base.identity
    ran = [stage["name"] for stage in line.stages.done if not stage["done_before"]]
    assert ran == [
        "base", "scales: rtn int4 g32", "scales: teacher's distributions", "scales: distill forward into scales",
        "beside: distill forward into adapter",
    ]  # fmt: skip
    planned = plan.plan(recipe, store)
    assert [stage.name for stage in planned][: len(ran)] == [*ran[:4], "scales: gguf F16", ran[4]][: len(ran)]
    unmade = plan.plan(recipe, Store(tmp_path / "empty"))
    assert [stage.name for stage in unmade] == [stage.name for stage in planned]
    assert all(stage.cost is not None and stage.cost.seconds > 0 for stage in planned)


@pytest.mark.parametrize("export", [{"onnx": {}}, {"tensorrt": {"precision": "int4"}}])
def test_an_adapter_beside_integers_goes_where_a_correction_goes(export: dict[str, Any]) -> None:
    steps: list[dict[str, Any]] = [{"rtn": {"group_size": 32}}, {"distill": {"into": "adapter"}}]
    candidate = Candidate.model_validate({"compress": steps, "export": export})
    with pytest.raises(UnsupportedError, match="correction beside integers"):
        plan.check_candidate(candidate, SMOLLM2 | {"architectures": ["LlamaForCausalLM"]})


def test_a_student_of_written_and_sampled_answers_in_a_recipe(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    """Both candidates learn from the same answers of the teacher; what is made is what was planned."""
    written = {**DISTILL, "answers": "teacher", "max_new_tokens": 8}
    insides = {"hidden_weight": 0.5, "hidden_layers": [0], "relation_weight": 0.5, "on_policy": 0.5}
    candidates = {
        name: {"compress": [{"prune": PRUNE}, {"distill": written | more}]}
        for name, more in (("written", {}), ("sampled", insides))
    }
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates=candidates)
    store, said = Store(tmp_path / "store"), Console(file=io.StringIO())
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), Stages(store, tmp_path / "run", said))
    base = line.prepare()
    steps = Steps(recipe, line.stages, line.graph, base, line.adapt())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchEngine, "continue_rows", lambda self, prompts, stop, limits: [[5, 6, 2] for _ in prompts])
        made = {name: steps.run(name, candidate) for name, candidate in recipe.candidates.items()}
    assert not line.stages.failures
    for name, candidate in recipe.candidates.items():
        assert [one.identity for one in made[name] or []] == line.graph.steps(candidate)
    ran = [stage["name"] for stage in line.stages.done if not stage["done_before"]]
    assert ran == [
        "base", f"written: {NAMES[0]}", "written: teacher's answers", "written: teacher's distributions",
        "written: distill forward", "sampled: distill forward",
    ]  # fmt: skip
    planned = plan.plan(recipe, store)
    assert [stage.name for stage in planned][: len(ran)] == ran
    unmade = plan.plan(recipe, Store(tmp_path / "empty"))
    assert [stage.name for stage in unmade] == [stage.name for stage in planned]


@pytest.mark.parametrize("keys", [{"on_policy": 0.5}, {"answers": "teacher"}])
def test_answers_to_rows_that_ask_nothing_are_refused_before_work(
    keys: dict[str, Any], tmp_path: Path, tiny_model_wide: Artifact
) -> None:
    candidates = {"a": {"compress": [{"prune": PRUNE}, {"distill": {**DISTILL, **keys}}]}}
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates=candidates)
    texts = "".join(json.dumps({"text": f"the light is at {n} percent"}) + "\n" for n in range(20))
    Path(recipe.data.sources[0].path).write_text(texts)
    with pytest.raises(DataError, match=rf"^candidates\.a: distill\.{next(iter(keys))}: no training row has a prompt"):
        run(recipe, tmp_path)


@pytest.mark.slow
def test_a_chain_from_base_to_report(tmp_path: Path, tiny_model_wide: Artifact) -> None:
    export = {"gguf": {"type": "Q4_0", "calibration": CALIBRATION}}
    candidates = {"student": {"compress": STUDENT["compress"], "export": export}}
    recipe = make_recipe(tmp_path, tiny_model_wide.path, adapt=None, candidates=candidates)
    report, _ = run(recipe, tmp_path)
    assert not report.failures, report.failures
    assert [seam.hop for seam in report.seams] == ["base", *(f"student: {name}" for name in [*NAMES, "gguf Q4_0"])]
    store, made = Store(tmp_path / "store"), {stage["name"]: stage["identity"] for stage in report.stages}
    weighed = store.get(made["student: importance matrix"])
    assert weighed is not None
    assert list(weighed.manifest.parents) == [made["student: distill forward"]]
    planned = plan.plan(recipe, store)
    assert {stage.name for stage in planned} == set(made)
    assert all(stage.done is not False for stage in planned)
    assert all(stage.cost.seconds > 0 and stage.cost.memory_mib > 0 for stage in planned)
    unmade = plan.plan(recipe, Store(tmp_path / "empty"))
    assert [stage.name for stage in unmade] == [stage.name for stage in planned]
