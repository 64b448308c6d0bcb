"""Damping chosen by held-out error: against float64, in the walk, and in the stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from edgetune.artifact import Artifact
from edgetune.compress import layerwise, sensitivity
from edgetune.compress.architectures import SHARED_INPUTS
from edgetune.compress.checkpoint import load_dequantized, read_layers
from edgetune.compress.damping import DAMPINGS, EVERY, Moments, Seen, heldout_loss, joined, least_damping
from edgetune.compress.gptq import gptq_quantize
from edgetune.compress.layerwise import Solve, load_model, quantize_blocks
from edgetune.compress.quantize import check, planned_identity, run
from edgetune.compress.scheme import SEARCH, Quantized, Scheme
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import DataError, RecipeError, StageError, UnsupportedError
from edgetune.recipe import CompressStep, Gptq, parse_as
from edgetune.recipe_export import Calibration
from tests.compress.test_gptq_options import inputs_of
from tests.compress.test_layerwise import rounding, with_results
from tests.oracles import damping_float64

ROWS = CalibrationSet(np.random.default_rng(1).integers(0, 512, (8, 16)))
HELD_OUT = {"group_size": 32, "sym": False, "damping": "held-out"}


def layer(seed: int, *, n_rows: int = 8, T: int = 12, C: int = 32) -> tuple[Tensor, Tensor]:
    """A weight [R, C] and rows [N, T, C] of inputs that covary, in float64."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(C, C, generator=rng, dtype=torch.float64)
    rows = torch.randn(n_rows, T, C, generator=rng, dtype=torch.float64) @ mix
    return torch.randn(10, C, generator=rng, dtype=torch.float64), rows


def solvers(bits: int = 3) -> dict[float, Solve[Quantized]]:
    def with_damping(share: float) -> Solve[Quantized]:
        def solve(_: Sequence[str], weight: Tensor, hessian: Tensor | None, cross: Tensor | None) -> Any:
            assert hessian is not None
            made = gptq_quantize(
                weight, hessian, Scheme(bits, 16, sym=False), damp_percent=share, search=True, weighted=True,
                cross=cross, correction=0.5,
            )  # fmt: skip
            return made.quantized, made.fallbacks

        return solve

    return {share: with_damping(share) for share in DAMPINGS}


def seen(rows: Tensor, floats: Tensor | None = None, *, apart: bool = True) -> Seen:
    """Rows [N, T, C] as a walk shows them, three at once."""
    found = Seen(rows.shape[2], apart=apart, dtype=torch.float64)
    for first in range(0, len(rows), 3):
        part = slice(first, first + 3)
        found.add(rows[part], None if floats is None else floats[part], first)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_the_chosen_damping_is_the_oracles(seed: int) -> None:
    W, rows = layer(seed)
    errors = damping_float64.heldout_errors(
        W.numpy(), rows.numpy(), DAMPINGS, every=EVERY, bits=3, group_size=16, factors=SEARCH
    )
    assert least_damping(solvers(), ["a"], W, seen(rows).parts) == DAMPINGS[int(np.argmin(errors))]


def test_few_rows_want_more_damping_than_many() -> None:
    chosen = [
        [least_damping(solvers(), ["a"], *(lambda W, X: (W, seen(X).parts))(*layer(seed, T=T))) for seed in range(8)]
        for T in (5, 200)
    ]
    assert np.mean(np.log(chosen[0])) > np.mean(np.log(chosen[1]))


def test_moments_apart_are_those_of_their_rows_and_together_of_all() -> None:
    _, rows = layer(7, n_rows=9)
    floats = rows + 0.1 * rows.square()
    held = [3, 7]
    shown = [row for row in range(9) if row not in held]
    parts = seen(rows, floats).parts
    for part, places in zip(parts, (shown, held), strict=True):
        X, F = rows[places].flatten(0, 1), floats[places].flatten(0, 1)
        torch.testing.assert_close(part.H, 2 / len(X) * X.T @ X)
        torch.testing.assert_close(part.cross, 2 / len(X) * (F - X).T @ X)
        assert part.n_inputs == len(X)
    (whole,) = seen(rows, floats, apart=False).parts
    H, cross = joined(parts)
    torch.testing.assert_close(H, whole.H)
    torch.testing.assert_close(cross, whole.cross)
    assert parts == []
    assert joined([]) == (None, None)


def test_the_held_out_loss_is_the_distance_from_what_the_float_model_gave() -> None:
    W, rows = layer(8)
    X, F = rows.flatten(0, 1), (rows + 0.2 * rows.flip(0)).flatten(0, 1)
    held = Moments(2 / len(X) * X.T @ X, 2 / len(X) * (F - X).T @ X, len(X))
    made = [gptq_quantize(W, held.H, Scheme(bits, 16, sym=False)).quantized.dequantize(W.dtype) for bits in (2, 3, 4)]
    direct = [float(2 * (X @ Q.T - F @ W.T).square().sum(1).mean()) for Q in made]
    found = [heldout_loss(W, Q, held) for Q in made]
    assert np.diff(found) == pytest.approx(np.diff(direct), rel=1e-9)


def test_a_damping_that_cannot_be_solved_with_is_passed_over() -> None:
    W, rows = layer(9)

    def fails(*_: object) -> Any:
        raise StageError("the Hessian is not positive definite")

    one = dict.fromkeys(DAMPINGS, fails) | {0.05: solvers()[0.05]}
    assert least_damping(one, ["a"], W, seen(rows).parts) == 0.05
    with pytest.raises(StageError, match="not positive definite"):
        least_damping(dict.fromkeys(DAMPINGS, fails), ["a"], W, seen(rows).parts)
    with pytest.raises(DataError, match="holds out every 4th calibration row, and there are fewer"):
        least_damping(one, ["a"], W, seen(rows[:3]).parts)


def test_the_walk_holds_every_fourth_row_out(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 48)  # 3 rows at once
    found: list[tuple[Tensor, ...]] = []

    def choose(names: Sequence[str], _: Tensor, parts: Sequence[Moments]) -> tuple[Solve[Quantized], float]:
        shown = [part.H.clone() for part in parts]

        def solve(names: Sequence[str], W: Tensor, H: Tensor | None, cross: Tensor | None) -> Any:
            assert H is not None
            found.append((*shown, H.clone()))
            return rounding(names, W, H)

        return solve, 0.2

    results = quantize_blocks(
        load_model(tiny_model), ROWS.ids, rounding, work=tmp_path, key="k", choose=choose, both=True
    )
    assert all(result.damping == 0.2 for result in results.values())
    names = [f"model.layers.{i}.{group[0]}" for i in range(2) for group in SHARED_INPUTS]
    inputs = inputs_of(with_results(tiny_model, results), names)
    assert len(found) == len(names)
    held = np.arange(8) % 4 == 3
    for name, moments in zip(names, found, strict=True):
        for H, chosen in zip(moments, (~held, held, held | ~held), strict=True):
            X = inputs[name].unflatten(0, (8, 16))[chosen].flatten(0, 1)
            assert torch.allclose(H, 2 / len(X) * X.T @ X, rtol=1e-3, atol=1e-5 * float(X.square().mean())), name


def test_the_stage_solves_each_layer_with_its_damping(tiny_model: Artifact, tmp_path: Path) -> None:
    made = run(Gptq(**HELD_OUT), tiny_model, tmp_path / "made", calibration=ROWS)
    chosen = made.manifest.notes["damping"]
    assert set(chosen) == set(read_layers(made.path))
    assert set(chosen.values()) <= set(DAMPINGS)
    first = "model.layers.0.self_attn.q_proj"
    fixed = Gptq(group_size=32, sym=False, damp_percent=chosen[first])
    other = run(fixed, tiny_model, tmp_path / "fixed", calibration=ROWS)
    assert torch.equal(read_layers(made.path)[first].q, read_layers(other.path)[first].q)
    assert "damping" not in other.manifest.notes
    assert "damp_percent" not in json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert torch.isfinite(load_dequantized(made.path)(torch.from_numpy(ROWS.ids)).logits).all()


def test_a_cut_walk_ends_in_the_same_bytes(tiny_model: Artifact, tmp_path: Path) -> None:
    config = Gptq(**HELD_OUT, correction=0.5)

    class CutError(Exception):
        pass

    def cut(done: int, *_: object) -> None:
        if done == 1:
            raise CutError

    whole = run(config, tiny_model, tmp_path / "whole", calibration=ROWS)
    with pytest.raises(CutError):
        run(config, tiny_model, tmp_path / "cut", calibration=ROWS, progress=cut)
    assert run(config, tiny_model, tmp_path / "cut", calibration=ROWS).digest == whole.digest


def test_what_cannot_be_done_is_refused(tiny_model: Artifact) -> None:
    with pytest.raises(RecipeError, match="chooses the damping of each layer; leave damp_percent out"):
        parse_as(CompressStep, {"gptq": {"damping": "held-out", "damp_percent": 0.01}}, "step")
    sizes = json.loads((tiny_model.path / "config.json").read_bytes())
    with pytest.raises(UnsupportedError, match="every 4th calibration row, of which there are 3; raise"):
        check(Gptq(**HELD_OUT, calibration=Calibration(n_samples=3)), sizes)
    check(Gptq(**HELD_OUT, calibration=Calibration(n_samples=4)), sizes)


def test_unset_it_is_in_no_identity() -> None:
    assert "damping" not in Gptq().model_dump()
    assert Gptq(damping="fixed").model_dump() == Gptq().model_dump()
    named = Gptq(damping="held-out")
    assert named.model_dump() == {k: v for k, v in Gptq().model_dump().items() if k != "damp_percent"} | {
        "damping": "held-out"
    }
    assert Gptq.model_validate_json(named.model_dump_json()) == named
    assert planned_identity(named, "model", "rows") != planned_identity(Gptq(), "model", "rows")
    assert "damping" not in json.loads(sensitivity.shared(named))
