"""llama.cpp's own converter as an oracle of SentencePiece's tokenizers: pieces, scores, types and special ids.

Needs what `test_upstream_converter` needs, and sentencepiece in the environment that `python benchmarks/peers.py` makes
for it: it trains the pieces, and the converter reads its file. Ours reads `tokenizer.json`, as Transformers writes it.
"""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from edgetune.export import gguf
from edgetune.export.gguf_vocab import CONTROL, USER_DEFINED
from tests.export.test_gguf_families import export, make
from tests.export.test_upstream_converter import CACHE, OTHERWISE, SOURCE, hold, reader, run_theirs

PYTHONS = sorted(CACHE.glob(f"sentencepiece-*-torch-{metadata.version('torch')}/bin/python"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SOURCE / "conversion").is_dir() or not PYTHONS, reason="needs `python benchmarks/peers.py` first"
    ),
]
TRAIN = """
import json, sys
from pathlib import Path
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
job = json.loads(sys.argv[1])
SentencePieceTrainer.train(
    sentence_iterator=iter(job["texts"]), model_prefix=job["prefix"], model_type="bpe", byte_fallback=True,
    hard_vocab_limit=False, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
    allow_whitespace_only_pieces=True, minloglevel=2, **job["settings"],
)
read = SentencePieceProcessor(model_file=job["prefix"] + ".model")
pieces = [[read.id_to_piece(i), read.is_control(i)] for i in range(read.get_piece_size())]
Path(job["prefix"] + ".json").write_text(json.dumps(pieces))
"""
TEXTS = [
    "turn the light in the kitchen to 30 percent and set what temperature the boiler is at",
    "def f(x):\n    if x:\n        return [1, 22]\n    return None", "a   b    c  d", "Grüße aus Zürich, naïve café",
    "user\nturn the light on", "assistant\nthe light is lit",
] * 8  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}{{ 'START' + message['role'] + '\n' + message['content'] + 'END\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'STARTassistant\n' }}{% endif %}"
)


class Kind(NamedTuple):
    """How a family's tokenizers are trained and what Transformers makes of them."""

    settings: dict[str, Any]
    marks: tuple[str, str]  # start and end of a turn
    special: dict[str, str]
    defined: list[str]  # in SentencePiece's file
    added: dict[str, bool]  # behind it: text -> whether it is special
    prepends: bool


LLAMA = Kind(
    {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "vocab_size": 420}, ("<|im_start|>", "<|im_end|>"),
    {"unk": "<unk>", "bos": "<s>", "eos": "<|im_end|>", "pad": "<unk>"}, [],
    {"<|im_start|>": True, "<|im_end|>": True, "<tool>": False, "<|plain|>": False}, True,
)  # fmt: skip
GEMMA = Kind(
    {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>",
     "bos_piece": "<bos>", "vocab_size": 420, "add_dummy_prefix": False}, ("<start_of_turn>", "<end_of_turn>"),
    {"unk": "<unk>", "bos": "<bos>", "eos": "<end_of_turn>", "pad": "<pad>"},
    ["<mask>", "<unused0>", "<unused1>", "<start_of_turn>", "<end_of_turn>", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<h1>"],
    {}, False,
)  # fmt: skip
MODELS = {"llama": LLAMA, "mistral": LLAMA, "phi3": LLAMA, "gemma2": GEMMA, "gemma3": GEMMA}


def trained(kind: Kind, folder: Path) -> list[tuple[str, bool]]:
    """Train `folder/tokenizer.model`; give its pieces, and which are control ones."""
    settings = kind.settings | {"user_defined_symbols": kind.defined}
    job = {"texts": TEXTS, "prefix": str(folder / "tokenizer"), "settings": settings}
    run_theirs([str(PYTHONS[-1]), "-c", TRAIN, json.dumps(job)])
    return [(piece, control) for piece, control in json.loads((folder / "tokenizer.json").read_bytes())]


def as_transformers(kind: Kind, pieces: list[tuple[str, bool]], folder: Path) -> None:
    """Write what Transformers makes of SentencePiece's file: merges in the order of their pieces, added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
    found = Tokenizer(models.BPE(vocab, generate_merges(vocab), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blanks = normalizers.Replace(" ", "▁")
    if kind.prepends:
        found.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    else:
        found.normalizer, found.pre_tokenizer = blanks, pre_tokenizers.Split(" ", "merged_with_previous")
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    known = {piece: control or piece in kind.marks or piece == "<unk>" for piece, control in pieces
             if control or piece in (*kind.defined, "<unk>")}  # fmt: skip
    tokens = [AddedToken(text, normalized=False, special=special) for text, special in (known | kind.added).items()]
    for token in tokens:
        (found.add_special_tokens if token.special else found.add_tokens)([token])
    named = {f"{short}_token": text for short, text in kind.special.items()}
    template = TEMPLATE.replace("START", kind.marks[0]).replace("END", kind.marks[1])
    PreTrainedTokenizerFast(tokenizer_object=found, chat_template=template, **named).save_pretrained(folder)


def as_on_the_hub(folder: Path) -> None:
    """Write what the converter reads beside SentencePiece's file, and Transformers 5 no longer does."""
    added = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
    settings = folder / "tokenizer_config.json"
    decoder = {str(entry["id"]): {key: entry[key] for key in ("content", "special")} for entry in added}
    settings.write_text(json.dumps(json.loads(settings.read_bytes()) | {"added_tokens_decoder": decoder}))


@pytest.mark.parametrize("name", MODELS)
def test_the_vocabulary_is_upstreams(tmp_path: Path, name: str) -> None:
    kind, theirs = MODELS[name], tmp_path / "theirs"
    theirs.mkdir()
    pieces = trained(kind, theirs)
    texts = [piece for piece, _ in pieces] + list(kind.added)
    ids = {f"{short}_token_id": texts.index(text) for short, text in kind.special.items() if short != "unk"}
    source = make(
        tmp_path / "model", name, tokenizer_of=lambda folder: as_transformers(kind, pieces, folder),
        stop=texts.index(kind.marks[1]), vocab_size=len(texts) + 3, **ids,
    )  # fmt: skip
    shutil.copytree(source.path, theirs, dirs_exist_ok=True)
    as_on_the_hub(theirs)
    converter = [str(PYTHONS[-1]), str(SOURCE / "convert_hf_to_gguf.py"), str(theirs)]
    run_theirs([*converter, "--outtype", "f32", "--outfile", str(tmp_path / "theirs.gguf")])
    ours, found = reader(export(source, tmp_path / "out").path / gguf.FILE), reader(tmp_path / "theirs.gguf")
    hold(ours, found, OTHERWISE - {"tokenizer.ggml.pre", "tokenizer.ggml.add_space_prefix"})
    mine, other = (file.fields["tokenizer.ggml.token_type"].contents() for file in (ours, found))
    differ = {texts[at]: (a, b) for at, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b}
    # It takes some texts for special by their look; here the tokenizer's own flag counts, as it does in Transformers.
    looks = {"<|plain|>", "<mask>", "<unused0>", "<unused1>"} & set(texts)
    assert differ == ({} if name == "phi3" else dict.fromkeys(looks, (USER_DEFINED, CONTROL)))
