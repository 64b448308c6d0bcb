"""The walker and the stages, end to end on the tiny Llama."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edgetune.artifact import Artifact
from edgetune.compress import layerwise
from edgetune.compress.architectures import SHARED_INPUTS, linear_shapes
from edgetune.compress.checkpoint import load_dequantized, read_layers
from edgetune.compress.finished import LayerResult
from edgetune.compress.hessian import Hessian
from edgetune.compress.layerwise import load_model, quantize_blocks, second_moments
from edgetune.compress.quantize import check, planned_identity, run
from edgetune.compress.rtn import rtn_quantize
from edgetune.compress.scheme import Quantized, Scheme
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import DataError, StageError, UnsupportedError
from edgetune.recipe import Gptq, Rtn
from tests.conftest import make_tiny_model

ROWS = CalibrationSet(np.random.default_rng(0).integers(0, 512, (12, 16)))
GPTQ = Gptq(bits=4, group_size=32, sym=False)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.from_numpy(ROWS.ids[:4])).logits


def rounding(_: object, weight: torch.Tensor, *__: torch.Tensor | None) -> tuple[Quantized, tuple[str, ...]]:
    return rtn_quantize(weight, Scheme(4, 32)), ()


@pytest.mark.parametrize(
    "config",
    [
        GPTQ,
        Gptq(bits=4, group_size=32, static_groups=False),
        Gptq(bits=3, group_size=-1, desc_act=False),
        Rtn(bits=8, group_size=64, sym=False),
    ],
)
def test_from_model_to_checkpoint_and_back(config: Gptq | Rtn, tiny_model: Artifact, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    made = run(config, tiny_model, tmp_path / "out", calibration=ROWS, seed=3, progress=lambda *now: seen.append(now))
    assert seen == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    layers = read_layers(made.path)
    model = load_model(tiny_model)  # float32, so it holds the weights exactly
    assert list(linear_shapes(model.config.to_dict())) == sorted(
        layers, key=list(linear_shapes(model.config.to_dict())).index
    )
    for name, layer in layers.items():
        model.get_submodule(name).weight.data = layer.dequantize()
    for name, parameter in model.named_parameters():  # what is not quantized is float16 in the file
        if name.removesuffix(".weight") not in layers:
            parameter.data = parameter.data.half().float()
    loaded = load_dequantized(made.path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight

    is_quantized = isinstance(config, Gptq)
    manifest = made.manifest
    assert manifest.identity == planned_identity(config, tiny_model.identity, ROWS.digest)
    assert (manifest.kind, manifest.seed) == ("gptq", 3)
    assert manifest.calibration == (ROWS.digest if is_quantized else None)
    assert manifest.scheme is not None
    assert manifest.scheme["bits"] == config.bits
    assert config.bits < manifest.scheme["bits_per_weight"] < config.bits + 1
    assert set(manifest.notes["relative_error"]) == set(layers)
    stored = json.loads((made.path / "quantize_config.json").read_text())
    assert stored["desc_act"] == (is_quantized and config.desc_act and not config.static_groups)


def with_results(source: Artifact, results: Mapping[str, LayerResult]) -> Any:
    """Load the float model again and put the dequantized weights in their places."""
    model: Any = load_model(source)
    for name, result in results.items():
        layer = model.get_submodule(name)
        layer.weight.data = result.quantized.dequantize(layer.weight.dtype)
    return model


def test_the_walk_lets_each_block_go(tiny_model: Artifact, tmp_path: Path) -> None:
    made = run(GPTQ, tiny_model, tmp_path / "out", calibration=ROWS)
    model = load_model(tiny_model)
    left: list[bool] = []
    results = quantize_blocks(
        model, None, rounding, work=tmp_path, key="k",
        progress=lambda n, *_: left.append(all(p.is_meta for p in model.model.layers[n - 1].parameters())),
    )  # fmt: skip
    assert left == [True, True]
    assert 0 < results["model.layers.0.mlp.up_proj"].relative_error < 0.02
    reference, gptq = logits(load_model(tiny_model)), logits(load_dequantized(made.path))
    assert (gptq - reference).abs().mean() < 0.5 * reference.abs().mean()


def test_hessians_are_of_what_the_quantized_layers_before_give(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 64)  # 4 rows at once
    seen: list[torch.Tensor] = []

    def solve(
        names: Sequence[str], weight: torch.Tensor, hessian: torch.Tensor | None, cross: torch.Tensor | None
    ) -> tuple[Quantized, tuple[str, ...]]:
        assert hessian is not None
        assert cross is None
        seen.append(hessian.clone())
        return rounding(names, weight, hessian)

    model = with_results(tiny_model, quantize_blocks(load_model(tiny_model), ROWS.ids, solve, work=tmp_path, key="k"))
    names = [f"model.layers.{i}.{group[0]}" for i in range(2) for group in SHARED_INPUTS]
    assert len(seen) == len(names)
    # The inputs of a layer depend on earlier layers alone, so the finished model gives the very same ones.
    for name, H in zip(names, seen, strict=True):
        assert torch.allclose(H, brute_force(model, name), rtol=1e-4, atol=1e-6), name


def brute_force(model: Any, name: str) -> torch.Tensor:
    """2/N X^T X of a layer's inputs by a plain hook and one forward of the whole model."""
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.from_numpy(ROWS.ids))
    handle.remove()
    X = inputs[0].flatten(0, 1)
    return 2 / len(X) * X.T @ X


def test_second_moments_are_those_of_plain_hooks(tiny_model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 80)  # batches of 5, 5 and 2 rows
    model = load_model(tiny_model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    moments = second_moments(model, ROWS.ids)
    assert set(moments) == set(linear_shapes(model.config.to_dict()))
    for name, moment in moments.items():
        assert torch.allclose(2 * moment, brute_force(model, name).diagonal(), rtol=1e-4), name
        assert moment.dtype == torch.float32
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("rows", [ROWS.ids, None])
def test_a_walk_that_was_stopped_ends_in_the_same_bytes(
    rows: np.ndarray[Any, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_tiny_model(tmp_path / "model", layers=3)
    config = GPTQ if rows is not None else Rtn(group_size=32)
    whole = run(config, source, tmp_path / "whole", calibration=ROWS)

    def stop_after_two(done: int, _: int, __: str) -> None:
        if done == 2:
            raise _Killed

    with pytest.raises(_Killed):
        run(config, source, tmp_path / "cut", calibration=ROWS, progress=stop_after_two)
    kept = sorted((tmp_path / ".cut.work").iterdir())
    assert [file.name for file in kept] == ["model.layers.0.safetensors", "model.layers.1.safetensors"]
    kept[1].write_bytes(kept[1].read_bytes()[:-100])  # cut by the kill: done again
    solved = []
    collect = Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, *X: (solved.append(1), collect(self, *X))[1])
    made = run(config, source, tmp_path / "cut", calibration=ROWS)
    assert made.digest == whole.digest
    assert len(solved) == (8 if rows is not None else 0)  # two blocks of four Hessians, not three


def test_work_of_another_walk_is_not_taken(tiny_model: Artifact, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    first = quantize_blocks(load_model(tiny_model), None, rounding, work=tmp_path, key="one")[name].quantized.q

    def coarse(_: object, weight: torch.Tensor, *__: torch.Tensor | None) -> tuple[Quantized, tuple[str, ...]]:
        return rtn_quantize(weight, Scheme(2, 32)), ()

    again = quantize_blocks(load_model(tiny_model), None, coarse, work=tmp_path, key="one")[name].quantized.q
    assert torch.equal(first, again)
    other = quantize_blocks(load_model(tiny_model), None, coarse, work=tmp_path, key="two")[name].quantized.q
    assert other.max() <= 3


@pytest.mark.parametrize(
    ("config", "build"),
    [
        (MistralConfig, MistralForCausalLM),
        (Qwen2Config, Qwen2ForCausalLM),
        (Qwen3Config, Qwen3ForCausalLM),
    ],
)
def test_other_architectures_walk_as_they_run(config: Any, build: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    if config is MistralConfig:
        small["sliding_window"] = 5  # narrower than the rows, so masks matter
    if config is Qwen2Config:
        del small["head_dim"]  # 8
    model = build(config(**small)).eval()
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in linear_shapes(model.config.to_dict())}
    assert shapes == linear_shapes(model.config.to_dict())
    for name, moment in second_moments(model, ROWS.ids).items():
        assert torch.allclose(2 * moment, brute_force(model, name).diagonal(), rtol=1e-3), name
    results = quantize_blocks(model, ROWS.ids, rounding, work=tmp_path, key="k")
    assert set(results) == set(shapes)


def test_what_is_not_finite_is_named(tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 64)  # row 7 is in the second batch
    model = load_model(tiny_model)
    model.model.embed_tokens.weight.data[ROWS.ids[7, 3]] = torch.inf
    rows = np.where(ROWS.ids == ROWS.ids[7, 3], 0, ROWS.ids)
    rows[7, 3] = ROWS.ids[7, 3]
    with pytest.raises(StageError, match=r"calibration row 7 makes the input of model\.layers\.0\.self_attn\.q_proj"):
        quantize_blocks(model, rows, rounding, work=tmp_path, key="k")
    with pytest.raises(StageError, match="calibration row 7 "):
        second_moments(model, rows)

    model = load_model(tiny_model)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(StageError, match=r"model\.layers\.1\.mlp\.up_proj has a weight that is not finite"):
        quantize_blocks(model, None, rounding, work=tmp_path, key="k")


def test_rows_outside_the_vocabulary_are_refused(tiny_model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="below 512"):
        quantize_blocks(load_model(tiny_model), ROWS.ids + 400, rounding, work=tmp_path, key="k")


def test_check_refuses_before_any_work(tiny_model: Artifact, tmp_path: Path) -> None:
    config = json.loads((tiny_model.path / "config.json").read_text())
    check(GPTQ, config)
    with pytest.raises(
        UnsupportedError, match=r"group_size=128 .* in_features=64 of model\.layers\.0\.self_attn\.q_proj"
    ):
        check(Rtn(group_size=128), config)
    with pytest.raises(
        UnsupportedError, match="GPT2LMHeadModel cannot be compressed here; supported: LlamaForCausalLM"
    ):
        check(GPTQ, {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    with pytest.raises(UnsupportedError, match="divide out_features=80"):
        check(Rtn(bits=3, group_size=-1), config | {"head_dim": 20, "num_key_value_heads": 2})
    with pytest.raises(UnsupportedError, match="needs calibration rows"):
        run(GPTQ, tiny_model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_fallbacks_reach_the_manifest(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(source.path)
    model.model.layers[0].input_layernorm.weight.data[3] = 0  # a column that is never active
    model.save_pretrained(tmp_path / "other")
    weights = (tmp_path / "other" / "model.safetensors").read_bytes()
    (source.path / "model.safetensors").write_bytes(weights)
    made = run(GPTQ, Artifact(source.path, source.manifest), tmp_path / "out", calibration=ROWS)
    line = "model.layers.0.self_attn.{}: 1 of 64 input columns were never active: rounded to nearest"
    assert made.manifest.fallbacks == [line.format(name) for name in ("q_proj", "k_proj", "v_proj")]


def test_planning_loads_no_torch(tiny_model: Artifact) -> None:
    code = (
        "import json, sys; from edgetune.compress.quantize import check; from edgetune.recipe import Gptq; "
        "check(Gptq(group_size=32), json.load(open(sys.argv[1]))); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_model.path / "config.json")], check=True)
