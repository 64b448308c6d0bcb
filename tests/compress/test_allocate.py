"""Bits where they matter: what the bits of a layer cost, the choice within a budget, checkpoints of several widths."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.artifact import Artifact
from edgetune.compress import sensitivity
from edgetune.compress.allocate import allocate, check_budget, layer_schemes, linear_groups, stored_bits
from edgetune.compress.architectures import SHARED_INPUTS, linear_shapes
from edgetune.compress.checkpoint import load_dequantized, read_config, read_layers
from edgetune.compress.correction import corrected_weight, read_correction
from edgetune.compress.dynamic import dynamic_bits, read_bits
from edgetune.compress.layerwise import load_model
from edgetune.compress.quantize import check, planned_identity, run, solver
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Quantized, Scheme
from edgetune.data.calibration import CalibrationSet, make_apart, make_calibration
from edgetune.errors import ArtifactError, DataError, RecipeError, StageError, UnsupportedError
from edgetune.export.decoder_source import open_source, quantizer_of
from edgetune.recipe import Candidate, Gptq, Rtn, parse_as
from edgetune.recipe_export import Calibration
from edgetune.recipe_quantize import Allocate, Recover, Tune
from tests.conftest import make_tiny_model

RNG = np.random.default_rng(0)
ROWS, SHOWN = (CalibrationSet(RNG.integers(0, 512, (4, 16))) for _ in range(2))
CHOICES = Allocate(budget=4.5, choices=[2, 4, 8])
GRIDS: dict[str, Any] = {"checkpoint": "compressed-tensors"}
GRID = {"bits": 4, "group_size": 16}
RTN, GPTQ = Rtn(group_size=32, allocate=CHOICES), Gptq(group_size=32, sym=False, allocate=CHOICES)


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    choices = (2, 3, 4, 8)
    weights = rng.integers(1, 50, 5).tolist()
    losses = {
        str(i): dict(zip(choices, rng.exponential(10.0 ** rng.integers(-6, 1, 4)), strict=True)) for i in range(5)
    }
    sizes = {str(i): {bits: 64 * weights[i] * bits for bits in choices} for i in range(5)}
    for budget in (64 * sum(weights) * bits for bits in (2, 2.7, 4, 5.3, 8)):
        best = min(
            (sum(losses[str(i)][bits] for i, bits in enumerate(each)), each)
            for each in itertools.product(choices, repeat=5)
            if sum(sizes[str(i)][bits] for i, bits in enumerate(each)) <= budget
        )
        assert tuple(allocate(losses, sizes, int(budget)).values()) == best[1]
    with pytest.raises(UnsupportedError, match=r"the smallest choices take \d+ bits, the budget is 7; raise it"):
        allocate(losses, sizes, 7)


def test_divergences_are_those_of_the_whole_model_with_one_group_rounded(
    tiny_model: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "TOP_K", 512)  # the whole vocabulary
    model = load_model(tiny_model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = linear_shapes(read_config(tiny_model.path))
    solvers = {bits: solver(RTN, dict.fromkeys(names, Scheme(bits, 32))) for bits in (2, 4)}
    found = sensitivity.measure(model, ROWS.ids, solvers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    groups, plain = linear_groups(read_config(tiny_model.path)), log_probs(tiny_model)
    assert list(found) == list(groups)
    assert len(found) == 2 * len(SHARED_INPUTS)
    for first, layers in groups.items():
        for bits in (2, 4):
            expected = divergence(plain, log_probs(tiny_model, layers, bits))
            assert found[first][bits] == pytest.approx(expected, rel=0.05), (first, bits)
        assert found[first][4] < found[first][2]


def log_probs(source: Artifact, rounded: tuple[str, ...] = (), bits: int = 4) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary, in float64, by a plain forward of a model with some rounded layers."""
    model = load_model(source)
    for name in rounded:
        layer: Any = model.get_submodule(name)
        layer.weight.data = rtn_quantize(layer.weight, Scheme(bits, 32)).dequantize()
    with torch.no_grad():
        found: torch.Tensor = model(torch.from_numpy(ROWS.ids)).logits.double().log_softmax(-1)
    return found


def divergence(plain: torch.Tensor, rounded: torch.Tensor) -> float:
    return float((plain.exp() * (plain - rounded)).sum(-1).mean())


def test_a_measurement_that_was_stopped_goes_on(tiny_model: Artifact, tmp_path: Path) -> None:
    whole = sensitivity.run(GPTQ, tiny_model, tmp_path / "whole", measured=ROWS, calibration=SHOWN)
    assert whole.identity == sensitivity.planned_identity(GPTQ, tiny_model.identity, SHOWN.digest, ROWS.digest)
    found = sensitivity.read(whole)
    assert set(found["model.layers.1.mlp.down_proj"]) == {2, 4, 8}

    class CutError(Exception):
        pass

    def cut(done: int, *_: object) -> None:
        if done == 1:
            raise CutError

    with pytest.raises(CutError):
        sensitivity.run(GPTQ, tiny_model, tmp_path / "cut", measured=ROWS, calibration=SHOWN, progress=cut)
    kept = tmp_path / ".cut.work" / sensitivity.FILE
    kept.write_text(kept.read_text().replace("model.layers.0.self_attn.q_proj", "model.layers.0.gone"))
    stored = json.loads(kept.read_text())
    stored.pop("model.layers.0.gone")
    kept.write_text(json.dumps(stored))
    made = sensitivity.run(GPTQ, tiny_model, tmp_path / "cut", measured=ROWS, calibration=SHOWN)
    assert sensitivity.read(made) == found
    (made.path / sensitivity.FILE).write_text("{")
    with pytest.raises(ArtifactError, match=r"sensitivity\.json is damaged"):
        sensitivity.read(made)


def test_what_cannot_be_measured_names_its_layers(tiny_model: Artifact) -> None:
    def damaged(_: object, weight: torch.Tensor, *__: object) -> tuple[Quantized, tuple[str, ...]]:
        made = rtn_quantize(weight, Scheme(4, 32))
        return replace(made, scales=made.scales * torch.nan), ()

    def failing(*_: object) -> tuple[Quantized, tuple[str, ...]]:
        raise StageError("no grid")

    names = r"model\.layers\.0\.self_attn\.q_proj \+ .*v_proj: "
    for solve, says in ((damaged, "with 4 bits the model's outputs are not finite"), (failing, "no grid")):
        with pytest.raises(StageError, match=names + says):
            sensitivity.measure(load_model(tiny_model), ROWS.ids, {4: solve})


def test_steps_that_differ_in_what_is_not_measured_share_a_measurement() -> None:
    def planned(config: Rtn | Gptq) -> str:
        return sensitivity.planned_identity(config, "m" * 64, None, "r" * 64)

    more = GPTQ.model_copy(update={"allocate": CHOICES.model_copy(update={"budget": 6.0})})
    assert planned(more) == planned(GPTQ)
    assert planned(GPTQ.model_copy(update={"sym": True})) != planned(GPTQ)
    assert planned(GPTQ.model_copy(update={"correction": 0.5, "hessian": "bfloat16"})) == planned(GPTQ)
    assert planned(Rtn(group_size=32, allocate=CHOICES, recover=Recover(rank=4))) == planned(RTN)
    assert planned_identity(more, "m", None, "s") != planned_identity(GPTQ, "m", None, "s")


@pytest.mark.parametrize("config", [RTN, GPTQ])
def test_a_checkpoint_of_several_widths_is_read_back(config: Rtn | Gptq, tiny_model: Artifact, tmp_path: Path) -> None:
    measured = sensitivity.run(config, tiny_model, tmp_path / "measured", measured=ROWS, calibration=SHOWN)
    made = run(config, tiny_model, tmp_path / "out", calibration=SHOWN, sensitivity=measured)
    shown = SHOWN.digest if isinstance(config, Gptq) else None
    assert made.identity == planned_identity(config, tiny_model.identity, shown, measured.identity)
    model_config = read_config(tiny_model.path)
    of = layer_schemes(config, model_config, sensitivity.read(measured))
    chosen = {name: scheme.bits for name, scheme in of.items()}
    scheme = made.manifest.scheme
    assert scheme is not None
    assert scheme["bits_of"] == chosen
    assert len(set(chosen.values())) > 1
    assert 4 < scheme["bits_per_weight"] <= 4.5
    layers = read_layers(made.path)
    for name, layer in layers.items():
        assert 2 ** (chosen[name] - 1) <= int(layer.q.max()) < 2 ** chosen[name], name
    loaded = load_dequantized(made.path)
    assert all(torch.equal(loaded.get_submodule(n).weight, layer.dequantize()) for n, layer in layers.items())
    if config is RTN:
        weight: Any = load_model(tiny_model).get_submodule("model.layers.1.mlp.down_proj").weight
        rounded = rtn_quantize(weight, Scheme(chosen["model.layers.1.mlp.down_proj"], 32))
        assert torch.equal(layers["model.layers.1.mlp.down_proj"].q, rounded.q)


def test_a_correction_stands_beside_layers_of_other_bits(tiny_model: Artifact, tmp_path: Path) -> None:
    config = GPTQ.model_copy(update={"recover": Recover(rank=4), "tune": Tune(steps=2)})
    measured = sensitivity.run(config, tiny_model, tmp_path / "measured", measured=ROWS, calibration=SHOWN)
    plain = sensitivity.planned_identity(GPTQ, tiny_model.identity, SHOWN.digest, ROWS.digest)
    assert measured.identity == plain  # neither is measured
    made = run(config, tiny_model, tmp_path / "made", calibration=SHOWN, sensitivity=measured)
    shapes = linear_shapes(read_config(tiny_model.path))
    beside = sum(16 * 4 * (R + C) for R, C in shapes.values()) / sum(R * C for R, C in shapes.values())
    scheme: Any = made.manifest.scheme
    assert beside < scheme["bits_per_weight"] <= CHOICES.budget + beside
    assert read_correction(made.path).keys() == shapes.keys()
    source = open_source(made)
    assert source.bits == scheme["bits_of"]
    found = quantizer_of(made)
    assert found.recover == config.recover
    assert set(found.widths) == set(scheme["bits_of"].values())
    layers, loaded = read_layers(made.path), load_dequantized(made.path)
    for name, pair in source.corrections.items():
        whole = corrected_weight(layers[name].dequantize(), pair)
        assert torch.equal(loaded.get_submodule(name).weight, whole), name


def test_patterns_match_one_group_each_and_its_fused_name(tmp_path: Path) -> None:
    config = read_config(make_tiny_model(tmp_path / "model", layers=12).path)
    groups = linear_groups(config)
    bits = {name: 8 if first == "model.layers.1.self_attn.q_proj" else 4 for first, names in groups.items() for name in
            names}  # fmt: skip
    dynamic = dynamic_bits(bits, 4)
    assert list(dynamic) == [r"+:model\.layers\.1\.self_attn\.(q|k|v|qkv)_proj"]
    bits_of = read_bits({"bits": 4, "dynamic": dynamic}, "x")
    assert {name: bits_of(name) for name in bits} == bits
    assert [bits_of(f"model.layers.{i}.self_attn.qkv_proj") for i in (1, 11)] == [8, 4]
    for other in ({r"-:model\.layers\.1\..*": {}}, {"+:x": {"bits": 4, "group_size": 32}}, {"+:x": {"bits": 5}}):
        with pytest.raises(UnsupportedError, match="nothing else that differs between layers"):
            read_bits({"bits": 4, "dynamic": other}, "x")


def test_a_budget_counts_scales_and_zero_points(tiny_model: Artifact) -> None:
    config = read_config(tiny_model.path)
    q, k, v = ((64, 64), (32, 64), (32, 64))
    of_group = sum(R * C * 4 + R * (C // 32) * (16 + 4) for R, C in (q, k, v))
    assert stored_bits(config, Scheme(4, 32))["model.layers.0.self_attn.q_proj"] == of_group
    check_budget(Rtn(group_size=32, allocate=Allocate(budget=2.5625, choices=[2, 8])), config)
    packed = Rtn(group_size=32, allocate=Allocate(budget=2.5, choices=[2, 8]), checkpoint="compressed-tensors")
    check(packed, config)  # which stores no zero points of symmetric groups
    with pytest.raises(UnsupportedError, match=r"allocate\.budget=2\.5: 2 bits for all layers take 2\.5625 with group"):
        check(Rtn(group_size=32, allocate=Allocate(budget=2.5)), config)


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ({"rtn": {"bits": 4, "allocate": {"budget": 4}}}, "allocate chooses the bits of each layer; leave bits out"),
        ({"rtn": {"allocate": {"budget": 4, "choices": [4, 2]}}}, r"name each number once, in rising order: \[2, 4\]"),
        ({"rtn": {"allocate": {"budget": 4, "choices": [4]}}}, "choices"),
        ({"rtn": {"allocate": {"budget": 4, "choices": [4, 5]}}}, "has no 5 bits; set checkpoint: compressed-tensors"),
        ({"rtn": {"allocate": {"budget": 4, "choices": [4, 7]}}}, r"choices\.1: Input should be 2, 3, 4, 5, 6 or 8"),
        ({"rtn": {"allocate": {"budget": 4, "choices": [4, {**GRID, "groups": 8}]}}}, "did you mean 'group_size'"),
        ({"rtn": {"allocate": {"budget": 4, "choices": [2, {"bits": 4, "group_size": 32}]}}}, "groups by layer are"),
        (GRIDS | {"allocate": {"budget": 4, "choices": [GRID, GRID]}}, "name each choice once"),
        (GRIDS | {"group_size": 16, "allocate": {"budget": 4, "choices": [4, GRID]}}, "4 is in groups of 16 already"),
        ({"gptq": {"allocate": {"choices": [4, 8]}}}, "budget' is missing"),
    ],
)
def test_what_a_recipe_cannot_say(step: dict[str, Any], says: str) -> None:
    step = step if "gptq" in step or "rtn" in step else {"rtn": step}
    with pytest.raises(RecipeError, match=says):
        parse_as(Candidate, {"compress": [step]}, "recipe")


def test_keys_survive_and_unset_ones_do_not_show() -> None:
    assert "allocate" not in Rtn().model_dump()
    assert "bits" not in GPTQ.model_dump()
    assert Gptq.model_validate(json.loads(GPTQ.model_dump_json())) == GPTQ
    scaled = {"compress": [{"awq": {"group_size": 32}}, {"rtn": {"group_size": 32, "allocate": {"budget": 3}}}]}
    assert parse_as(Candidate, scaled, "recipe").quantizer is not None  # scaled for 4 bits, whatever each layer gets


def test_rows_that_measure_are_none_that_calibrate_nor_any_held_out() -> None:
    task = [tuple(range(10 * i, 10 * i + 10)) for i in range(20)]
    task.append(task[0])  # twice in the mixture
    general = list(range(1000, 1400))
    taken = Calibration(n_samples=4, n_tokens=20, general_share=0.5)
    shown = make_calibration(task, general, n_samples=4, n_tokens=20, general_share=0.5, seed=1).ids
    apart = make_apart(
        task, general, Calibration(n_samples=8, n_tokens=20, general_share=0.5), taken=taken, heldout=set(), seed=1
    ).ids
    assert apart.shape == (8, 20)
    assert not set(apart.ravel().tolist()) & set(shown.ravel().tolist())
    assert len(set(apart.ravel().tolist())) == apart.size
    with pytest.raises(DataError, match="a training row is a held-out row"):
        make_apart(task, general, taken, taken=None, heldout=set(task), seed=1)
    many, text = (Calibration(n_samples=n, n_tokens=20, general_share=share) for n, share in ((10, 0), (20, 1)))
    with pytest.raises(DataError, match="calibration leaves 160 tokens of training rows to measure on, 200 are wanted"):
        make_apart(task, general, many, taken=taken, heldout=(), seed=1)
    with pytest.raises(DataError, match="tokens of general text to measure on"):
        make_apart(task, general, text, taken=taken, heldout=(), seed=1)


@pytest.mark.parametrize("builder", ["genai", "own"])
def test_onnx_has_the_bits_of_each_layer(builder: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("edgetune.export.onnx")
    pytest.importorskip("onnxruntime_genai")
    from edgetune.export.onnx_graph import read_packed
    from edgetune.recipe_export import OnnxExport

    source = make_tiny_model(tmp_path / "model")
    config = Rtn(group_size=32, sym=False, allocate=Allocate(budget=6, choices=[4, 8]))
    measured = sensitivity.run(config, source, tmp_path / "measured", measured=ROWS)
    checkpoint = run(config, source, tmp_path / "checkpoint", sensitivity=measured)
    made = onnx.run(OnnxExport(builder=builder), checkpoint, tmp_path / "onnx")
    assert made.manifest.notes["integers"] == {"layers": 14, "differences": 0}
    nodes = read_packed(made.path / "model.onnx")
    assert {node.bits for name, node in nodes.items() if "layers" in name} == {4, 8}
