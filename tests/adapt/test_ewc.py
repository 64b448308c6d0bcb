"""Elastic weight consolidation: what F is, what the penalty is, and that it holds general text in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgetune.adapt import ewc, merge, sft
from edgetune.adapt.ewc import Consolidation, diagonal_fisher, factored_fisher, general_rows
from edgetune.artifact import Artifact
from edgetune.data.formats import Row
from edgetune.data.golden import Golden
from edgetune.data.render import Rendered, render
from edgetune.errors import DataError
from edgetune.recipe_training import Adapt

SMALL: dict[str, Any] = {"batch_size": 4, "max_steps": 12, "eval_steps": 6, "eval_rows": 4, "report_to": []}
GENERAL = np.random.default_rng(0).integers(3, 500, 16 * 128).tolist()
MEASURED = torch.tensor(np.random.default_rng(1).integers(3, 500, (4, 64)))


@pytest.fixture(scope="module")
def rows(tiny_model: Artifact) -> list[Rendered]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model.path)
    turns = [(("user", f"set the light to {n} percent"), ("assistant", f'{{"level":{n}}}')) for n in range(24)]
    return [render(Row(pair, None, n), tokenizer, [2]) for n, pair in enumerate(turns, 1)]


def drift(base: Path, other: Path) -> float:
    """KL divergence a token from the base, on text that F was not estimated on."""
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=MEASURED).logits.log_softmax(-1)
            for path in (base, other)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_forgets_less_at_the_same_steps(
    tiny_model: Artifact, rows: list[Rendered], tmp_path: Path, method: str
) -> None:
    rate = 1e-2 if method == "lora" else 1e-3
    drifts, losses = [], []
    for weight in (0.0, 30.0 if method == "lora" else 1000.0):
        config = Adapt(method=method, ewc=weight, learning_rate=rate, **SMALL)
        golden = Golden.read(tiny_model.path)
        made = sft.run(config, tiny_model, tmp_path / f"{weight}", rows=rows, golden=golden, general=GENERAL)
        assert made.identity == sft.planned_identity(config, tiny_model.identity, rows, 0, GENERAL, golden=golden)
        assert ("general" in made.manifest.sources) == ("ewc" in made.manifest.config) == bool(weight)
        model = made if method == "full" else merge.run(tiny_model, made, tmp_path / f"{weight}-merged")
        drifts.append(drift(tiny_model.path, model.path))
        losses.append(made.manifest.notes["heldout_loss"])
    assert drifts[1] < 0.75 * drifts[0]
    assert losses[1][-1][1] < losses[1][0][1]  # it learns nevertheless


def test_the_penalty_of_lora_is_that_of_its_dense_update(tiny_model: Artifact) -> None:
    model, _ = sft.attach(Adapt(method="lora", r=4), tiny_model.path, "cpu")
    pull = Consolidation(model, 3.0, general_rows(GENERAL), 0)
    assert float(pull()) == 0
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(0)
    expected = 0.0
    with torch.no_grad():
        for layer, (G, X) in zip(pull._lora, pull._factors, strict=True):
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            B.normal_()
            update = layer.scaling["default"] * B @ A
            expected += float((G[:, None] * X[None, :] * update.square()).sum())
    assert float(pull().detach()) == pytest.approx(1.5 * expected, rel=1e-4)


def test_half_of_f_times_a_small_update_squared_is_its_divergence(tiny_model: Artifact) -> None:
    """What `ewc: 1` means, within what 16 rows tell."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32)
    text = general_rows(GENERAL)
    with torch.no_grad():
        before = torch.stack([model(input_ids=torch.tensor([row])).logits[0] for row in text]).log_softmax(-1)
    fisher = diagonal_fisher(model, text, 0)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        update = [1e-3 * torch.randn(p.shape, generator=draw) for p, _ in fisher]
        predicted = sum(float((0.5 * F * d.square()).sum()) for (_, F), d in zip(fisher, update, strict=True))
        for (p, _), d in zip(fisher, update, strict=True):
            p += d
        after = torch.stack([model(input_ids=torch.tensor([row])).logits[0] for row in text]).log_softmax(-1)
    assert predicted == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=0.35)


def test_the_factors_have_the_sums_of_f(tiny_model: Artifact) -> None:
    text = general_rows(GENERAL)[:4]
    plain = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32)
    exact = {id(p): F for p, F in diagonal_fisher(plain, text, 0)}
    weights = [m.weight for m in plain.get_decoder().layers.modules() if isinstance(m, torch.nn.Linear)]
    adapted, _ = sft.attach(Adapt(method="lora", r=4), tiny_model.path, "cpu")
    layers = [m for m in adapted.modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")]
    for (G, X), weight in zip(factored_fisher(adapted, layers, text, 0), weights, strict=True):
        F = G[:, None] * X[None, :]
        torch.testing.assert_close(F.sum(1), exact[id(weight)].sum(1), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(F.sum(0), exact[id(weight)].sum(0), rtol=1e-3, atol=1e-6)


def test_without_general_text_it_is_refused(tiny_model: Artifact, rows: list[Rendered], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^adapt.ewc wants 128 tokens of general text, found 5; give data.general"):
        sft.run(Adapt(ewc=1.0, **SMALL), tiny_model, tmp_path / "a", rows=rows, golden=Golden.read(tiny_model.path),
                general=[5] * 5)  # fmt: skip
    with pytest.raises(ValueError, match="ewc is not read by method ia3"):
        Adapt(method="ia3", ewc=1.0)
    assert "ewc" not in Adapt().model_dump()
    assert ewc.N_ROWS * ewc.N_TOKENS == 4096
