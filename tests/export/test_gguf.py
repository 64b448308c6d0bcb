"""GGUF export: what is written is read back, and llama.cpp gives the logits of Transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.artifact import Artifact, draft
from edgetune.data.golden import Golden
from edgetune.errors import ContractError, SourceError, StageError, UnsupportedError
from edgetune.export import gguf
from edgetune.export.gguf_child import run_child
from edgetune.export.gguf_families import family, gguf_name, permute, rope, unpermute
from edgetune.export.gguf_types import choose_types, fitting
from edgetune.export.gguf_verify import _WEIGHT_ERROR, check_types
from edgetune.export.gguf_vocab import read_vocabulary
from edgetune.export.gguf_write import folder_weights, read_config
from edgetune.recipe_export import GgufExport
from tests.conftest import make_tiny_model

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

ROWS = {"attn_q": 576, "attn_k": 192, "attn_v": 192, "attn_output": 576, "ffn_gate": 1536, "ffn_up": 1536}
SMOLLM2_SHAPES = {
    "token_embd.weight": (49152, 576), "output_norm.weight": (576,),
    **{f"blk.{i}.{name}.weight": (rows, 576) for i in range(30) for name, rows in ROWS.items()},
    **{f"blk.{i}.ffn_down.weight": (576, 1536) for i in range(30)},
}  # fmt: skip


def export(kind: str, source: Artifact, out: Path, **more: Any) -> Artifact:
    config = GgufExport(type=kind)
    return gguf.run(config, source, out, **{"moments": None, "calibration_digest": None, **more})


def edited(source: Artifact, out: Path, edits: dict[str, Any]) -> Artifact:
    """Copy a model artifact with other values in some of its JSON files, or other text."""
    with draft(out, kind="model", stage="source/1", config={"edited": sorted(edits)}) as pending:
        for name in source.manifest.files:
            shutil.copyfile(source.path / name, pending.path / name)
        for name, change in edits.items():
            path = pending.path / name
            text = path.read_text(encoding="utf-8")
            if callable(change):
                path.write_text(change(text), encoding="utf-8")
            else:
                path.write_text(json.dumps(json.loads(text) | change), encoding="utf-8")
    return pending.artifact


@pytest.fixture(scope="module")
def moments(tiny_model: Artifact) -> dict[str, np.ndarray[Any, Any]]:
    config = read_config(tiny_model.path)
    names = [n for n in folder_weights(tiny_model.path, config).shapes if n.endswith("_proj.weight")]
    rng = np.random.default_rng(0)
    widths = {n: 192 if "down" in n else 64 for n in names}
    return {n.removesuffix(".weight"): np.exp(3 * rng.normal(size=widths[n])) for n in names}


@pytest.mark.parametrize("tie", [True, False])
def test_float32_is_the_same_model(tmp_path: Path, tie: bool) -> None:
    """Tied and untied; the stage itself refuses what is not, so the figures are read from its notes."""
    source = make_tiny_model(tmp_path / "model", tie=tie)
    made = export("F32", source, tmp_path / "out")
    assert made.manifest.notes["parity"]["max_abs"] < 1e-4
    assert made.manifest.notes["parity"]["top1_agreement"] == 1.0
    contract = made.manifest.notes["contract"]
    assert (contract["stop_ids"], contract["extra_stop_ids"], contract["n_bos"]) == ([2], [0], 1)
    assert sorted(made.manifest.files) == ["Modelfile", "golden.json", "model.gguf"]
    assert made.manifest.notes["ollama"] == "Modelfile"
    assert made.manifest.fallbacks == []
    assert made.identity == gguf.planned_identity(GgufExport(type="F32"), source.identity, None)
    assert Golden.read(made.path) == Golden.read(source.path)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["model", "out"]


@pytest.mark.parametrize("kind", ["F16", "Q4_K_M"])
def test_each_tensor_has_the_type_that_the_artifact_says(tiny_model: Artifact, tmp_path: Path, kind: str) -> None:
    from gguf import GGUFReader

    made = export(kind, tiny_model, tmp_path / "out")
    found = {t.name: t.tensor_type.name for t in GGUFReader(made.path / "model.gguf").tensors}
    shapes = {t.name: [int(n) for n in reversed(t.shape)] for t in GGUFReader(made.path / "model.gguf").tensors}
    wanted, lines = choose_types(shapes, kind)
    assert found == wanted
    assert {kind for name, kind in found.items() if "norm" in name} == {"F32"}
    assert made.manifest.fallbacks == lines
    assert bool(lines) == (kind == "Q4_K_M")  # rows of 64: no K-quant fits, and it is said
    assert made.manifest.scheme is not None
    assert made.manifest.scheme["bits_per_weight"] < 32
    file = made.path / "model.gguf"
    with pytest.raises(ContractError, match=r"blk\.1\.ffn_up\.weight has type .*, Q4_0 was asked for"):
        check_types(file, wanted | {"blk.1.ffn_up.weight": "Q4_0"})
    with pytest.raises(ContractError, match=r"output\.weight has type None"):
        check_types(file, wanted | {"output.weight": "Q4_0"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K_M", "Q4_K_M", "Q4_1", "Q4_0"])
def test_rows_of_256_take_k_quants(tmp_path: Path, kind: str) -> None:
    source = make_tiny_model(tmp_path / "model", hidden=256, layers=3)
    assert export(kind, source, tmp_path / "out").manifest.fallbacks == []


def test_the_importance_matrix_changes_the_bytes(
    tiny_model: Artifact, tmp_path: Path, moments: dict[str, np.ndarray[Any, Any]]
) -> None:
    plain = export("Q4_0", tiny_model, tmp_path / "plain")
    again = export("Q4_0", tiny_model, tmp_path / "again")
    weighed = export("Q4_0", tiny_model, tmp_path / "weighed", moments=moments, calibration_digest="d")
    assert (plain.path / "manifest.json").read_bytes() == (again.path / "manifest.json").read_bytes()
    assert weighed.manifest.files["model.gguf"].sha256 != plain.manifest.files["model.gguf"].sha256
    assert weighed.manifest.files["model.gguf"].size == plain.manifest.files["model.gguf"].size
    assert weighed.manifest.notes["importance"] == "14 of 15 matrices"  # not the embedding
    assert weighed.manifest.calibration == "d"
    assert weighed.identity == gguf.planned_identity(GgufExport(type="Q4_0"), tiny_model.identity, "d")
    # and it does what it is for: less error where the inputs are large
    down = "model.layers.0.mlp.down_proj"
    assert _weighed_error(weighed, tiny_model, down, moments) < 0.9 * _weighed_error(plain, tiny_model, down, moments)


def _weighed_error(made: Artifact, source: Artifact, module: str, moments: dict[str, np.ndarray[Any, Any]]) -> float:
    from gguf import GGUFReader, quants

    config = read_config(source.path)
    wanted = folder_weights(source.path, config).get(f"{module}.weight").numpy()
    tensor = next(t for t in GGUFReader(made.path / "model.gguf").tensors if t.name == "blk.0.ffn_down.weight")
    found = quants.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
    return float((((found - wanted) ** 2) * moments[module]).sum())


def _swap_merges(text: str) -> str:
    tokenizer = json.loads(text)
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[40:] + merges[:40]
    return json.dumps(tokenizer)


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ({"chat_template.jinja": lambda text: text.replace("user", "human") + " "}, "chat template differs"),
        ({"generation_config.json": {"eos_token_id": 5}}, r"the checkpoint declares \[5\], .* at \[2\]"),
        ({"tokenizer_config.json": {"bos_token": "<|endoftext|>"}}, "BOS differs: .* id 1, the runtime knows 0"),
        ({"tokenizer.json": _swap_merges}, r"token ids of golden .* differ at index"),
    ],
)
def test_a_broken_contract_leaves_nothing(
    tiny_model: Artifact, tmp_path: Path, edits: dict[str, Any], named: str
) -> None:
    source = edited(tiny_model, tmp_path / "model", edits)
    with pytest.raises(ContractError, match=named):
        export("F32", source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")) == ["model"]


def test_a_wrong_header_is_seen_in_the_logits(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgetune.export import gguf_write

    monkeypatch.setattr(gguf_write, "rope", lambda config: (10000.0, *rope(config)[1:]))
    with pytest.raises(ContractError, match=r"logits of model\.gguf"):
        export("F32", tiny_model, tmp_path / "out")


@pytest.mark.parametrize("wrong", ["_permuted", "_noisy"])
def test_wrong_weights_are_seen(
    tiny_model: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    from edgetune.export import gguf_write

    written = gguf_write._written
    if wrong == "_permuted":
        monkeypatch.setattr(gguf_write, "change", lambda *_: None)
    else:
        monkeypatch.setattr(gguf_write, "_written", lambda *args: written(*args) * np.float32(1.01))
    with pytest.raises(ContractError, match="differs from its source by"):
        export("F32", tiny_model, tmp_path / "out")


def test_a_killed_child_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "dies.py").write_text(
        "import os, sys; print('GGML_ASSERT failed', file=sys.stderr, flush=True); os.abort()"
    )
    with pytest.raises(StageError, match=r"^dies on x\.gguf: killed by SIGABRT; GGML_ASSERT failed$"):
        run_child("dies", {"file": "x.gguf"}, tmp_path / "job.json")
    job = {"source": str(tmp_path / "no"), "file": str(tmp_path / "x.gguf")}
    with pytest.raises(StageError, match=r"gguf_convert on .*x\.gguf: exit code 1; .*no is not an artifact") as caught:
        run_child("edgetune.export.gguf_convert", job, tmp_path / "job.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPTBigCodeForCausalLM"]}, "GPTBigCodeForCausalLM cannot be exported .* LlamaForCausalLM"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope type 'yarn'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, "sliding_window=64 is not applied"),
    ],
)
def test_what_cannot_be_exported_is_refused_first(tiny_model: Artifact, change: dict[str, Any], named: str) -> None:
    config = read_config(tiny_model.path)
    gguf.check(GgufExport(), config)
    with pytest.raises(UnsupportedError, match=named):
        gguf.check(GgufExport(), config | change)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(0), None, "gpt-2"),
        (lambda t: t["pre_tokenizer"].update(pretokenizers=[{"type": "Whitespace"}]), UnsupportedError, "Whitespace"),
        (lambda t: t["model"].update(type="Unigram"), UnsupportedError, "tokenizer of type Unigram"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), UnsupportedError, "normalizer Lowercase"),
        (lambda t: t["added_tokens"][0].update(id=600), SourceError, "an id 600, the embedding 512 rows"),
    ],
)
def test_a_tokenizer_is_known_or_refused(
    tiny_model: Artifact, tmp_path: Path, change: Any, error: type[Exception] | None, named: str
) -> None:
    for name in tiny_model.manifest.files:
        shutil.copyfile(tiny_model.path / name, tmp_path / name)
    assert read_vocabulary(tmp_path, 512).pre == "smollm"
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    if error is None:
        assert read_vocabulary(tmp_path, 512).pre == named
    else:
        with pytest.raises(error, match=named):
            read_vocabulary(tmp_path, 512)


def test_types_of_the_real_models_shapes() -> None:
    plain, _ = choose_types(SMOLLM2_SHAPES, "Q4_K_M")
    assert plain["token_embd.weight"] == plain["blk.7.attn_q.weight"] == "Q5_1"
    assert {plain[f"blk.{i}.ffn_down.weight"] for i in range(30)} == {"Q6_K"}
    types, lines = choose_types(SMOLLM2_SHAPES, "Q4_K_M", gptq=True)
    assert types["output_norm.weight"] == "F32"
    assert (types["token_embd.weight"], types["blk.7.attn_q.weight"]) == ("Q8_0", "Q5_0")
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(30)} == {"Q5_0"}
    assert sum(int(line.split()[0]) for line in lines if "rows of 576" in line) == 181  # all but down projections
    assert lines[-1].startswith("14 of 211 matrices have rows of 1536: Q5_0 instead of Q6_K (the other rows")
    wide = {name: tuple(256 if n == 576 else n for n in shape) for name, shape in SMOLLM2_SHAPES.items()}
    stock, lines = choose_types(wide, "Q4_K_M")
    assert lines == []
    assert (stock["token_embd.weight"], stock["blk.7.attn_q.weight"]) == ("Q6_K", "Q4_K")
    assert [i for i in range(30) if stock[f"blk.{i}.ffn_down.weight"] == "Q6_K"] == [
        0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29,
    ]  # fmt: skip
    assert choose_types(SMOLLM2_SHAPES, "Q8_0")[1] == []
    assert (fitting("Q4_K", 512), fitting("Q4_0", 48), fitting("Q6_K", 48)) == ("Q4_K", "F16", "F16")
    assert set(choose_types(SMOLLM2_SHAPES, "F16")[0].values()) == {"F16", "F32"}
    assert set(types.values()) <= set(_WEIGHT_ERROR)


def test_permute_and_names() -> None:
    rng = np.random.default_rng(0)
    for array in (rng.normal(size=(24, 5)), rng.normal(size=24)):
        assert not np.array_equal(permute(array, 3), array)
        np.testing.assert_array_equal(unpermute(permute(array, 3), 3), array)
    llama = family({"architectures": ["LlamaForCausalLM"]})
    assert gguf_name("model.layers.12.self_attn.o_proj.weight", llama) == "blk.12.attn_output.weight"
    with pytest.raises(UnsupportedError, match=r"q_norm.* has no place"):
        gguf_name("model.layers.0.self_attn.q_norm.weight", llama)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3", "llama3-rope", "linear-rope", "bias"])
def test_other_architectures_of_the_table(tiny_model: Artifact, tmp_path: Path, family: str) -> None:
    import torch
    import transformers

    named = family if family in ("Mistral", "Qwen2", "Qwen3") else "Llama"
    scaling = {
        "llama3-rope": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 64},
        "linear-rope": {"rope_type": "linear", "factor": 4.0},
    }.get(family, {"rope_type": "default"})  # fmt: skip
    config = getattr(transformers, f"{named}Config")(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16 if family == "Qwen2" else 32, max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={**scaling, "rope_theta": 5000.0}, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        **({"attention_bias": family == "bias"} if named == "Llama" else {"sliding_window": None}),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{named}ForCausalLM")(config).float()
        for parameter in model.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    with draft(tmp_path / "model", kind="model", stage="source/1", config={"family": family}) as pending:
        for name in tiny_model.manifest.files:
            shutil.copyfile(tiny_model.path / name, pending.path / name)
        model.save_pretrained(pending.path)
    made = export("F32", pending.artifact, tmp_path / "out")
    assert made.manifest.notes["parity"]["max_abs"] < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_1"])
def test_the_other_types(tiny_model: Artifact, tmp_path: Path, kind: str) -> None:
    assert export(kind, tiny_model, tmp_path / "out").manifest.notes["parity"]["mean_kl"] < 1e-3


def test_a_gptq_checkpoint_is_exported_from_its_dequantized_weights(tiny_model: Artifact, tmp_path: Path) -> None:
    from edgetune.compress import quantize
    from edgetune.recipe import Rtn

    source = quantize.run(Rtn(group_size=32), tiny_model, tmp_path / "gptq")
    made = export("Q8_0", source, tmp_path / "out")
    n = 7 * read_config(source.path)["num_hidden_layers"]
    assert made.manifest.fallbacks == [f"the integers of GPTQ are rounded again in {n} of {n} layers, to Q8_0"]
    assert made.manifest.parents == {source.identity: source.digest}


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_weight_that_is_not_finite_is_named(tiny_model: Artifact, tmp_path: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.up_proj.weight"
    source = edited(tiny_model, tmp_path / "model", {})
    state = load_file(source.path / "model.safetensors")
    state[name][5, 7] = float("inf")
    save_file(state, source.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(StageError, match=f"{name}: it holds values that are not finite"):
        export(kind, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
