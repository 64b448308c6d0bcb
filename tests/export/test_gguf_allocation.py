"""A ggml type for each group of layers, by what it was measured to cost: the measurement, the file, the refusals."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edgetune import pipeline, plan
from edgetune.artifact import Artifact, Store
from edgetune.compress import moments, sensitivity
from edgetune.compress.allocate import linear_groups
from edgetune.compress.architectures import linear_shapes
from edgetune.compress.layerwise import load_model
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError, RecipeError, UnsupportedError
from edgetune.export import gguf, gguf_child, gguf_sensitivity
from edgetune.export.gguf_families import family, gguf_name
from edgetune.export.gguf_write import read_config
from edgetune.graph import stage_names
from edgetune.recipe import Candidate, parse_as
from edgetune.recipe_export import AllocateTypes, GgufExport
from edgetune.stages import Stages
from edgetune.steps import Steps
from tests.conftest import make_tiny_model
from tests.export.conftest import run_child
from tests.test_pipeline import make_recipe

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here", "known_speeds")

RNG = np.random.default_rng(0)
ROWS, SHOWN = (CalibrationSet(RNG.integers(3, 500, (4, 16))) for _ in range(2))
CHOICES: Any = ["Q4_0", "Q4_K", "Q8_0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Hidden rows of 64 columns, and of 256 before `down_proj`."""
    return make_tiny_model(tmp_path_factory.mktemp("allocation") / "model")


@pytest.fixture(scope="module")
def weighed(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return moments.run(model, tmp_path_factory.mktemp("weighed") / "moments", calibration=SHOWN)


def config(budget: float, **more: Any) -> GgufExport:
    return GgufExport(type="Q4_0", allocate=AllocateTypes(budget=budget, choices=CHOICES), **more)


def measured(model: Artifact, weighed: Artifact, out: Path, choices: Any = CHOICES) -> Artifact:
    asked = AllocateTypes(budget=8, choices=choices)
    return gguf_sensitivity.run(asked, model, out, moments=weighed, measured=ROWS)


def test_divergences_are_those_of_the_whole_model_with_one_group_in_that_type(
    model: Artifact, weighed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from gguf import GGMLQuantizationType, quants

    from edgetune.export.ggml import Quantizer

    monkeypatch.setattr(sensitivity, "TOP_K", 512)  # the whole vocabulary
    made = measured(model, weighed, tmp_path / "measured")
    asked = AllocateTypes(budget=3, choices=CHOICES)
    assert made.identity == gguf_sensitivity.planned_identity(asked, model.identity, weighed.identity, ROWS.digest)
    assert not list(made.path.glob("*.gguf"))
    found, groups = gguf_sensitivity.read(made), linear_groups(read_config(model.path))
    assert list(found) == list(groups)
    means, round_rows = moments.read(weighed), Quantizer(1)

    def log_probs(layers: tuple[str, ...], kind: str) -> torch.Tensor:
        whole: Any = load_model(model)
        for name in layers:
            weight = whole.get_submodule(name).weight
            data = round_rows(weight.detach().float().numpy(), kind, means[name] if kind != "Q8_0" else None)
            weight.data = torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind])).to(weight.dtype)
        with torch.no_grad():
            logits: torch.Tensor = whole(torch.from_numpy(ROWS.ids)).logits
        return logits.double().log_softmax(-1)

    plain = log_probs((), "")
    for first, layers in groups.items():
        assert set(found[first]) == {"Q4_0", "Q8_0"}, "no rows are of 256 columns"
        for kind, nats in found[first].items():
            expected = float((plain.exp() * (plain - log_probs(layers, kind))).sum(-1).mean())
            assert nats == pytest.approx(expected, rel=0.05, abs=1e-7), (first, kind)
        assert found[first]["Q8_0"] < found[first]["Q4_0"]
    (made.path / gguf_sensitivity.FILE).write_text("[]")
    with pytest.raises(ArtifactError, match=r"sensitivity\.json is damaged"):
        gguf_sensitivity.read(made)


def test_a_file_has_the_types_that_its_budget_allows(model: Artifact, weighed: Artifact, tmp_path: Path) -> None:
    from gguf import GGUFReader

    evidence, names = measured(model, weighed, tmp_path / "measured"), moments.read(weighed)
    shapes, of = linear_shapes(read_config(model.path)), family(read_config(model.path))
    for budget, gptq in ((4.6, False), (6.0, False), (6.0, True), (8.5, False)):
        out = tmp_path / f"{budget}{gptq}"
        asked = config(budget, gptq=gptq)
        rows: Any = {"rows": SHOWN.ids} if gptq else {}
        made = gguf.run(asked, model, out, moments=names, calibration_digest=SHOWN.digest, sensitivity=evidence, **rows)
        assert made.identity == gguf.planned_identity(asked, model.identity, SHOWN.digest, evidence.identity)
        kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(made.path / gguf.FILE).tensors}
        written = {name: kinds[gguf_name(f"{name}.weight", of)] for name in shapes}
        bits = {"Q4_0": 4.5, "Q8_0": 8.5}
        n = sum(R * C for R, C in shapes.values())
        mean = sum(R * C * bits[written[name]] for name, (R, C) in shapes.items()) / n
        assert budget - 0.6 < mean <= budget
        assert made.manifest.scheme is not None
        assert made.manifest.scheme["type_of"].items() <= kinds.items()
        assert [line for line in made.manifest.fallbacks if not line.startswith("1 of")] == []  # the embedding
        best = gguf_sensitivity.read(evidence)
        if budget == 6.0:  # what is in eight bits was worth more than what is not, a byte for a byte
            groups = linear_groups(read_config(model.path))
            saved = {first: (best[first]["Q4_0"] - best[first]["Q8_0"]) / sum(
                shapes[name][0] * shapes[name][1] for name in layers) for first, layers in groups.items()}  # fmt: skip
            top = max(saved, key=lambda first: saved[first])
            assert written[top] == "Q8_0"


def test_a_measurement_that_was_stopped_goes_on(model: Artifact, weighed: Artifact, tmp_path: Path) -> None:
    whole = gguf_sensitivity.read(measured(model, weighed, tmp_path / "whole"))

    class CutError(Exception):
        pass

    def cut(done: int, _: int, label: str) -> None:
        if done == 1 and label.startswith("model.layers"):
            raise CutError

    asked = AllocateTypes(budget=8, choices=CHOICES)
    with pytest.raises(CutError):
        gguf_sensitivity.run(asked, model, tmp_path / "cut", moments=weighed, measured=ROWS, progress=cut)
    assert not (tmp_path / "cut").exists()
    assert len(gguf_sensitivity.read_losses(tmp_path / ".cut.work" / gguf_sensitivity.FILE)) == len(whole) // 2
    assert gguf_sensitivity.read(measured(model, weighed, tmp_path / "cut")) == whole


def test_what_a_killed_run_left_is_no_reason_to_want_more_disk(
    model: Artifact, weighed: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "Q4_0.gguf").write_bytes(b"half")
    asked: list[tuple[list[Path], int]] = []
    monkeypatch.setattr(
        gguf_sensitivity, "require_space", lambda where, n: asked.append((list(where.glob("*.gguf")), n))
    )
    measured(model, weighed, tmp_path / "out", ["Q4_0", "Q8_0"])
    ((left, n_bytes),) = asked
    assert not left
    n = sum(R * C for R, C in linear_shapes(read_config(model.path)).values())
    assert n * (4.5 + 8.5) / 8 < n_bytes < 1.6 * n * (4.5 + 8.5) / 8  # and two embeddings


def test_llama_cpp_rounds_in_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Types of blocks of 256 columns, some of which are made with an importance matrix only."""
    monkeypatch.setattr(gguf_child, "run_child", run_child)
    wide = make_tiny_model(tmp_path / "wide", layers=1, hidden=256)
    found = moments.run(wide, tmp_path / "moments", calibration=SHOWN)
    choices = ["IQ2_S", "IQ3_XXS", "Q6_K"]
    for nats in gguf_sensitivity.read(measured(wide, found, tmp_path / "measured", choices)).values():
        assert list(nats) == choices
        assert nats["IQ2_S"] > nats["IQ3_XXS"] > nats["Q6_K"]


def test_a_recipe_measures_once_for_two_budgets(tmp_path: Path, model: Artifact) -> None:
    rows = {"n_samples": 2, "n_tokens": 16}
    candidates = {
        name: {
            "export": {
                "gguf": {
                    "type": "Q4_0", "allocate": {"budget": budget, "choices": ["Q4_0", "Q8_0"], "rows": rows},
                    "calibration": rows,
                }
            }
        }
        for name, budget in (("few", 5), ("more", 7))
    }  # fmt: skip
    recipe = make_recipe(tmp_path, model.path, adapt=None, candidates=candidates)
    store = Store(tmp_path / "store")
    stages = Stages(store, tmp_path / "run", Console(file=io.StringIO()))
    line = pipeline.Pipeline(recipe, plan.preflight(recipe), stages)
    line.prepare()
    line.steps = Steps(recipe, stages, line.graph, line.base, line.adapt())
    for name, candidate in recipe.candidates.items():
        (shipped,) = line.build(name, candidate) or []
        assert shipped.identity == line.graph.shipped(candidate)
    ran = [stage["name"] for stage in line.stages.done if not stage["done_before"]]
    assert ran == [
        "base", "few: importance matrix", "few: sensitivity of layers", "few: gguf Q4_0 5 bits",
        "more: gguf Q4_0 7 bits",
    ]  # fmt: skip
    assert [stage for stage in stage_names(recipe) if stage in ran] == ran
    planned = plan.plan(recipe, store)
    assert [stage.name for stage in planned][: len(ran)] == ran
    assert [stage.done for stage in planned][: len(ran)] == [True] * len(ran)


def test_what_cannot_be_allocated_is_refused(model: Artifact) -> None:
    model_config = read_config(model.path)
    with pytest.raises(UnsupportedError, match=r"budget=4\.4: the smallest choices take 4\.5 bits a weight; raise it"):
        gguf.check(config(4.4), model_config)
    wide = GgufExport(allocate=AllocateTypes(budget=5, choices=["Q4_K", "Q6_K"]))
    with pytest.raises(UnsupportedError, match="none packs rows of 64, which model"):
        gguf.check(wide, model_config)
    with pytest.raises(UnsupportedError, match="has rows of 80, which no type packs; leave allocate out"):
        gguf.check(config(9), model_config | {"intermediate_size": 80})
    eight = GgufExport(type="Q8_0", gptq=True, allocate=AllocateTypes(budget=5, choices=["Q4_0", "Q8_0"]))
    gguf.check(eight, model_config)  # the type of the embedding alone
    granite = model_config | {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    with pytest.raises(UnsupportedError, match="without gptq and allocate and with imatrix: false"):
        gguf.check(eight, granite)
    quantized: Any = {"compress": [{"rtn": {"group_size": 32}}], "export": {"gguf": {"allocate": {"budget": 8}}}}
    with pytest.raises(UnsupportedError, match="drop the gptq or rtn step before it"):
        plan.check_candidate(parse_as(Candidate, quantized, "recipe"), model_config)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"imatrix": False}, "leave imatrix out"),
        ({"type": "F16"}, "type F16 is written as it is"),
        ({"gptq": True}, "keeps Q8_0; drop Q3_K"),
        ({"allocate": {"budget": 5, "choices": ["Q4_0", "Q4_0"]}}, "name each type once"),
        ({"allocate": {"budget": 5, "choices": ["Q4_K_M", "Q8_0"]}}, "Q4_K_M"),
        ({"allocate": {}}, "budget' is missing"),
    ],
)
def test_what_a_recipe_cannot_say(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_as(Candidate, {"export": {"gguf": {"allocate": {"budget": 5}} | changes}}, "recipe")


def test_keys_that_are_not_set_do_not_show() -> None:
    assert "allocate" not in GgufExport().model_dump()
    assert GgufExport.model_validate(config(5).model_dump()) == config(5)
    assert config(5).unread == {}
    assert GgufExport(type="Q8_0", allocate=AllocateTypes(budget=5)).weighed
