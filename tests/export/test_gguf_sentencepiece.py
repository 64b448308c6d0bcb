"""SentencePiece's tokenizers in a GGUF file: llama.cpp gives the ids of the tokenizers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgetune.artifact import Artifact, draft
from edgetune.data.golden import make_golden
from edgetune.errors import ContractError, SourceError, UnsupportedError
from edgetune.export import gguf
from edgetune.export.gguf_vocab import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, read_vocabulary
from edgetune.recipe_export import GgufExport
from tests.conftest import CHAT_TEMPLATE, WORDS

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.usefixtures("children_here")
LEGACY, NEVER = "prepended", "never"


def tokenizer(folder: Path, kind: str) -> None:
    """Train pieces with byte fallback, in the way of Llama 2 (a blank goes before) or of Gemma (it does not)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    found = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = normalizers.Replace(" ", "\u2581")
    prepended = normalizers.Sequence([normalizers.Prepend("\u2581"), blanks])
    found.normalizer = prepended if kind == LEGACY else blanks
    if kind == NEVER:
        found.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    found.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=[AddedToken(t, special=True) for t in special],
    )  # fmt: skip
    found.train_from_iterator([" ".join(WORDS), *WORDS, "user assistant system light lights lit"] * 4, trainer)
    raw = json.loads(found.to_str())
    vocab = raw["model"]["vocab"]
    for i in range(256):
        vocab.setdefault(f"<0x{i:02X}>", len(vocab))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(raw)), bos_token="<|im_start|>", eos_token="<|im_end|>",
        unk_token="<unk>", pad_token="<|im_end|>", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    fast.save_pretrained(folder)


def make(out: Path, kind: str) -> Artifact:
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    with draft(out, kind="model", stage="source/1", config={"pieces": kind}) as pending:
        tokenizer(pending.path, kind)
        fast = PreTrainedTokenizerFast.from_pretrained(pending.path)
        config = LlamaConfig(
            vocab_size=len(fast), hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).float()
        model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
        model.save_pretrained(pending.path)
        talk = [{"role": "user", "content": "turn  the light é\n\tin"}, {"role": "assistant", "content": "lit 👩‍🔧"}]
        make_golden(fast, [talk], stop_ids=[2]).write(pending.path)
    return pending.artifact


def export(source: Artifact, out: Path) -> Artifact:
    return gguf.run(GgufExport(type="F32", imatrix=False), source, out, moments=None)


@pytest.mark.parametrize("kind", [LEGACY, NEVER])
def test_ids_are_those_of_training(tmp_path: Path, kind: str) -> None:
    """The golden texts: scripts, emoji, code, runs of blanks; bytes where there is no piece."""
    source = make(tmp_path / "model", kind)
    made = export(source, tmp_path / "out")
    assert made.manifest.notes["contract"]["tokens"] > 100
    assert made.manifest.notes["parity"]["max_abs"] < 1e-3
    found = read_vocabulary(source.path, 2000)
    assert (found.scores is not None, found.merges, found.space_prefix) == (True, [], kind == LEGACY)
    told = dict(zip(found.tokens, found.types, strict=True))
    assert (told["<unk>"], told["<|im_end|>"], told["<0x0A>"], told["l"]) == (CONTROL, CONTROL, BYTE, NORMAL)
    assert UNKNOWN not in found.types  # the unknown piece is an added token here


def test_a_wrong_blank_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.export import gguf_vocab

    source = make(tmp_path / "model", NEVER)
    monkeypatch.setattr(gguf_vocab, "_space_prefix", lambda *_: True)
    with pytest.raises(ContractError, match="token ids of"):
        export(source, tmp_path / "out")


def test_wrong_scores_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgetune.export import gguf_vocab

    source = make(tmp_path / "model", LEGACY)
    monkeypatch.setattr(gguf_vocab, "_scores", lambda tokens, *_: [float(i) for i in range(len(tokens))])
    with pytest.raises(ContractError, match="token ids of"):
        export(source, tmp_path / "out")


def test_a_special_token_behind_the_embedding_is_left_out(tmp_path: Path) -> None:
    """Gemma 3 of 1B has one of images; a token that text may hold is refused there."""
    source = make(tmp_path / "model", NEVER)
    n_vocab = json.loads((source.path / "config.json").read_bytes())["vocab_size"]
    path = source.path / "tokenizer.json"
    raw = json.loads(path.read_bytes())
    soft = raw["added_tokens"][0] | {"id": n_vocab, "content": "<image_soft_token>"}
    path.write_text(json.dumps(raw | {"added_tokens": [*raw["added_tokens"], soft]}))
    made = export(Artifact(source.path, source.manifest), tmp_path / "out")
    said = f"added token '<image_soft_token>' has no row in the embedding (id {n_vocab}, {n_vocab} rows): left out"
    assert said in made.manifest.fallbacks
    path.write_text(json.dumps(raw | {"added_tokens": [*raw["added_tokens"], soft | {"special": False}]}))
    with pytest.raises(SourceError, match=f"the tokenizer has an id {n_vocab}, the embedding {n_vocab} rows"):
        read_vocabulary(source.path, n_vocab)


def test_an_added_run_of_blanks_is_written_as_blanks(tmp_path: Path) -> None:
    """As Gemma's are: not special, so that llama.cpp finds them in a text and shows them as they are written."""
    source = make(tmp_path / "model", NEVER)
    path = source.path / "tokenizer.json"
    raw = json.loads(path.read_bytes())
    token = raw["model"]["vocab"]["<0xFF>"]
    del raw["model"]["vocab"]["<0xFF>"]
    raw["model"]["vocab"]["\u2581\u2581"] = token
    run = raw["added_tokens"][0] | {"id": token, "content": "\u2581\u2581", "special": False}
    path.write_text(json.dumps(raw | {"added_tokens": [*raw["added_tokens"], run]}))
    found = read_vocabulary(source.path, 2000)
    assert (found.tokens[token], found.types[token]) == ("  ", USER_DEFINED)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Lowercase"}),
        ("normalizer", None),
        ("pre_tokenizer", {"type": "Whitespace"}),
    ],
)
def test_steps_that_llama_cpp_does_not_take_are_refused(tmp_path: Path, part: str, value: Any) -> None:
    source = make(tmp_path / "model", NEVER)
    path = source.path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | {part: value}))
    with pytest.raises(UnsupportedError, match="no such step before SentencePiece's merges"):
        read_vocabulary(source.path, 2000)
