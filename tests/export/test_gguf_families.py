"""Every family of `gguf_families`: a random model in float32 gives llama.cpp's logits, and other types load."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact, draft
from edgetune.data.golden import make_golden
from edgetune.errors import ContractError, UnsupportedError
from edgetune.export import gguf
from edgetune.export.gguf_families import (
    FAMILIES,
    common,
    family,
    stored,
    written,
    written_shape,
)
from edgetune.recipe_export import GgufExport
from tests.conftest import Call, tiny_tokenizer
from tests.test_pipeline import make_recipe

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here")

SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0 + i / 4 for i in range(8)],
    "short_factor": [1.0 + i / 8 for i in range(8)], "original_max_position_embeddings": 128,
}  # fmt: skip
GEMMA = {"num_key_value_heads": 2, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"head_dim": 32, "num_key_value_heads": 2}),
    "phi3": ("Phi3", {"sliding_window": None, "num_key_value_heads": 2}),
    "phi3 longrope": ("Phi3", {"sliding_window": None, "rope_parameters": LONG}),
    "phi3 partly rotated": ("Phi3", {"sliding_window": None, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "granite": ("Granite", {"num_key_value_heads": 2, "attention_multiplier": 0.1, "embedding_multiplier": 3.0,
                            "residual_multiplier": 0.4, "logits_scaling": 2.0}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 7}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gptneox": ("GPTNeoX", {"rotary_pct": 0.25}),
    "gptneox one after the other": ("GPTNeoX", {"use_parallel_residual": False}),
}  # fmt: skip


def make(
    out: Path, name: str, *, tokenizer_of: Callable[[Path], None] = tiny_tokenizer, stop: int = 2, **changes: Any
) -> Artifact:
    """Write a small random model of a family as an artifact, with the tokenizer that is written into its folder."""
    import torch
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**(SIZES | settings | changes))
    with draft(out, kind="model", stage="source/1", config={"name": name} | changes) as pending:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config).float()
            for key, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms and biases that do nothing hide a mistake
                    torch.nn.init.normal_(parameter, mean=0.0 if "bias" in key or "gemma" in name else 1.0, std=0.2)
                else:
                    parameter.data.mul_(2.0)
        special = {key: (SIZES | changes)[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = transformers.GenerationConfig(**special)
        model.save_pretrained(pending.path)
        tokenizer_of(pending.path)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pending.path)  # Qwen2's adds its normalizer
        tokenizer.save_pretrained(pending.path)
        asked = {"role": "user", "content": "set the light to 30 percent " * 4}
        talk = [asked, {"role": "assistant", "content": "done"}]
        make_golden(tokenizer, [talk], stop_ids=[stop]).write(pending.path)
    return pending.artifact


def export(source: Artifact, out: Path, kind: str = "F32") -> Artifact:
    return gguf.run(GgufExport(type=kind, imatrix=False), source, out, moments=None)


def plain_folder(name: str, out: Path) -> Path:
    """Write the model as Transformers does: a folder without a manifest."""
    folder = make(out, name).path
    for file in ("manifest.json", "golden.json"):
        (folder / file).unlink()
    return folder


def test_export_takes_a_plain_folder(call: Call, tmp_path: Path) -> None:
    folder, out, store = plain_folder("phi3", tmp_path / "phi"), tmp_path / "out", tmp_path / "store"
    arguments = ("export", str(folder), "--out", str(out), "--type", "Q8_0", "--store", str(store))
    code, said, err = call(*arguments)
    assert (code, said.splitlines()[-1:]) == (0, [str(out)]), err
    assert Artifact.open(out).manifest.kind == "gguf"


def test_plan_takes_what_run_takes(call: Call, tmp_path: Path) -> None:
    folder = plain_folder("phi3", tmp_path / "phi")
    export = {"gguf": {"type": "Q8_0"}}
    raw = json.loads(make_recipe(tmp_path, folder, candidates={"q8": {"export": export}}).model_dump_json())
    (tmp_path / "r.yaml").write_text(json.dumps(raw))
    code, said, err = call("plan", str(tmp_path / "r.yaml"), "--store", str(tmp_path / "store"))
    assert (code, err) == (0, "")
    assert said.count("unknown") == 2 * 11
    assert "time and memory are not known for this architecture" in said
    raw["adapt"] = {"memory_gb": 4}
    (tmp_path / "r.yaml").write_text(json.dumps(raw))
    code, _, err = call("run", str(tmp_path / "r.yaml"), "--store", str(tmp_path / "store"))
    assert (code, err.startswith("edgetune: adapt.memory_gb: what Phi3ForCausalLM takes is not known; set")) == (
        2,
        True,
    ), err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("name", MODELS)
def test_float32_is_the_same_model(tmp_path: Path, name: str) -> None:
    made = export(make(tmp_path / "model", name), tmp_path / "out")
    parity = made.manifest.notes["parity"]
    assert parity["max_abs"] < 1e-3
    assert parity["top1_agreement"] == 1.0


@pytest.mark.parametrize(
    "kind",
    [pytest.param("F16", marks=pytest.mark.slow), pytest.param("Q8_0", marks=pytest.mark.slow), "Q4_K_M"],
)
@pytest.mark.parametrize("name", ["phi3", "granite", "gemma2", "gemma3", "gpt2", "gptneox"])
def test_quantized_it_loads_and_is_near(tmp_path: Path, name: str, kind: str) -> None:
    made = export(make(tmp_path / "model", name), tmp_path / "out", kind)
    assert made.manifest.notes["parity"]["mean_kl"] < 0.05


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.weight"),
        ("llama", "model.layers.0.self_attn.k_proj.weight"),
        ("gemma2", "model.layers.0.input_layernorm.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.weight"),
        ("gptneox", "gpt_neox.layers.0.attention.query_key_value.weight"),
    ],
)
def test_what_is_written_otherwise_comes_back(tmp_path: Path, name: str, tensor: str) -> None:
    config = common(json.loads((make(tmp_path / "model", name).path / "config.json").read_bytes()))
    of, given = family(config), np.random.default_rng(0).normal(size=(192, 64)).astype(np.float32)
    there = written(given, tensor, config, of)
    assert there.shape == written_shape(given.shape, tensor, of)
    assert there.tobytes() != given.tobytes()
    np.testing.assert_allclose(stored(there, tensor, config, of), given, atol=1e-6)


def test_a_tokenizer_that_composes_is_held_on_composed_text(tmp_path: Path) -> None:
    """Qwen2's: the golden text with a combining accent would else refuse every model of it."""
    made = export(make(tmp_path / "model", "qwen2"), tmp_path / "out")
    assert any("give it composed text" in line for line in made.manifest.fallbacks)


def test_every_family_is_tested() -> None:
    assert {FAMILIES[kind + "ForCausalLM"].name for kind, _ in MODELS.values() if kind + "ForCausalLM" in FAMILIES} | {
        "gpt2", "gemma3"
    } == {of.name for of in FAMILIES.values()}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar=64 where llama.cpp takes 32"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_act='silu' of Gemma2ForCausalLM"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: false"),
        ("gptneox", {"hidden_act": "relu"}, "llama.cpp computes gelu"),
        ("phi3", {"sliding_window": 64}, "sliding_window=64 is not applied by llama.cpp"),
        ("qwen2", {"head_dim": 32}, "queries of 128 and hidden_size=64"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    tmp_path: Path, name: str, changes: dict[str, Any], says: str
) -> None:
    source = make(tmp_path / "model", name, **changes)
    with pytest.raises(UnsupportedError, match=says):
        export(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "kind", "wrong"),
    [
        ("granite", "GraniteForCausalLM", {"residual_multiplier": 0.5}),
        ("gptneox", "GPTNeoXForCausalLM", {"use_parallel_residual": False}),
        ("gemma3", "Gemma3ForCausalLM", {"layer_types": ["full_attention"] * 7}),
    ],
)
def test_a_wrong_key_is_seen_in_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str, wrong: dict[str, Any]
) -> None:
    write = FAMILIES[kind].write
    lies = replace(FAMILIES[kind], write=lambda writer, config: write(writer, {**config, **wrong}))
    monkeypatch.setitem(FAMILIES, kind, lies)
    with pytest.raises(ContractError, match=r"logits of model\.gguf"):
        export(make(tmp_path / "model", name), tmp_path / "out")
