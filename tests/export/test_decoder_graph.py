"""Our own decoder graph: the logits of Transformers in both dialects, in one pass and in steps, padded and not."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgetune.artifact import Artifact, draft
from edgetune.compress import quantize
from edgetune.errors import StageError, UnsupportedError
from edgetune.export import decoder_families
from edgetune.export.decoder_graph import DecoderGraph, FusedGraph, PlainGraph
from edgetune.export.decoder_layers import BlockLayers, FloatLayers, NBitsLayers
from edgetune.export.decoder_run import graph_logits as run
from edgetune.export.decoder_run import open_graph
from edgetune.export.decoder_source import Source, check_decoder, open_source, shortened
from edgetune.export.onnx_file import OnnxFile
from edgetune.export.onnx_shapes import Promise, check_shapes
from edgetune.recipe import Rtn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Array = np.ndarray[Any, Any]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SIZES: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 6}
GEMMA3_LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama3, wide heads, biases": ("Llama", {
        "head_dim": 12, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}),
    "yarn": ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
                                           "original_max_position_embeddings": 32}}),
    "mistral with a window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with some windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "phi3": ("Phi3", {"sliding_window": 6, "pad_token_id": 2}),
    "phi3 partly rotated": ("Phi3", {"sliding_window": None, "pad_token_id": 2, "head_dim": 16, "rope_parameters":
        ROPE | {"partial_rotary_factor": 0.5}}),
    "phi3 longrope": ("Phi3", {"sliding_window": None, "pad_token_id": 2, "original_max_position_embeddings": 32,
        "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": [4.0, 4.5, 5.0, 5.5],
        "short_factor": [1.0, 1.5, 2.0, 2.5], "original_max_position_embeddings": 32}}),
    "granite": ("Granite", {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.4,
                            "logits_scaling": 2.0, "tie_word_embeddings": True, "attention_bias": True}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", GEMMA | {"num_hidden_layers": 3, "layer_types": GEMMA3_LAYERS, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}}),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "gpt neox": ("GPTNeoX", {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}),
    "gpt neox in turn": ("GPTNeoX", {"use_parallel_residual": False, "attention_bias": False}),
}  # fmt: skip


def family(name: str, folder: Path) -> tuple[Any, Source]:
    """Give a tiny random model of a family, and its weights as the graph reads them."""
    import transformers

    kind, changes = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**({"rope_parameters": ROPE} | SIZES | changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(4.0)
            else:
                parameter.data.add_(torch.randn_like(parameter) * 0.2)  # biases and norms that tell
    with draft(folder / "model", kind="model", stage="source/1", config={}) as pending:
        model.save_pretrained(pending.path)
    return model, open_source(pending.artifact)


def write(graph: type[DecoderGraph], path: Path, layers: Callable[[OnnxFile], FloatLayers], **settings: Any) -> Any:
    """Write a graph, check it whole, and give a session on it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with OnnxFile(path, **settings) as file:
        written = graph(file, layers(file))
        written.write()
    checked = check_shapes(path, Promise.of_sizes(written.sizes))
    assert checked["logits"][::2] == ["batch", written.sizes.n_vocab]
    assert checked["inference"] == "onnx"
    return open_graph(path, n_threads=1)


def padded(n_rows: int, n_tokens: int, n_vocab: int) -> tuple[Array, Array]:
    """Give random rows, each padded at its left by 4 tokens more than the one before."""
    ids = np.random.default_rng(0).integers(3, n_vocab, (n_rows, n_tokens))
    mask = np.ones_like(ids)
    for row in range(n_rows):
        mask[row, : 4 * row] = 0
    return ids, mask


def wanted(model: Any, ids: Array, mask: Array) -> Array:
    positions = torch.tensor(np.maximum(mask.cumsum(1) - 1, 0))
    with torch.inference_mode():
        out = model(torch.tensor(ids), attention_mask=torch.tensor(mask), position_ids=positions)
    return np.asarray(out.logits)


@pytest.mark.parametrize("graph", [FusedGraph, PlainGraph])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(name: str, graph: type[DecoderGraph], tmp_path: Path) -> None:
    model, source = family(name, tmp_path)
    session = write(graph, tmp_path / "out" / "model.onnx", lambda file: FloatLayers(file, source, "FLOAT"))
    for n_rows in (1, 4):
        ids, mask = padded(n_rows, 20, 256)
        real = mask.astype(bool)
        found = run(session, ids, mask)
        assert np.isfinite(found).all()  # padded queries too: what they write is in the cache
        assert np.abs(found - wanted(model, ids, mask))[real].max() < 1e-4
        assert np.abs(run(session, ids, mask, (7, 13, 14, 15)) - found)[real].max() < 1e-4


def test_every_family_is_tested() -> None:
    heads = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    tested = {heads.get(kind, f"{kind}ForCausalLM") for kind, _ in FAMILIES.values()}
    assert tested == set(decoder_families.FAMILIES)


def test_of_longrope_the_graph_holds_what_the_model_was_trained_with(tmp_path: Path) -> None:
    source = family("phi3 longrope", tmp_path)[1]
    assert source.sizes.max_length == 32
    config = json.loads((tmp_path / "model" / "config.json").read_bytes())
    assert shortened(config)[0].startswith("the graph holds 32 of the model's 128 positions")
    assert shortened(config | {"max_position_embeddings": 32}) == []


@pytest.mark.parametrize("graph", [FusedGraph, PlainGraph])
def test_a_window_hides_what_lies_before_it(graph: type[DecoderGraph], tmp_path: Path) -> None:
    """A token beyond the windows of all layers together changes nothing."""
    source = family("phi3", tmp_path)[1]
    session = write(graph, tmp_path / "out" / "model.onnx", lambda file: FloatLayers(file, source, "FLOAT"))
    ids = np.random.default_rng(0).integers(3, 256, (1, 20))
    other = ids.copy()
    other[0, 2] += 1
    first, second = (run(session, row, np.ones_like(row), (9,)) for row in (ids, other))
    reach = 2 + 2 * (6 - 1)  # two layers look 5 positions back each
    assert np.abs(first - second)[0, reach + 1 :].max() == 0
    assert np.abs(first - second)[0, reach].max() > 0


@pytest.mark.parametrize("graph", [FusedGraph, PlainGraph])
def test_float16_stays_close(graph: type[DecoderGraph], tmp_path: Path) -> None:
    model, source = family("qwen3", tmp_path)
    session = write(graph, tmp_path / "out" / "model.onnx", lambda file: FloatLayers(file, source, "FLOAT16"))
    ids, mask = padded(3, 20, 256)
    found = run(session, ids, mask)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert np.abs(found - wanted(model, ids, mask))[mask.astype(bool)].max() < 0.05


@pytest.mark.parametrize(
    ("layers", "graph", "scheme"),
    [
        (NBitsLayers, FusedGraph, Rtn(bits=4, group_size=32, sym=False)),
        (NBitsLayers, FusedGraph, Rtn(bits=8, group_size=32, sym=False)),
        (NBitsLayers, FusedGraph, Rtn(bits=4, group_size=64)),
        (BlockLayers, PlainGraph, Rtn(bits=4, group_size=32)),
    ],
    ids=["int4", "int8", "int4 of 64", "blocks"],
)
def test_integers_give_the_logits_of_the_checkpoint(
    layers: Any, graph: type[DecoderGraph], scheme: Rtn, tiny_model: Artifact, tmp_path: Path
) -> None:
    from edgetune.compress.checkpoint import load_dequantized

    checkpoint = quantize.run(scheme, tiny_model, tmp_path / "checkpoint")
    source = open_source(checkpoint)
    settings = (0,) if layers is NBitsLayers else ()
    session = write(graph, tmp_path / "out" / "model.onnx", lambda file: layers(file, source, "FLOAT", *settings))
    reference = load_dequantized(checkpoint.path)
    if layers is NBitsLayers:
        from edgetune.export.onnx_graph import head_of, read_packed

        table = head_of(read_packed(tmp_path / "out" / "model.onnx")).dequantize()
        reference.get_output_embeddings().weight.data.copy_(torch.from_numpy(table))  # tied: the embedding with it
    ids, mask = padded(3, 20, 512)
    found = run(session, ids, mask)
    assert np.abs(found - wanted(reference, ids, mask))[mask.astype(bool)].max() < 1e-3
    assert np.abs(run(session, ids, mask, (9, 10)) - found)[mask.astype(bool)].max() < 1e-4


def test_data_files_stay_below_their_limit_and_a_tied_table_is_written_once(
    tiny_model: Artifact, tmp_path: Path
) -> None:
    source = open_source(tiny_model)
    largest = 4 * 512 * 64
    path = tmp_path / "model.onnx"
    write(FusedGraph, path, lambda file: FloatLayers(file, source, "FLOAT"), file_limit=largest)
    files = sorted(tmp_path.glob("model.onnx.data*"))
    assert len(files) > 1
    assert all(file.stat().st_size <= largest for file in files)
    n_weights = sum(int(np.prod(source.get(name).shape)) for name in source.names)
    assert 4 * n_weights <= sum(file.stat().st_size for file in files) < 4 * n_weights + 64 * 100


def test_a_weight_beyond_float16_is_named(tiny_model: Artifact, tmp_path: Path) -> None:
    source = open_source(tiny_model)
    huge = replace(source, get=lambda name: source.get(name) * 1e7)
    with pytest.raises(StageError, match=r"model.embed_tokens.weight holds values beyond float16; use precision fp32"):
        write(PlainGraph, tmp_path / "model.onnx", lambda file: FloatLayers(file, huge, "FLOAT16"))


def test_blocks_refuse_zero_points(tiny_model: Artifact, tmp_path: Path) -> None:
    source = open_source(quantize.run(Rtn(group_size=32, sym=False), tiny_model, tmp_path / "checkpoint"))
    with pytest.raises(UnsupportedError, match=r"model.layers.0.self_attn.q_proj is not symmetric int4.*sym: true"):
        write(PlainGraph, tmp_path / "model.onnx", lambda file: BlockLayers(file, source, "FLOAT16"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not written as a graph.*Llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope type 'dynamic'"),
        (
            {"architectures": ["GPT2LMHeadModel"], "hidden_act": "gelu_new", "scale_attn_weights": False},
            "scale_attn_weights",
        ),
        ({"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu"}, "hidden_act='gelu' of Gemma2"),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "dynamic"},
                },
            },
            "rope type 'dynamic'",
        ),
        (
            {"architectures": ["GraniteForCausalLM"], "rope_parameters": {"rope_type": "longrope"}},
            "rope type 'longrope'",
        ),
    ],
)
def test_what_the_graph_cannot_stand_for_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        check_decoder(SIZES | {"architectures": ["LlamaForCausalLM"]} | changes)


def test_buffers_of_older_checkpoints_are_no_weights(tmp_path: Path) -> None:
    """GPT-2's files once held the masks of its attention."""
    from safetensors.torch import load_file, save_file

    source, made = family("gpt2", tmp_path)[1], Artifact.open(tmp_path / "model")
    file = made.path / "model.safetensors"
    save_file(load_file(file) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file)
    again = open_source(made)
    assert again.names == source.names
    assert "model.layers.0.self_attn.qkv_proj.weight" in source.names
