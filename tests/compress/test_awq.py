"""AWQ: the search against a float64 oracle, the same function before rounding, and less lost after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgetune.artifact import Artifact
from edgetune.compress import quantize, scale
from edgetune.compress.awq import POWERS, Heads, channel_sizes, find_scales
from edgetune.compress.checkpoint import load_dequantized
from edgetune.compress.hessian import Hessian
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Scheme
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import RecipeError, StageError, UnsupportedError
from edgetune.recipe import Awq, Candidate, Rtn, parse_as
from tests.conftest import make_tiny_model
from tests.export.test_gguf_families import make

ROWS = CalibrationSet(np.random.default_rng(0).integers(3, 500, (12, 32)))
GRID = {"bits": 3, "group_size": 32, "sym": False}


def uneven(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, 64] and inputs [200, 64], a few channels of which are much larger than the others."""
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(200, 64, generator=draw)
    X[:, ::9] *= 30
    return torch.randn(24, 64, generator=draw), X


def hessian(X: torch.Tensor) -> torch.Tensor:
    return 2 * X.T @ X / len(X)


def test_the_power_is_the_best_of_the_grid() -> None:
    W, X = uneven()
    scheme = Scheme(3, 32, False)
    found = find_scales([W[:10], W[10:]], hessian(X), scheme)
    sizes = X.double().square().mean(0).sqrt()
    errors = []
    for step in range(POWERS + 1):
        s = sizes ** (step / POWERS)
        s = s / (s.max() * s.min()).sqrt() if step else torch.ones_like(s)
        rounded = rtn_quantize((W * s).float(), scheme).dequantize().double() / s
        errors.append(float(((X.double() @ (W.double() - rounded).T) ** 2).sum()))
    assert found.power == int(np.argmin(errors)) / POWERS
    assert 0 < found.power < 1
    assert found.error == pytest.approx(min(errors) / errors[0], rel=1e-3)
    assert float(found.s.max() * found.s.min()) == pytest.approx(1, rel=1e-4)


def test_channels_of_one_value_row_share_a_scale() -> None:
    W, X = uneven()
    heads = Heads(n_kv=2, n_queries=4, size=8)
    sizes = channel_sizes(hessian(X), heads).view(2, 4, 8)
    assert torch.equal(sizes, sizes[:, :1].expand_as(sizes))
    s = find_scales([W], hessian(X), Scheme(3, 32, False), heads).s.view(2, 4, 8)
    assert torch.equal(s, s[:, :1].expand_as(s))


def test_a_dead_channel_and_an_empty_layer_are_left_alone() -> None:
    W, X = uneven()
    X[:, 5] = 0
    assert torch.isfinite(find_scales([W], hessian(X), Scheme(4, 32)).s).all()
    nothing = find_scales([torch.zeros(4, 64)], hessian(X), Scheme(4, 32))
    assert (nothing.power, nothing.error) == (0.0, 1.0)
    assert torch.equal(nothing.s, torch.ones(64))


def test_a_hessian_that_is_not_finite_names_its_layers(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hessian, "add", lambda self, *_: self.H.fill_(torch.inf))
    names = r"^model\.layers\.0\.self_attn\.q_proj \+ .*v_proj: the Hessian is not finite: an activation overflowed"
    with pytest.raises(StageError, match=names):
        scale.run(Awq(**GRID), tiny_model, tmp_path / "out", calibration=ROWS)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_function_stays_and_rounding_costs_less(family: str, tmp_path: Path) -> None:
    """Biases of values and norms of heads included; key/value heads are shared by two query heads each."""
    source = make(tmp_path / "model", family)
    _widen(source, tmp_path / "uneven")
    source = Artifact.open(tmp_path / "uneven")
    made = scale.run(Awq(**GRID), source, tmp_path / "scaled", calibration=ROWS)
    assert made.identity == scale.planned_identity(Awq(**GRID), source.identity, ROWS.digest)
    before, after = logits(source.path), logits(made.path)
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)
    plain, scaled = (
        (logits(quantize.run(Rtn(**GRID), model, tmp_path / f"rtn {n}").path, quantized=True) - before).square().mean()
        for n, model in enumerate((source, made))
    )
    assert scaled < 0.8 * plain
    assert any(found["power"] > 0 for found in made.manifest.notes["scales"].values())
    assert all(found["error"] <= 1 for found in made.manifest.notes["scales"].values())


def test_a_killed_walk_scales_no_block_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_tiny_model(tmp_path / "model", layers=3)
    whole = scale.run(Awq(**GRID), source, tmp_path / "whole", calibration=ROWS)
    begun: list[int] = []
    scale_block = scale._scale_block

    def dies_once(model: Any, index: int, *args: Any) -> Any:
        begun.append(index)
        if begun == [0, 1]:
            raise KeyboardInterrupt
        return scale_block(model, index, *args)

    monkeypatch.setattr(scale, "_scale_block", dies_once)
    with pytest.raises(KeyboardInterrupt):
        scale.run(Awq(**GRID), source, tmp_path / "cut", calibration=ROWS)
    again = scale.run(Awq(**GRID), source, tmp_path / "cut", calibration=ROWS)
    assert begun == [0, 1, 1, 2]
    assert again.manifest == whole.manifest


def _widen(source: Artifact, out: Path) -> None:
    """Give some channels of the norms much larger gains, as trained models have."""
    from edgetune.artifact import draft
    from edgetune.data.golden import Golden
    from edgetune.sources import copy_tokenizer

    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[::9] *= 20
    with draft(out, kind="model", stage="test/1", config={"uneven": source.identity}) as pending:
        model.save_pretrained(pending.path)
        copy_tokenizer(source.path, pending.path)
        Golden.read(source.path).write(pending.path)


def logits(folder: Path, *, quantized: bool = False) -> torch.Tensor:
    model: Any = load_dequantized(folder, torch.float32) if quantized else None
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.from_numpy(ROWS.ids[:4])).logits
    return found


@pytest.mark.parametrize("after", [[], [{"rtn": {"bits": 4, "group_size": 32}}], [{"prune": {"layers": 1}}]])
def test_the_step_after_it_must_round_to_its_grid(after: list[dict[str, Any]]) -> None:
    with pytest.raises(RecipeError, match="awq scales for bits: 3, group_size: 32, sym: false; let an rtn or gptq"):
        parse_as(Candidate, {"compress": [{"awq": GRID}, *after]}, "candidate")
    parse_as(Candidate, {"compress": [{"awq": GRID}, {"gptq": GRID}]}, "candidate")


def test_groups_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", hidden=48)
    with pytest.raises(UnsupportedError, match="group_size=32 does not divide in_features=48"):
        scale.run(Awq(**GRID), source, tmp_path / "out", calibration=ROWS)
    assert not (tmp_path / "out").exists()
