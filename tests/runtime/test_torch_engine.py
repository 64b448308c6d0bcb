"""The torch engine against plain transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgetune.artifact import Artifact
from edgetune.errors import EngineError, UsageError
from edgetune.runtime.engine import TokenRow, greedy
from edgetune.runtime.engines import torch_engine
from edgetune.runtime.engines.torch_engine import TorchEngine

IDS = [1, 5, 99, 77, 300, 2, 8, 41, 41, 500]


def plain(path: Path, ids: list[int], adapter: Path | None = None) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


@pytest.fixture(scope="module")
def adapter(tiny_model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model.path, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    path = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(path)
    return path


def test_every_way_to_logits_gives_those_of_transformers(tiny_model: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_engine, "BATCH_TOKENS", 24)  # several batches
    monkeypatch.setattr(torch_engine, "HEAD_POSITIONS", 4)
    engine = TorchEngine.load(tiny_model.path, n_ctx=16, n_threads=1)
    expected = plain(tiny_model.path, IDS)
    assert engine.n_vocab == expected.shape[1] == 512
    np.testing.assert_allclose(engine.score(IDS), expected, atol=1e-5)
    for _ in range(2):  # prefill forgets what was before
        steps = [engine.prefill(IDS[:4]), *map(engine.decode, IDS[4:])]
        np.testing.assert_allclose(np.stack(steps), expected[3:], atol=1e-5)
    rows = [TokenRow(tuple(IDS[:n]), start) for n, start in [(3, 2), (10, 4), (2, 1), (7, 1), (10, 9), (5, 3)]]
    found = list(engine.score_rows(rows))
    for row, logits in zip(rows, found, strict=True):
        np.testing.assert_allclose(logits, expected[row.start - 1 : len(row.ids) - 1], atol=1e-5)
    engine.close()


def test_an_adapter_runs_on_its_base_and_on_the_base_in_nf4(tiny_model: Artifact, adapter: Path) -> None:
    expected = plain(tiny_model.path, IDS, adapter)
    assert np.abs(expected - plain(tiny_model.path, IDS)).max() > 0.1  # the adapter does something
    engine = TorchEngine.load(tiny_model.path, n_ctx=16, n_threads=1, adapter=str(adapter))
    np.testing.assert_allclose(engine.score(IDS), expected, atol=1e-5)
    steps = [engine.prefill(IDS[:4]), *map(engine.decode, IDS[4:])]
    np.testing.assert_allclose(np.stack(steps), expected[3:], atol=1e-5)
    engine.close()

    four = TorchEngine.load(tiny_model.path, n_ctx=16, n_threads=1, adapter=str(adapter), quantize_base=True)
    kinds = {type(module).__name__ for module in four._causal.modules()}
    assert any("4bit" in kind.lower() for kind in kinds)
    logits = four.score(IDS)
    steps = [four.prefill(IDS[:4]), *map(four.decode, IDS[4:])]
    np.testing.assert_allclose(np.stack(steps), logits[3:], atol=1e-3)
    loss = np.abs(logits - expected).mean()
    assert 1e-3 < loss < 0.3 * np.abs(expected).mean()  # quantized, and still this model with this adapter
    four.close()


def test_a_gptq_checkpoint_runs_as_what_it_stands_for(tiny_model: Artifact, tmp_path: Path) -> None:
    from edgetune.compress import quantize
    from edgetune.compress.checkpoint import load_dequantized
    from edgetune.recipe import Rtn

    made = quantize.run(Rtn(bits=8, group_size=32), tiny_model, tmp_path / "gptq")
    engine = TorchEngine.load(made.path, n_ctx=16, n_threads=1)
    with torch.no_grad():
        expected = np.asarray(load_dequantized(made.path, torch.float32)(torch.tensor([IDS])).logits[0])
    np.testing.assert_allclose(engine.score(IDS), expected, atol=1e-5)
    assert 1e-5 < np.abs(expected - plain(tiny_model.path, IDS)).max() < 0.1
    engine.close()
    with pytest.raises(UsageError, match="already a GPTQ checkpoint"):
        TorchEngine.load(made.path, n_ctx=16, n_threads=1, quantize_base=True)


def test_bfloat16_is_near(tiny_model: Artifact) -> None:
    engine = TorchEngine.load(tiny_model.path, n_ctx=16, n_threads=1, dtype="bfloat16")
    logits = engine.score(IDS)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, plain(tiny_model.path, IDS), atol=0.1)
    engine.close()


@pytest.mark.parametrize(
    "facts", [{"logits_scaling": 4.0}, {"logit_scale": 0.25}, {"final_logit_softcapping": 0.5}], ids=str
)
def test_what_an_architecture_puts_behind_its_head_is_kept(tmp_path: Path, facts: dict[str, float]) -> None:
    from transformers import (  # fmt: skip
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    config, model = {
        "logits_scaling": (GraniteConfig, GraniteForCausalLM),
        "logit_scale": (CohereConfig, CohereForCausalLM),
        "final_logit_softcapping": (Gemma2Config, Gemma2ForCausalLM),
    }[next(iter(facts))]
    model(config(**small, **facts)).save_pretrained(tmp_path)
    ids = [1, 5, 9, 7, 3]
    engine = TorchEngine.load(tmp_path, n_ctx=16, n_threads=1)
    np.testing.assert_allclose(engine.score(ids), plain(tmp_path, ids), atol=1e-5)
    engine.close()


def test_it_tokenizes_as_training_did(tiny_model: Artifact) -> None:
    engine = TorchEngine.load(tiny_model.path, n_ctx=16, n_threads=1)
    text = "<|im_start|>user\nturn the light<|im_end|>\n"
    expected = AutoTokenizer.from_pretrained(tiny_model.path)(text, add_special_tokens=False)["input_ids"]
    assert engine.tokenize(text) == expected
    engine.close()


def test_wrong_use_is_refused(tiny_model: Artifact, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int3'"):
        TorchEngine.load(tiny_model.path, n_ctx=16, n_threads=1, dtype="int3")
    with pytest.raises(EngineError, match="torch cannot load"):
        TorchEngine.load(tmp_path, n_ctx=16, n_threads=1)
    before = torch.get_num_threads()
    engine = TorchEngine.load(tiny_model.path, n_ctx=8, n_threads=1)
    with pytest.raises(EngineError, match="9 tokens of context, n_ctx is 8"):
        engine.prefill(IDS[:9])
    engine.prefill(IDS[:8])
    with pytest.raises(EngineError, match="9 tokens of context, n_ctx is 8"):
        engine.decode(1)
    with pytest.raises(EngineError, match="token id 512 is not in the vocabulary of 512"):
        engine.prefill([1, 512])
    with pytest.raises(EngineError, match="empty row"):
        engine.prefill([])
    engine.close()
    assert torch.get_num_threads() == before


def test_many_prompts_at_once_go_on_as_each_alone(tiny_model: Artifact) -> None:
    prompts = [[5, 6, 7], [9, 30, 31, 32, 33, 34], [40, 41]]
    engine = TorchEngine.load(tiny_model.path, n_ctx=64, n_threads=1)
    free = [greedy(engine, prompt, frozenset({2}), 8) for prompt in prompts]
    stop = frozenset({2, free[0][3]})
    limits = [8, 5, 8]
    alone = [greedy(engine, prompt, stop, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    assert engine.continue_rows(prompts, stop, limits) == alone
    assert len({len(row) for row in alone}) > 1
    assert engine.continue_rows([], stop, []) == []
    engine.close()


def test_a_continuation_is_greedy_whatever_the_folder_asks_for(tiny_model: Artifact, tmp_path: Path) -> None:
    shutil.copytree(tiny_model.path, tmp_path / "model")
    asked = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_length": 3}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(asked))
    engine = TorchEngine.load(tmp_path / "model", n_ctx=64, n_threads=1)
    prompts = [[5, 6, 7], [9, 30, 31, 32, 33, 34]]
    alone = [greedy(engine, prompt, frozenset({2}), 24) for prompt in prompts]
    assert len(set(alone[0])) < len(alone[0])  # it repeats itself
    assert engine.continue_rows(prompts, frozenset({2}), [24, 24]) == alone
    engine.close()
