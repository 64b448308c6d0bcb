"""Pruned vocabularies: exact on the tokens that stay, whatever the merges; the files; models and exports."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from edgetune.artifact import Artifact
from edgetune.compress.prune import stage, tokenizer_files
from edgetune.compress.prune.vocabulary import check_tokenizer, choose, cut_tokenizer, derivation, must_stay
from edgetune.data.calibration import CalibrationSet
from edgetune.data.contract import hold
from edgetune.data.golden import TEXTS, Golden
from edgetune.errors import UnsupportedError
from edgetune.recipe_export import GgufExport, OnnxExport
from edgetune.recipe_prune import Prune
from edgetune.sources import Source, find
from tests.conftest import make_tiny_model

ROWS = CalibrationSet(np.random.default_rng(1).integers(0, 300, (4, 12)))
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(merges: list[tuple[str, str]], *, ignore_merges: bool = False) -> dict[str, Any]:
    """A byte-level BPE of any merges, in any order, as tokenizer.json has it."""
    texts = dict.fromkeys(BYTES + [a + b for a, b in merges])
    model = models.BPE({text: i for i, text in enumerate(texts)}, merges, ignore_merges=ignore_merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


def ids_of(tokenizer: dict[str, Any], text: str) -> list[int]:
    return list(Tokenizer.from_str(json.dumps(tokenizer)).encode(text).ids)


@st.composite
def any_merges(draw: st.DrawFn) -> dict[str, Any]:
    """Merges that compete: of three letters, ranks in an order that training would never give."""
    parts, merges = ["a", "b", "c"], list[tuple[str, str]]()
    for _ in range(draw(st.integers(1, 14))):
        pair = (draw(st.sampled_from(parts)), draw(st.sampled_from(parts)))
        if pair not in merges:
            merges.append(pair)
            parts = list(dict.fromkeys([*parts, "".join(pair)]))
    return byte_level(draw(st.permutations(merges)), ignore_merges=draw(st.booleans()))


@settings(max_examples=300, deadline=None)
@given(any_merges(), st.data())
def test_a_text_of_tokens_that_stay_keeps_them_and_any_text_comes_back(tokenizer: dict[str, Any], data: Any) -> None:
    n_all = len(tokenizer["model"]["vocab"])
    if n_all == len(BYTES):
        return
    n_keep = data.draw(st.integers(len(BYTES), n_all - 1))
    wanted = data.draw(st.lists(st.integers(len(BYTES), n_all - 1), unique=True))
    kept = choose(tokenizer, n_keep, [{token: n + 1 for n, token in enumerate(wanted)}])
    assert len(kept) == n_keep
    made = cut_tokenizer(tokenizer, kept)
    texts = {token: text for text, token in made["model"]["vocab"].items()}
    assert [texts[i] for i in range(n_keep)] == [
        text for text, old in tokenizer["model"]["vocab"].items() if old in set(kept)
    ]
    old, new = (Tokenizer.from_str(json.dumps(one)) for one in (tokenizer, made))
    for text in data.draw(st.lists(st.text("abc ", max_size=24), min_size=8, max_size=8)):
        ids = old.encode(text).ids
        found = new.encode(text).ids
        assert "".join(texts[token] for token in found).replace("\u0120", " ") == text
        if set(ids) <= set(kept):
            assert found == [kept.index(token) for token in ids]


def test_a_trained_tokenizer_stays_exact_at_every_size() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcde", k=rng.randint(2, 9))) for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=BYTES, show_progress=False)
    tokenizer.train_from_iterator([" ".join(rng.choices(words, k=12)) for _ in range(300)], trainer)
    whole = json.loads(tokenizer.to_str())
    texts = [" ".join(rng.choices(words, k=2)) for _ in range(300)]
    n_exact = 0
    for n_keep in (260, 330, 500, 700, 899):
        used = Counter(token for text in rng.sample(texts, 60) for token in tokenizer.encode(text).ids)
        kept = choose(whole, n_keep, [used])
        place = {token: n for n, token in enumerate(kept)}
        cut = Tokenizer.from_str(json.dumps(cut_tokenizer(whole, kept)))
        for text in texts:
            ids = tokenizer.encode(text).ids
            if set(ids) <= set(kept):
                n_exact += 1
                assert cut.encode(text).ids == [place[token] for token in ids]
    assert n_exact > 300  # the test has something to say


def test_what_leads_to_a_token_stays_with_it() -> None:
    # "abc" is made by (a, b) then (ab, c), since (a, b) has the lower rank, though (a, bc) gives it, too
    tokenizer = byte_level([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")])
    ids = tokenizer["model"]["vocab"]
    assert derivation("abc", {("a", "b"): 0, ("b", "c"): 1, ("ab", "c"): 2, ("a", "bc"): 3}) == ["ab", "abc"]
    kept = choose(tokenizer, 258, [{ids["abc"]: 1}])
    assert set(kept) == {ids[text] for text in BYTES} | {ids["ab"], ids["abc"]}
    made = cut_tokenizer(tokenizer, kept)
    assert made["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert ids_of(made, "abc") == [made["model"]["vocab"]["abc"]]
    assert derivation("cab", {("a", "b"): 0, ("c", "a"): 1}) == []  # BPE leaves it as c, ab
    unreachable = byte_level([("a", "b"), ("c", "a"), ("ca", "b")], ignore_merges=True)
    whole = unreachable["model"]["vocab"]["cab"]
    kept = choose(unreachable, 257, [{whole: 1}])
    assert ids_of(cut_tokenizer(unreachable, kept), "cab") == [kept.index(whole)]


def test_texts_that_matter_come_first_then_others_by_count_then_by_rank() -> None:
    tokenizer = byte_level([("a", "b"), ("c", "d"), ("e", "f"), ("g", "h")])
    ab, cd, ef, gh = (tokenizer["model"]["vocab"][text] for text in ("ab", "cd", "ef", "gh"))
    assert max(choose(tokenizer, 257, [{gh: 1}, {cd: 9}])) == gh
    assert choose(tokenizer, 258, [{gh: 1}, {cd: 9, ef: 10}])[-2:] == [ef, gh]
    assert choose(tokenizer, 258, [{}, {}])[-2:] == [ab, cd]
    assert choose(tokenizer, 257, [{}], named=[ef])[-1] == ef
    for n_keep in (255, 260):
        with pytest.raises(UnsupportedError, match=rf"prune\.vocabulary={n_keep}: 256 tokens must stay .* has 260"):
            choose(tokenizer, n_keep, [{}])


def test_what_names_a_token_by_id_is_renumbered() -> None:
    tokenizer = byte_level([("a", "b"), ("c", "d")])
    special = {"id": 258, "content": "<s>", "special": True}
    template = {
        "type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": [],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [258], "tokens": ["<s>"]}},
    }  # fmt: skip
    byte = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    tokenizer |= {
        "added_tokens": [special], "post_processor": {"type": "Sequence", "processors": [byte, template]},
        "padding": {"strategy": "BatchLongest", "pad_id": 258, "pad_token": "<s>"},
    }  # fmt: skip
    check_tokenizer(tokenizer, "here")
    assert 258 in must_stay(tokenizer)
    made = cut_tokenizer(tokenizer, choose(tokenizer, 258, [{}]))
    assert made["added_tokens"] == [special | {"id": 257}]
    assert made["padding"]["pad_id"] == 257
    assert made["post_processor"]["processors"][0] == byte
    assert made["post_processor"]["processors"][1]["special_tokens"]["<s>"]["ids"] == [257]
    config = {"bos_token_id": 258, "eos_token_id": [258, 256], "pad_token_id": 999, "vocab_size": 300, "top_k": 3}
    kept = [*range(257), 258]
    assert tokenizer_files.renumbered(config, kept) == config | {
        "bos_token_id": 257, "eos_token_id": [257, 256], "pad_token_id": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"type": "Unigram"}}, "is Unigram, not byte-level BPE; leave vocabulary out"),
        ({"model": {"type": "BPE", "byte_fallback": True}}, "is SentencePiece's BPE, not byte-level BPE"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "is SentencePiece's BPE, not"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "drops merges at random"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "marks parts of words"),
        ({"post_processor": {"type": "BertProcessing"}}, "has a post-processor BertProcessing"),
    ],
)
def test_a_tokenizer_that_cannot_be_cut_is_refused(changes: dict[str, Any], says: str) -> None:
    tokenizer = byte_level([("a", "b")])
    with pytest.raises(UnsupportedError, match=f"prune.vocabulary: the tokenizer of here {says}"):
        check_tokenizer(tokenizer | changes, "here")


def test_a_base_that_cannot_be_cut_is_refused_before_it_is_read(tiny_model: Artifact, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model.path, tmp_path / "model"))
    tokenizer_files.check_source(find(str(folder)))
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"suppress_tokens": [5]}))
    with pytest.raises(UnsupportedError, match="names tokens in suppress_tokens, which would not be renumbered"):
        tokenizer_files.check_source(find(str(folder)))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedError, match=r"the tokenizer of .*model is SentencePiece's BPE"):
        tokenizer_files.check_source(find(str(folder)))


def test_a_gguf_with_sentencepiece_is_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="is 'llama', not byte-level BPE"):
        tokenizer_files.check_source(Source("a.gguf", "gguf", tmp_path / "a.gguf", "d"))


def kept_of(source: Artifact) -> list[int]:
    """Keep what golden conversations use, in the smallest vocabulary that holds it."""
    tokenizer = tokenizer_files.check_folder(source.path)
    used = Counter(token for talk in Golden.read(source.path).conversations for token in talk.ids)
    named = tokenizer_files.named_ids(source.path)
    sizes = range(len(must_stay(tokenizer, named)), len(tokenizer["model"]["vocab"]))
    return next(kept for n in sizes if set(used) <= set(kept := choose(tokenizer, n, [used], named)))


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact, Any]:
    """A tiny model, the same with fewer tokens, and the ids that stay."""
    folder = tmp_path_factory.mktemp("vocabulary")
    source = make_tiny_model(folder / "model", tie=request.param)
    kept = kept_of(source)
    config = Prune(vocabulary=len(kept))
    made = stage.run(config, source, folder / "cut", calibration=ROWS, kept_tokens=kept)
    assert made.identity == stage.planned_identity(config, source.identity, ROWS.digest, kept)
    assert made.identity != stage.planned_identity(config, source.identity, ROWS.digest, [*kept[:-1], 511])
    assert made.identity == stage.planned_identity(config, source.identity, "other rows, which nothing reads", kept)
    assert made.manifest.calibration is None
    return source, made, kept


def test_a_cut_model_gives_the_logits_of_the_whole_one(pair: tuple[Artifact, Artifact, list[int]]) -> None:
    source, made, kept = pair
    model, whole = (AutoModelForCausalLM.from_pretrained(one.path, dtype=torch.float64) for one in (made, source))
    assert model.config.vocab_size == model.lm_head.weight.shape[0] == len(kept)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings
    old, new = (AutoTokenizer.from_pretrained(one.path) for one in (source, made))
    before, after = Golden.read(source.path), Golden.read(made.path)
    assert len(new) == len(kept)
    for was, now in zip(before.conversations, after.conversations, strict=True):
        assert (was.text, was.prompt_length) == (now.text, now.prompt_length)
        assert now.ids == [kept.index(token) for token in was.ids]
        with torch.no_grad():
            wanted = whole(torch.tensor([was.ids])).logits[0][:, kept]
            torch.testing.assert_close(model(torch.tensor([now.ids])).logits[0], wanted)
    assert [text.text for text in after.texts] == list(TEXTS)
    for text in TEXTS:
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"]) == text
    assert new.chat_template == old.chat_template
    assert after.stop_ids == [kept.index(token) for token in before.stop_ids]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == new.eos_token_id == after.stop_ids[0]
    hold(made.path)


def test_licences_go_along(pair: tuple[Artifact, Artifact, list[int]], tmp_path: Path) -> None:
    source, made, kept = pair
    folder, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(source.path, folder)
    (folder / "LICENSE.txt").write_text("mine")
    out.mkdir()
    shutil.copyfile(made.path / "config.json", out / "config.json")
    tokenizer_files.write(folder, out, kept)
    assert (out / "LICENSE.txt").read_text() == "mine"


def test_a_cut_model_passes_the_contract_of_gguf(pair: tuple[Artifact, Artifact, list[int]], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from edgetune.export import gguf

    _, made, _ = pair
    out = gguf.run(GgufExport(type="F16"), made, tmp_path / "gguf", moments=None)
    told = out.manifest.notes["contract"]
    assert told["conversations"] == 2
    assert told["texts"] == len(TEXTS)


def hold_onnx(made: Artifact, builder: Any, out: Path) -> None:
    """Export a cut model, which holds it to its contract."""
    pytest.importorskip("onnxruntime_genai")
    from edgetune.export import onnx

    exported = onnx.run(OnnxExport(precision="fp32", builder=builder), made, out)
    assert exported.manifest.notes["contract"]["conversations"] == 2


def test_a_cut_model_passes_the_contract_of_onnx(pair: tuple[Artifact, Artifact, list[int]], tmp_path: Path) -> None:
    hold_onnx(pair[1], "own", tmp_path / "onnx")


@pytest.mark.parametrize(
    "pair", [pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)], indirect=True
)
def test_a_cut_model_passes_the_contract_of_onnx_by_genai(
    pair: tuple[Artifact, Artifact, list[int]], tmp_path: Path
) -> None:
    hold_onnx(pair[1], "genai", tmp_path / "onnx")


def test_vocabulary_and_widths_are_cut_together(tmp_path: Path) -> None:
    source = make_tiny_model(tmp_path / "model", layers=3)
    kept = kept_of(source)
    sizes = {"layers": 2, "intermediate_size": 96, "hidden_size": 32}
    calibration = CalibrationSet(np.array([[kept[i] for i in row] for row in ROWS.ids % len(kept)]))
    narrow = stage.run(Prune(**sizes), source, tmp_path / "narrow", calibration=calibration)
    both = stage.run(
        Prune(**sizes, vocabulary=len(kept)), source, tmp_path / "both", calibration=calibration, kept_tokens=kept
    )
    first, second = (AutoModelForCausalLM.from_pretrained(one.path) for one in (narrow, both))
    with torch.no_grad():
        wanted = first(torch.from_numpy(calibration.ids)).logits[..., kept]
        torch.testing.assert_close(second(torch.from_numpy(ROWS.ids % len(kept))).logits, wanted)
    assert both.manifest.notes["kept_layers"] == narrow.manifest.notes["kept_layers"]
