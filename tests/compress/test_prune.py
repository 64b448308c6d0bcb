"""Pruning: importances against float64, the pruned model against the masked one, searches, exports, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from edgetune.artifact import Artifact
from edgetune.compress import layerwise
from edgetune.compress.prune import cut, depth, shapes, stage, width
from edgetune.data.calibration import CalibrationSet
from edgetune.errors import StageError, UnsupportedError
from edgetune.recipe import Gptq, Prune
from edgetune.recipe_export import GgufExport, OnnxExport
from tests.conftest import make_tiny_model
from tests.oracles import students_float64 as oracle

ROWS = CalibrationSet(np.random.default_rng(1).integers(0, 512, (9, 12)))
ALL = Prune(layers=2, intermediate_size=96, kv_heads=1, hidden_size=32)
SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "compute_dtype", lambda _: torch.float32)  # a walk in bfloat16 is another ranking
    monkeypatch.setattr(layerwise, "BATCH_TOKENS", 48)  # batches of 4, 4 and 1 rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_tiny_model(tmp_path_factory.mktemp("prune") / "model", layers=4)


def float64(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


def test_statistics_are_those_of_the_papers(source: Artifact) -> None:
    model, config = layerwise.load_model(source), json.loads((source.path / "config.json").read_text())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stats = stage.measure(model, ROWS.ids, config, device="cpu", progress=lambda *_: None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    inner = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    names = [f"model.layers.{i}.{name}" for i in range(4) for name in inner]
    seen = oracle.activations(float64(source.path), ROWS.ids, names)
    channels = np.zeros(64)
    for i in range(4):
        assert stats.influence[i] == pytest.approx(
            oracle.influence(seen[f"layer.{i}"], seen[f"layer.{i + 1}"]), rel=1e-4
        )
        found = stats.neurons[i].sqrt().numpy()
        np.testing.assert_allclose(found, oracle.importance(seen[f"model.layers.{i}.mlp.down_proj"]), rtol=1e-4)
        X = seen[f"model.layers.{i}.self_attn.o_proj"]
        groups = width.group_energy(stats.heads[i], 2).sqrt().numpy()
        np.testing.assert_allclose(groups, oracle.group_importance(X, 4, 2), rtol=1e-4)
        for name in ("self_attn.q_proj", "mlp.gate_proj"):
            channels += oracle.importance(seen[f"model.layers.{i}.{name}"])
    keep = stage.choose(Prune(hidden_size=20), stats, [0, 1, 2, 3], config)
    assert keep.hidden is not None
    assert keep.hidden.tolist() == sorted(np.argsort(-channels)[:20].tolist())


@pytest.mark.parametrize("config", [ALL, Prune(layers=3), Prune(intermediate_size=32), Prune(kv_heads=1),
                                    Prune(hidden_size=48)])  # fmt: skip
def test_the_pruned_model_is_the_masked_one(config: Prune, source: Artifact, tmp_path: Path) -> None:
    made = stage.run(config, source, tmp_path / "out", calibration=ROWS)
    assert made.identity == stage.planned_identity(config, source.identity, ROWS.digest)
    written = json.loads((made.path / "config.json").read_text())
    given = json.loads((source.path / "config.json").read_text())
    planned = shapes.pruned_config(config, given)
    assert {key: written[key] for key in planned if key != "transformers_version"} == {
        key: value for key, value in planned.items() if key != "transformers_version"
    }
    kept = made.manifest.notes["kept_layers"]
    stats = stage.measure(layerwise.load_model(source), ROWS.ids, given, device="cpu", progress=lambda *_: None)
    keep = stage.choose(config, stats, kept, given)
    neurons = {i: range(192) if keep.neurons is None else keep.neurons[i].tolist() for i in kept}
    groups = {i: range(2) if keep.groups is None else keep.groups[i].tolist() for i in kept}
    heads = {i: [2 * group + which for group in groups[i] for which in range(2)] for i in kept}
    hidden = range(64) if keep.hidden is None else keep.hidden.tolist()
    wanted = oracle.masked_logits(float64(source.path), ROWS.ids[:3], kept, neurons, heads, hidden)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        found = model(torch.from_numpy(ROWS.ids[:3])).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())
    assert made.manifest.notes["parameters"] == sum(p.numel() for p in model.parameters())
    for name in ("golden.json", "tokenizer.json", "generation_config.json"):
        assert (made.path / name).read_bytes() == (source.path / name).read_bytes()


@pytest.mark.parametrize(
    ("config", "build", "more"),
    [
        (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False, "attention_bias": True}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": 5}),
        (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),  # biases, and no head_dim of its own
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),  # norms of heads
    ],
)
def test_other_architectures_are_cut_alike(config: Any, build: Any, more: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(config(**SMALL, **more)).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    given = model.config.to_dict()
    stats = stage.measure(model, ROWS.ids, given, device="cpu", progress=lambda *_: None)
    keep = stage.choose(ALL, stats, [0, 2], given)
    assert keep.neurons is not None and keep.groups is not None and keep.hidden is not None  # noqa: PT018
    parameters = stage.write(ALL, model.state_dict(), keep, given, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) == (not model.config.tie_word_embeddings)
    heads = {i: [2 * group + which for group in keep.groups[i].tolist() for which in range(2)] for i in (0, 2)}
    neurons = {i: keep.neurons[i].tolist() for i in (0, 2)}
    wanted = oracle.masked_logits(model.double(), ROWS.ids[:3], [0, 2], neurons, heads, keep.hidden.tolist())
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert parameters == sum(p.numel() for p in pruned.parameters())
    with torch.no_grad():
        found = pruned(torch.from_numpy(ROWS.ids[:3])).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-4 * np.abs(wanted).max())


def test_the_search_takes_out_what_costs_least_and_goes_on_after_a_kill(source: Artifact, tmp_path: Path) -> None:
    config = Prune(layers=2, search="kl", search_samples=3)
    whole = stage.run(config, source, tmp_path / "whole", calibration=ROWS)
    model, ids = float64(source.path), ROWS.ids[[0, 4, 8]]
    everything = {i: range(192) for i in range(4)}
    heads = {i: range(4) for i in range(4)}

    def logits(kept: list[int]) -> Any:
        return oracle.masked_logits(model, ids, kept, everything, heads, range(64)).reshape(-1, 512)

    reference, kept = logits([0, 1, 2, 3]), [0, 1, 2, 3]
    for block, loss in whole.manifest.notes["search"]:
        costs = {}
        for index in kept:
            other = logits([i for i in kept if i != index])
            costs[index] = 0.0
            for p, q in zip(map(oracle.softmax, reference), map(oracle.softmax, other), strict=True):
                named = np.argsort(-p)[:64].tolist()
                found = oracle.divergence(oracle.bucketed(p, named), oracle.bucketed(q, named), reverse=False, skew=0)
                costs[index] += found / len(reference)
        assert block == min(costs, key=costs.__getitem__)
        assert loss == pytest.approx(costs[block], rel=1e-2)
        kept.remove(block)
    assert whole.manifest.notes["kept_layers"] == kept

    class KilledError(BaseException):
        pass

    def stop(done: int, _: int, label: str) -> None:
        if label == "blocks taken out" and done == 1:
            raise KilledError

    with pytest.raises(KilledError):
        stage.run(config, source, tmp_path / "cut", calibration=ROWS, progress=stop)
    assert len(json.loads((tmp_path / ".cut.work" / "search.json").read_text())) == 1
    rounds = []
    made = stage.run(
        config, source, tmp_path / "cut", calibration=ROWS,
        progress=lambda done, _, label: rounds.append(done) if label == "blocks taken out" else None,
    )  # fmt: skip
    assert rounds == [2]
    assert made.digest == whole.digest


@pytest.mark.parametrize("tie", [True, False])
def test_llama_cpp_gives_the_logits_of_torch(tie: bool, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edgetune.export import gguf
    from edgetune.export.parity import parity, torch_logits
    from edgetune.runtime.engines.llama_engine import LlamaEngine

    source = make_tiny_model(tmp_path / "model", layers=3, tie=tie)
    made = stage.run(ALL, source, tmp_path / "pruned", calibration=ROWS)
    out = gguf.run(GgufExport(type="F32"), made, tmp_path / "gguf", moments=None, calibration_digest=None)
    engine = LlamaEngine.load(out.path, n_ctx=64, n_threads=1)
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    try:
        rows = [row.tolist() for row in ROWS.ids[:3]]
        result = parity([torch_logits(model, ids) for ids in rows], [engine.score(ids) for ids in rows])
    finally:
        engine.close()
    assert result.mean_kl < 1e-6
    assert result.top1_agreement == 1


@pytest.mark.slow
def test_onnx_runtime_gives_the_logits_of_torch(source: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    from edgetune.compress import quantize
    from edgetune.export import onnx

    made = stage.run(ALL, source, tmp_path / "pruned", calibration=ROWS)
    out = onnx.run(OnnxExport(precision="fp32"), made, tmp_path / "fp32")
    assert out.manifest.notes["parity"]["fp32"]["max_abs"] < 1e-3
    integers = quantize.run(Gptq(group_size=32, sym=False), made, tmp_path / "gptq", calibration=ROWS)
    out = onnx.run(OnnxExport(), integers, tmp_path / "int4")
    assert out.manifest.notes["integers"] == {"layers": 14, "differences": 0}


CONFIG = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (Prune(layers=30), r"prune\.layers=30 removes nothing, the model has 30; ask for fewer"),
        (Prune(kv_heads=4), r"prune\.kv_heads=4 removes nothing, the model has 3"),
        (Prune(hidden_size=640), r"prune\.hidden_size=640 .* has 576"),
        (Prune(intermediate_size=2000), r"prune\.intermediate_size=2000 .* has 1536"),
        (Prune(hidden_size=256), r"=256 is no multiple of the 9 query .*; use 252 or 261 or 288 \(a multiple of 32\)$"),
        (
            Prune(hidden_size=100, kv_heads=2),
            r"=100 is no multiple of the 6 query heads .*; use 96 \(.*102$",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused(config: Prune, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        shapes.check(config, CONFIG)


def test_heads_that_leave_no_llama_are_refused() -> None:
    given = CONFIG | {"hidden_size": 60, "num_attention_heads": 20, "num_key_value_heads": 5}
    with pytest.raises(UnsupportedError, match=r"kv_heads=4 leaves 16 query heads, .*=60 .*; use kv_heads 1 or 3$"):
        shapes.check(Prune(kv_heads=4), given)
    shapes.check(Prune(kv_heads=4), given | {"model_type": "qwen3"})  # whose configuration does not ask
    with pytest.raises(UnsupportedError, match=r"config\.json names no vocab_size"):
        shapes.check(Prune(kv_heads=1), {**given, "vocab_size": "many"})


def test_a_llama_of_three_heads_is_cut_to_what_transformers_loads(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", hidden=48, heads=(3, 3))
    made = stage.run(Prune(hidden_size=24), source, tmp_path / "out", calibration=ROWS)
    config = AutoModelForCausalLM.from_pretrained(made.path).config
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (24, 3, 16)
    with pytest.raises(UnsupportedError, match=r"hidden_size=32 is no multiple of the 3 query heads that stay"):
        stage.run(Prune(hidden_size=32), source, tmp_path / "other", calibration=ROWS)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_search(loss: float) -> None:
    with pytest.raises(StageError, match="without block 1 the model's outputs are not finite"):
        list(depth.greedy(3, 1, lambda kept: [1.0, loss, 2.0]))


def test_what_a_config_becomes() -> None:
    made = shapes.pruned_config(Prune(layers=10, kv_heads=2, hidden_size=288), CONFIG | {"rms_norm_eps": 1e-5})
    assert made["head_dim"] == 64  # 288 / 6 heads would be 48
    assert (made["num_attention_heads"], made["num_key_value_heads"]) == (6, 2)
    assert (made["num_hidden_layers"], made["intermediate_size"]) == (10, 1536)
    assert made["rms_norm_eps"] == pytest.approx(2e-5)
    types = ["full_attention", "sliding_attention"] * 15
    typed = shapes.pruned_config(Prune(layers=2), CONFIG | {"layer_types": types}, [1, 4])
    assert typed["layer_types"] == ["sliding_attention", "full_attention"]


def test_every_tensor_of_a_block_has_its_axes() -> None:
    from edgetune.compress.architectures import SHARED_INPUTS

    assert {name for group in SHARED_INPUTS for name in group} <= set(cut.AXES)
