"""Distillation into a checkpoint whose integers stay: its scales against float64, both kinds from rows to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgetune.artifact import Artifact
from edgetune.commands import run_commands
from edgetune.compress import distill, into, quantize, teacher
from edgetune.compress.checkpoint import load_dequantized, open_file, read_layers
from edgetune.compress.correction import FOLDER, read_correction
from edgetune.compress.gptq import gptq_quantize
from edgetune.compress.layerwise import load_model
from edgetune.compress.scaled_linear import ScaledLinear
from edgetune.compress.scheme import Quantized, Scheme
from edgetune.data.calibration import CalibrationSet
from edgetune.data.render import Rendered, rows_digest
from edgetune.errors import RecipeError, UnsupportedError
from edgetune.export.decoder_source import quantizer_of
from edgetune.recipe import Candidate, CompressStep, Gptq, Rtn, parse_as
from edgetune.recipe_distill import Distill
from tests.compress.conftest import kill_distilling
from tests.compress.test_kernels import problem
from tests.oracles import scales_float64

CONFIG = Distill(
    into="scales", batch_size=4, max_steps=12, eval_steps=3, eval_rows=4, learning_rate=2e-2, top_k=32,
    label_weight=0.0, report_to=[],
)  # fmt: skip
BASE: dict[str, Any] = {"bits": 2, "group_size": 32, "sym": False}
ROWS = CalibrationSet(np.random.default_rng(2).integers(0, 512, (8, 16)))


@pytest.fixture(autouse=True)
def _thirty_two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(into, "compute_dtype", lambda device: torch.float32)


@pytest.fixture(scope="module")
def integers(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return quantize.run(Rtn(**BASE), tiny_model, tmp_path_factory.mktemp("integers") / "made")


@pytest.fixture(scope="module")
def said(tiny_model: Artifact, rows: list[Rendered], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return teacher.run(CONFIG, tiny_model, tmp_path_factory.mktemp("said") / "pack", rows=rows)


def wide(layer: Quantized) -> Quantized:
    return Quantized(layer.q, layer.scales.double(), layer.zero_point, layer.g_idx)


def out_of_place(seed: int) -> Quantized:
    """A layer with float64 scales whose columns have left their groups."""
    W, H = problem(seed, R=12)
    layer = wide(gptq_quantize(W, H, Scheme(3, 16, sym=False), static_groups=False).quantized)
    assert not torch.equal(layer.g_idx, layer.g_idx.sort().values)
    return layer


@pytest.mark.parametrize("paired", [False, True])
def test_trained_scales_are_those_of_plain_adam_in_float64(paired: bool) -> None:
    layer, rng = out_of_place(1), torch.Generator().manual_seed(1)
    R, C = layer.q.shape
    X, aim = (torch.randn(n, m, generator=rng, dtype=torch.float64) for n, m in ((30, C), (30, R)))
    A, B = (0.1 * torch.randn(n, m, generator=rng, dtype=torch.float64) for n, m in ((2, C), (R, 2)))
    linear = ScaledLinear(layer, pair=(A, B) if paired else None)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.02, weight_decay=0.0)
    losses, P = [], aim.softmax(1)
    for _ in range(5):
        loss = (P * (P.log() - linear(X).log_softmax(1))).sum(1).mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    d, expected = scales_float64.trained(
        layer.q.numpy(), layer.zero_point.numpy(), layer.scales.numpy(), layer.g_idx.numpy(),
        (B @ A).numpy() * paired, X.numpy(), P.numpy(), steps=5, learning_rate=0.02,
    )  # fmt: skip
    assert losses == pytest.approx(expected, rel=1e-9)
    assert np.allclose(linear.factors.detach().numpy(), d, rtol=1e-6, atol=1e-9)
    stored = layer.scales.numpy() * (1 + d)
    assert np.allclose(linear.stored().double().numpy(), stored, rtol=2**-10)


def test_the_product_s_gradients_are_right_and_the_factors_alone_are_kept() -> None:
    linear = ScaledLinear(out_of_place(2), bias=torch.randn(12, dtype=torch.float64))
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, linear.levels.shape[1], generator=rng, dtype=torch.float64, requires_grad=True)
    nn.init.normal_(linear.factors, std=0.1)
    assert torch.autograd.gradcheck(linear, (x,))
    aim = torch.randn(2, 3, 12, generator=rng, dtype=torch.float64)
    (found,) = torch.autograd.grad((linear(x.detach()) - aim).square().sum(), [linear.factors])
    d = linear.factors.detach().clone().requires_grad_()
    weight = (linear.scales * (1 + d))[:, linear.index] * linear.levels
    (wanted,) = torch.autograd.grad((x.detach() @ weight.T + linear.bias - aim).square().sum(), [d])
    assert torch.allclose(found, wanted, rtol=1e-9)
    assert set(linear.state_dict()) == {"factors"}


def test_untrained_scales_are_what_they_were(integers: Artifact) -> None:
    for layer in read_layers(integers.path).values():
        linear = ScaledLinear(layer)
        assert torch.equal(linear.stored(), layer.scales)
        assert torch.equal(linear.weight_now(torch.float32), layer.dequantize())


@pytest.mark.parametrize("kind", ["scales", "adapter"])
def test_a_training_that_makes_nothing_better_is_undone(
    kind: Any, integers: Artifact, tiny_model: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"into": kind, "max_steps": 3, "eval_steps": 3, "learning_rate": 3.0})
    made = distill.run(config, integers, tiny_model, said, tmp_path / "made", rows=rows)
    assert made.manifest.notes["before"]["loss"] < min(found for _, found in made.manifest.notes["heldout_loss"])
    assert distill.AS_BEFORE in made.manifest.fallbacks
    ours, theirs = load_dequantized(made.path).state_dict(), load_dequantized(integers.path).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["scales", "adapter"])
@pytest.mark.parametrize("more", [{}, {"checkpoint": "compressed-tensors"}, {"on_policy": 0.5, "max_new_tokens": 4}])
def test_integers_stay_and_what_is_trained_brings_the_model_nearer(
    kind: Any, more: dict[str, Any], tiny_model: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path
) -> None:
    form = {key: more[key] for key in more if key == "checkpoint"}
    before = quantize.run(Rtn(**BASE, **form), tiny_model, tmp_path / "integers")
    keys = {key: more[key] for key in more if key != "checkpoint"} | ({"rank": 8} if kind == "adapter" else {})
    config = CONFIG.model_copy(update={"into": kind, **keys})
    made = distill.run(config, before, tiny_model, said, tmp_path / "made", rows=rows)
    assert made.identity == distill.planned_identity(
        config, before.identity, tiny_model.identity, said.identity, rows_digest(rows), 0
    )
    assert (made.manifest.kind, before.manifest.kind) == ("gptq", "gptq")
    ours, theirs = read_layers(made.path), read_layers(before.path)
    for name, layer in ours.items():
        assert torch.equal(layer.q, theirs[name].q)
        assert torch.equal(layer.zero_point, theirs[name].zero_point)
        assert torch.equal(layer.scales, theirs[name].scales) == (kind == "adapter")
    assert made.manifest.files.keys() - before.manifest.files.keys() == (
        {f"{FOLDER}/adapter_config.json", f"{FOLDER}/adapter_model.safetensors"} if kind == "adapter" else set()
    )
    assert loss(tiny_model, made, rows) < 0.9 * loss(tiny_model, before, rows)
    assert made.manifest.notes["before"]["loss"] > min(found for _, found in made.manifest.notes["heldout_loss"])
    for key in ("bits", "group_size", "sym", "checkpoint"):
        assert getattr(quantizer_of(made), key) == getattr(quantizer_of(before), key)
    assert made.manifest.notes["vllm"] == before.manifest.notes["vllm"]
    scheme = made.manifest.scheme
    assert scheme is not None
    assert (quantizer_of(made).recover is not None) == (kind == "adapter")
    served = run_commands(made, Path("place"))[1]
    assert ("--enable-lora --max-lora-rank 8" in served) == (kind == "adapter")
    assert f"--quantization {form.get('checkpoint', 'gptq')}" in served
    stored = before.manifest.scheme or {}
    shapes = [layer.q.shape for layer in ours.values()]
    spent = sum(16 * 8 * (R + C) for R, C in shapes) / sum(R * C for R, C in shapes)
    more_bits = scheme["bits_per_weight"] - stored["bits_per_weight"]
    assert more_bits == pytest.approx(spent if kind == "adapter" else 0, abs=2e-4)


def loss(teacher_: Artifact, student: Artifact, rows: list[Rendered]) -> float:
    """Mean KL(teacher || student) at the labelled positions, in float64, by one forward of each row."""
    models = [load_model(teacher_).double(), load_dequantized(student.path, torch.float64)]
    found = []
    with torch.no_grad():
        for row in rows:
            p, q = (model(torch.tensor([row.ids])).logits[0].log_softmax(1) for model in models)
            at = [t - 1 for t, label in enumerate(row.labels) if label and t]
            found.append((p.exp() * (p - q)).sum(1)[at])
    return float(torch.cat(found).mean())


def test_an_adapter_is_peft_s_own(
    tiny_model: Artifact, integers: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path
) -> None:
    from peft import PeftModel

    config = CONFIG.model_copy(update={"into": "adapter", "rank": 4})
    made = distill.run(config, integers, tiny_model, said, tmp_path / "made", rows=rows)
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        ours = load_dequantized(made.path)(ids).logits
        theirs = PeftModel.from_pretrained(load_dequantized(integers.path), str(made.path / FOLDER))(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_scales_are_trained_below_a_correction(
    tiny_model: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path
) -> None:
    fitted = Gptq(**BASE, recover={"rank": 4})
    before = quantize.run(fitted, tiny_model, tmp_path / "integers", calibration=ROWS)
    model = into.attach(CONFIG, before.path, "cpu")
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load_dequantized(before.path)(ids).logits, atol=1e-5)
    made = distill.run(CONFIG, before, tiny_model, said, tmp_path / "made", rows=rows)
    pairs, kept = read_correction(made.path), read_correction(before.path)
    assert all(torch.equal(pairs[name][0], A) and torch.equal(pairs[name][1], B) for name, (A, B) in kept.items())
    assert quantizer_of(made).recover == fitted.recover
    assert loss(tiny_model, made, rows) < loss(tiny_model, before, rows)


@pytest.mark.parametrize("kind", ["scales", "adapter"])
def test_a_cut_training_ends_in_the_same_bytes(
    kind: Any, tiny_model: Artifact, integers: Artifact, rows: list[Rendered], said: Artifact, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = CONFIG.model_copy(update={"into": kind, "max_steps": 6})

    def run(out: str) -> Artifact:
        return distill.run(config, integers, tiny_model, said, tmp_path / out, rows=rows)

    whole = run("whole")
    with monkeypatch.context() as patch:
        kill_distilling(patch, step=5)
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    resumed = run("cut")
    assert resumed.manifest.files == whole.manifest.files
    assert resumed.manifest.notes == whole.manifest.notes


def test_everything_but_scales_is_copied(integers: Artifact, tmp_path: Path) -> None:
    linears = {}
    for name, layer in read_layers(integers.path).items():
        linears[name] = ScaledLinear(layer)
        nn.init.constant_(linears[name].factors, 0.5)
    into.write_scales(integers.path, tmp_path, linears)
    with open_file(integers.path / "model.safetensors") as before, open_file(tmp_path / "model.safetensors") as after:
        assert list(after.keys()) == list(before.keys())
        for name in before.keys():  # noqa: SIM118
            times = 1.5 if name.endswith(".scales") else 1
            assert torch.equal(after.get_tensor(name), before.get_tensor(name) * times), name
            assert after.get_tensor(name).dtype == before.get_tensor(name).dtype


@pytest.mark.parametrize(
    ("steps", "says"),
    [
        ([{"distill": {"into": "scales"}}], "trains what an rtn or gptq step made; put one before it"),
        (
            [{"prune": {"layers": 1}}, {"distill": {"into": "adapter"}}, {"rtn": {}}],
            "trains what an rtn or gptq step made; put one before it",
        ),
        ([{"rtn": {}}, {"distill": {}}], "integers can only be exported; put distill before rtn"),
        (
            [{"rtn": {}}, {"distill": {"into": "scales"}}, {"distill": {"into": "adapter"}}],
            "distill after distill: integers can only be exported; leave one out",
        ),
        ([{"rtn": {}}, {"distill": {"into": "scales"}}, {"gptq": {}}], "integers can only be exported; leave one out"),
        ([{"rtn": {}}, {"distill": {"into": "scales", "student": "base"}}], "drops what rtn made; leave it out"),
        (
            [{"rtn": {"recover": {}}}, {"distill": {"into": "adapter"}}],
            r"writes where rtn\.recover does; leave one out, or train into scales",
        ),
        (
            [{"sparsify": {"sparsity": 0.5}}, {"rtn": {}}, {"distill": {"into": "adapter"}}],
            "trains what it set to zero; leave sparsify out",
        ),
    ],
)
def test_what_cannot_follow_is_refused(steps: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        parse_as(Candidate, {"compress": steps}, "candidate")


def test_keys_that_are_not_read_are_refused(tiny_model: Artifact) -> None:
    from edgetune.compress import chain

    for keys, says in (
        ({"into": "scales", "rank": 4}, "rank is read with into: adapter only"),
        ({"into": "scales", "hidden_weight": 1.0}, "are not read with into; remove them"),
    ):
        with pytest.raises(RecipeError, match=says):
            parse_as(CompressStep, {"distill": keys}, "step")
    sizes = json.loads((tiny_model.path / "config.json").read_bytes())
    steps = [{"rtn": {"group_size": 32}}, {"distill": {"into": "adapter", "rank": 32}}]
    with pytest.raises(UnsupportedError, match=r"distill\.rank=32 is no less than the 32 features of .*k_proj"):
        chain.check(parse_as(Candidate, {"compress": steps}, "candidate"), sizes)


def test_a_candidate_says_what_is_written_beside_its_integers() -> None:
    steps: list[dict[str, Any]] = [{"prune": {"layers": 1}}, {"gptq": {}}]
    plain = parse_as(Candidate, {"compress": steps}, "candidate")
    scales = parse_as(Candidate, {"compress": [*steps, {"distill": {"into": "scales"}}]}, "candidate")
    adapter = parse_as(Candidate, {"compress": [*steps, {"distill": {"into": "adapter"}}]}, "candidate")
    assert plain.quantizer == scales.quantizer == Gptq()
    assert adapter.quantizer is not None
    assert adapter.quantizer.recover is not None
    assert adapter.quantizer.recover.rank == 16
    assert plain.n_float_steps == scales.n_float_steps == adapter.n_float_steps == 1


def test_unset_they_are_in_no_identity() -> None:
    assert not {"into", "rank"} & set(Distill().model_dump())
