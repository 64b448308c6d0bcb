"""What is done about what rounding lost: scales learned block by block, and a low-rank correction beside integers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetune.artifact import Artifact
from edgetune.commands import run_commands
from edgetune.compress import layerwise
from edgetune.compress.checkpoint import load_dequantized, read_layers
from edgetune.compress.correction import CONFIG, FOLDER, WEIGHTS, low_rank, read_correction
from edgetune.compress.hessian import Hessian, output_loss
from edgetune.compress.layerwise import load_model
from edgetune.compress.quantize import check, planned_identity, run
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Quantized, Scheme
from edgetune.compress.tune import tune_scales
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import ArtifactError, RecipeError, StageError, UnsupportedError
from edgetune.recipe import CompressStep, Gptq, Rtn, parse_as
from edgetune.recipe_quantize import Recover
from tests.compress.test_kernels import problem
from tests.compress.test_layerwise import rounding
from tests.oracles import recovery_float64

ROWS = CalibrationSet(np.random.default_rng(2).integers(0, 512, (8, 16)))
TUNE = {"tune": {"steps": 8, "learning_rate": 0.01}}
RECOVER = {"recover": {"rank": 4}}


def lost(seed: int, bits: int = 3, R: int = 24) -> tuple[Tensor, Tensor]:
    """What rounding takes off a weight [R, C], and the Hessian of its inputs, in float64."""
    W, H = problem(seed, R=R)
    return W - rtn_quantize(W, Scheme(bits, 16)).dequantize(torch.float64), H


@pytest.mark.parametrize("rank", [1, 5, 16])
@pytest.mark.parametrize("R", [24, 96])  # narrower than its inputs, and wider
def test_eora_is_the_least_output_error_of_its_rank(rank: int, R: int) -> None:
    E, H = lost(1, R=R)
    A, B = low_rank(E, H, rank)
    expected = recovery_float64.eora(E.numpy(), H.numpy(), rank)
    assert np.allclose((B @ A).numpy(), expected, rtol=1e-8, atol=1e-12)
    left = output_loss(E - B @ A, H)
    rng = torch.Generator().manual_seed(rank)
    for _ in range(50):  # no matrix of that rank nearby is better
        moved = [part + 1e-3 * part.std() * torch.randn(part.shape, generator=rng).double() for part in (A, B)]
        assert output_loss(E - moved[1] @ moved[0], H) > left
    U, s, V = torch.linalg.svd(E)  # the best of that rank for the weight itself
    plain = U[:, :rank] * s[:rank] @ V[:rank]
    assert left < output_loss(E - plain, H)


@pytest.mark.parametrize("R", [24, 96])
def test_lqer_weighs_columns_alone(R: int) -> None:
    E, H = lost(2, R=R)
    A, B = low_rank(E, H, 5, "lqer")
    expected = recovery_float64.lqer(E.numpy(), np.sqrt(H.diagonal().numpy()), 5)
    assert np.allclose((B @ A).numpy(), expected, rtol=1e-8, atol=1e-12)
    A, B = low_rank(E, H.diagonal().diag(), 5, "eora")
    assert np.allclose((B @ A).numpy(), expected, rtol=1e-8, atol=1e-12)


def test_columns_that_were_never_active_and_bad_hessians() -> None:
    E, H = lost(3)
    H[4, :] = H[:, 4] = 0
    A, B = low_rank(E, H, 5)
    assert torch.isfinite(A).all()
    assert output_loss(E - B @ A, H) < output_loss(E, H)
    H[3, 3] = torch.nan
    with pytest.raises(StageError, match="not finite"):
        low_rank(E, H, 5)


def tiny(seed: int = 0) -> tuple[Quantized, Tensor, list[Tensor]]:
    """A layer with float64 scales, its float weight, and two batches of inputs [B, T, C]."""
    W, _ = problem(seed, R=12)
    rng = torch.Generator().manual_seed(seed)
    layer = rtn_quantize(W, Scheme(2, 16, sym=False))
    wide = Quantized(layer.q, layer.scales.double(), layer.zero_point, layer.g_idx)
    return wide, W, [torch.randn(2, 20, W.shape[1], generator=rng, dtype=torch.float64) for _ in range(2)]


def test_learned_scales_are_those_of_plain_adam_in_float64() -> None:
    layer, W, inputs = tiny()

    def outputs(weights: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
        return inputs[i] @ weights["a"].T, inputs[i] @ W.T

    found = tune_scales({"a": layer}, outputs, 2, steps=8, learning_rate=0.02)
    scales, errors = recovery_float64.tuned_scales(
        layer.q.numpy(), layer.scales.numpy(), layer.zero_point.numpy(), layer.g_idx.numpy(),
        [X.flatten(0, 1).numpy() for X in inputs], W.numpy(), steps=8, learning_rate=0.02,
    )  # fmt: skip
    assert np.allclose(found.scales["a"].double().numpy(), scales, rtol=2**-10)  # stored as float16
    assert found.scales["a"].dtype == torch.float16
    assert found.before == pytest.approx(errors[0], rel=1e-9)
    assert found.after == pytest.approx(errors[1], rel=2e-3)
    assert found.after < 0.95 * found.before


def test_what_is_no_better_is_not_kept() -> None:
    layer, _, inputs = tiny(1)
    half = Quantized(layer.q, layer.scales.half(), layer.zero_point, layer.g_idx)
    made = half.dequantize(torch.float64)

    def outputs(weights: Mapping[str, Tensor], i: int) -> tuple[Tensor, Tensor]:
        return inputs[i] @ weights["a"].double().T, inputs[i] @ made.T

    found = tune_scales({"a": half}, outputs, 2, steps=4, learning_rate=0.5)
    assert found.before == found.after == pytest.approx(0, abs=1e-12)
    assert torch.equal(found.scales["a"], half.scales)


def block_errors(source: Artifact, made: Artifact) -> list[float]:
    """Relative error of each block's output by one forward of each whole model."""
    found: list[list[Tensor]] = []
    for model in (load_model(source), load_dequantized(made.path)):
        states: list[Tensor] = []
        for block in model.model.layers:  # type: ignore[union-attr]
            block.register_forward_hook(lambda _, __, out, states=states: states.append(out))
        with torch.no_grad():
            model(torch.from_numpy(ROWS.ids))
        found.append(states)
    return [
        float(((b - a).square().sum(-1) / a.square().sum(-1)).mean()) for a, b in zip(found[0], found[1], strict=True)
    ]


def test_tuned_blocks_lie_nearer_to_the_float_models(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 64)  # 4 rows at once
    base = {"bits": 3, "group_size": 32, "sym": False}
    plain = run(Gptq(**base), tiny_model, tmp_path / "plain", calibration=ROWS)
    tuned = run(Gptq(**base, **TUNE), tiny_model, tmp_path / "tuned", calibration=ROWS)
    noted = tuned.manifest.notes["tuned"]
    assert list(noted) == ["model.layers.0", "model.layers.1"]
    assert all(after < before for before, after in noted.values())
    before, after = block_errors(tiny_model, plain), block_errors(tiny_model, tuned)
    assert [noted["model.layers.0"][0], noted["model.layers.0"][1]] == pytest.approx([before[0], after[0]], rel=0.02)
    assert noted["model.layers.1"][1] == pytest.approx(after[1], rel=0.02)
    assert all(b < a for a, b in zip(before, after, strict=True))
    ours, theirs = read_layers(tuned.path), read_layers(plain.path)
    first = "model.layers.0.self_attn.q_proj"
    assert torch.equal(ours[first].q, theirs[first].q)
    assert torch.equal(ours[first].zero_point, theirs[first].zero_point)
    assert not torch.equal(ours[first].scales, theirs[first].scales)
    assert "tuned" not in plain.manifest.notes


@pytest.mark.parametrize("more", [TUNE, RECOVER, TUNE | RECOVER | {"correction": 0.5}])
def test_a_cut_walk_ends_in_the_same_bytes(more: dict[str, Any], tiny_model: Artifact, tmp_path: Path) -> None:
    config = Gptq(bits=3, group_size=32, **more)

    class CutError(Exception):
        pass

    def cut(done: int, *_: object) -> None:
        if done == 1:
            raise CutError

    whole = run(config, tiny_model, tmp_path / "whole", calibration=ROWS)
    with pytest.raises(CutError):
        run(config, tiny_model, tmp_path / "cut", calibration=ROWS, progress=cut)
    assert run(config, tiny_model, tmp_path / "cut", calibration=ROWS).digest == whole.digest


@pytest.mark.parametrize("config", [Gptq(bits=3, group_size=32, **RECOVER), Rtn(bits=3, group_size=32, **RECOVER)])
def test_a_correction_is_a_peft_adapter_of_the_checkpoint(
    config: Gptq | Rtn, tiny_model: Artifact, tmp_path: Path
) -> None:
    from peft import PeftModel

    made = run(config, tiny_model, tmp_path / "made", calibration=ROWS)
    bare = tmp_path / "bare"
    shutil.copytree(made.path, bare)
    shutil.rmtree(bare / FOLDER)
    ids = torch.from_numpy(ROWS.ids[:2])
    with torch.no_grad():
        wanted = load_model(tiny_model)(ids).logits
        ours, without = load_dequantized(made.path)(ids).logits, load_dequantized(bare)(ids).logits
        theirs = PeftModel.from_pretrained(load_dequantized(bare), str(made.path / FOLDER))(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    served = run_commands(made, Path("my run"))[1]
    assert served.endswith("--enable-lora --max-lora-rank 8 --lora-modules 'corrected=my run/correction'")
    assert (ours - wanted).norm() < 0.9 * (without - wanted).norm()
    assert made.manifest.calibration == ROWS.digest
    assert made.manifest.identity == planned_identity(config, tiny_model.identity, ROWS.digest)
    plain = run(type(config)(bits=3, group_size=32), tiny_model, tmp_path / "plain", calibration=ROWS)
    errors = [found.manifest.notes["mean_relative_error"] for found in (made, plain)]
    assert errors[0] < errors[1]
    assert made.manifest.scheme is not None
    assert plain.manifest.scheme is not None
    more = made.manifest.scheme["bits_per_weight"] - plain.manifest.scheme["bits_per_weight"]
    shapes = {name: layer.q.shape for name, layer in read_layers(made.path).items()}
    spent = sum(16 * 4 * (R + C) for R, C in shapes.values()) / sum(R * C for R, C in shapes.values())
    assert more == pytest.approx(spent, abs=2e-4)


def test_a_layer_is_fitted_to_what_the_corrected_ones_before_give(tiny_model: Artifact, tmp_path: Path) -> None:
    made = run(Gptq(bits=2, group_size=32, **RECOVER), tiny_model, tmp_path / "made", calibration=ROWS)
    name = "model.layers.1.mlp.gate_proj"
    model, seen = load_dequantized(made.path), []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        model(torch.from_numpy(ROWS.ids))
    E = load_model(tiny_model).get_submodule(name).weight.double() - read_layers(made.path)[name].dequantize()
    A, B = (part.double() for part in read_correction(made.path)[name])
    H = 2 / len(seen[0]) * seen[0].T @ seen[0]
    best = recovery_float64.eora(E.detach().numpy(), H.numpy(), 4)
    left, least = output_loss(E - B @ A, H), output_loss(E - torch.from_numpy(best), H)
    assert left == pytest.approx(least, rel=1e-3)


def test_the_layer_is_named_whose_hessian_is_not_finite(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(hessian: Hessian, *_: Tensor) -> None:
        hessian.H.fill_(torch.inf)

    monkeypatch.setattr(Hessian, "add", overflow)
    with pytest.raises(StageError, match=r"^model\.layers\.0\.self_attn\.q_proj: the Hessian is not finite"):
        run(Rtn(group_size=32, **RECOVER), tiny_model, tmp_path / "made", calibration=ROWS)


def test_damaged_corrections(tiny_model: Artifact, tmp_path: Path) -> None:
    made = run(Rtn(group_size=32, **RECOVER), tiny_model, tmp_path / "made", calibration=ROWS)
    assert json.loads((made.path / FOLDER / CONFIG).read_text())["r"] == 4
    file = made.path / FOLDER / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged or missing"):
        load_dequantized(made.path)
    file.unlink()
    with pytest.raises(ArtifactError, match="damaged or missing"):
        load_dequantized(made.path)


def test_what_cannot_be_done_is_refused(tiny_model: Artifact) -> None:
    sizes = json.loads((tiny_model.path / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match=r"recover.rank=32 is no less than the 32 features of .*k_proj"):
        check(Rtn(group_size=32, recover=Recover(rank=32)), sizes)
    check(Rtn(group_size=32, recover=Recover(rank=31)), sizes)
    with pytest.raises(RecipeError, match=r"rtn: calibration is not read by rtn without recover; remove it$"):
        parse_as(CompressStep, {"rtn": {"calibration": {}}}, "step")
    found = parse_as(CompressStep, {"rtn": {"recover": {}}}, "step").quantizer
    assert found is not None
    assert found.calibration is not None
    assert parse_as(CompressStep, {"rtn": {"recover": {}, "calibration": None}}, "step").quantizer == found


def test_a_correction_is_never_left_out_silently(tiny_model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="fitted to the inputs of calibration rows"):
        layerwise.quantize_blocks(load_model(tiny_model), None, rounding, work=tmp_path, key="k", correct=low_rank_4)


def low_rank_4(error: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    return low_rank(error, hessian, 4)


def test_unset_options_are_in_no_identity() -> None:
    assert not {"tune", "recover"} & set(Gptq().model_dump())
    assert not {"recover", "calibration"} & set(Rtn().model_dump())
    for more in (TUNE, RECOVER):
        assert planned_identity(Gptq(**more), "model", "rows") != planned_identity(Gptq(), "model", "rows")
    one = Rtn(**RECOVER)
    assert planned_identity(one, "model", "a") != planned_identity(one, "model", "b")
    assert planned_identity(Rtn(), "model", "a") == planned_identity(Rtn(), "model", None)
