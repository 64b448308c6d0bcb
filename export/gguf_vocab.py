"""A BPE tokenizer, byte-level or SentencePiece's, as tokenizer.json holds it, in the terms of a GGUF file."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune.errors import SourceError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "\u2581"  # stands for a blank in SentencePiece's pieces
COMPOSED = "the tokenizer composes characters (NFC) in training, {} does not: give it composed text"
_NO_MERGE = -1e4  # score of a piece that no merge gives
_SCORES = {UNKNOWN: 0.0, CONTROL: -1000.0, USER_DEFINED: -1000.0, UNUSED: -10000.0, BYTE: 0.0}  # as its converter's

_BYTES: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)

# llama.cpp's name -> the same splitting as the tokenizers library writes it. Another splitting is refused:
# with a wrong splitter most texts still come out right, and the rest silently wrong.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}],
    "llama-bpe": [_split(_LLAMA3), _BYTES],
    "qwen2": [_split(_LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")), _BYTES],
}


@dataclass(frozen=True)
class Vocabulary:
    """What goes under `tokenizer.` in a GGUF file."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]  # bos, eos, eot, unk, pad
    stop_ids: list[int]
    chat_template: str
    remarks: list[str] = field(default_factory=list)
    scores: list[float] | None = None  # of SentencePiece's pieces; None for byte-level BPE
    space_prefix: bool = False  # a blank goes before a text, and before what follows a special token
    composes: bool = False  # the tokenizer composes characters (NFC) before it splits; llama.cpp does not


def read_vocabulary(folder: Path, n_vocab: int) -> Vocabulary:
    """Read the tokenizer of a model folder whose embedding has `n_vocab` rows.

    Special tokens that were added behind the embedding's end are left out, with a remark: no row stands for them.
    Raises UnsupportedError for a kind of tokenizer that is not written here, SourceError where files are missing.
    """
    tokenizer = _json(folder / "tokenizer.json")
    settings = _json(folder / "tokenizer_config.json")
    model = tokenizer["model"]
    pieces = bool(model.get("byte_fallback"))
    pre, prefix = ("default", _space_prefix(tokenizer, folder)) if pieces else (_supported(tokenizer, folder), False)
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [UNUSED] * n_vocab
    added = tokenizer.get("added_tokens", [])
    stops = _stop_ids(folder)
    beyond = [
        entry
        for entry in added
        if entry["special"] and n_vocab <= entry["id"] == model["vocab"].get(entry["content"], entry["id"])
    ]
    left_out = {entry["id"] for entry in beyond}
    added = [entry for entry in added if entry["id"] not in left_out]
    vocabulary = {text: token for text, token in model["vocab"].items() if token not in left_out}
    last = max([*vocabulary.values(), *stops, *(t["id"] for t in added)])
    if last >= n_vocab:
        raise SourceError(f"{folder}: the tokenizer has an id {last}, the embedding {n_vocab} rows")
    for text, token in vocabulary.items():
        tokens[token], types[token] = text, _kind(text, model) if pieces else NORMAL
    remarks = [
        f"added token {entry['content']!r} has no row in the embedding (id {entry['id']}, {n_vocab} rows): left out"
        for entry in beyond
    ]
    for entry in added:
        types[entry["id"]] = CONTROL if entry["special"] else USER_DEFINED
        shown = pieces and not entry["special"]  # llama.cpp finds it in the text, and shows it, as it is written
        tokens[entry["id"]] = entry["content"].replace(SPACE, " ") if shown else entry["content"]
        if any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            remarks.append(f"added token {entry['content']!r} strips its neighbours in training, not in llama.cpp")
    composed = composes(folder)
    if composed:
        remarks.append(COMPOSED.format("llama.cpp"))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    ids = {**vocabulary, **{t["content"]: t["id"] for t in added}}
    special = _special(settings, ids, stops)
    scores = _scores(tokens, types, merges) if pieces else None
    return Vocabulary(
        pre, tokens, types, [] if pieces else merges, special, stops, _template(folder, settings), remarks, scores,
        prefix, composed,
    )  # fmt: skip


def composes(folder: Path) -> bool:
    """Tell whether a tokenizer composes characters (NFC), which no runtime but Transformers does."""
    normalizer = _json(folder / "tokenizer.json").get("normalizer") or {}
    return any(step.get("type") == "NFC" for step in normalizer.get("normalizers", [normalizer]))


def _kind(piece: str, model: dict[str, Any]) -> int:
    if piece == model.get("unk_token"):
        return UNKNOWN
    return BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else NORMAL


def _scores(tokens: list[str], types: list[int], merges: list[str]) -> list[float]:
    """Give each piece its score: llama.cpp merges by scores, the highest first.

    Where pieces are numbered in the order in which they are merged, their scores are SentencePiece's, which count down
    from 0; else each is the rank of the merge that gives it first.
    """
    normal = [token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL]
    ranks = {token: rank for rank, token in enumerate(normal)}
    made = [merge.replace(" ", "") for merge in merges]
    order = [ranks[piece] for piece in made if piece in ranks]
    if order != sorted(order):
        first: dict[str, int] = {}
        for rank, piece in enumerate(made):
            first.setdefault(piece, rank)
        scores = {token: -float(first[token]) if token in first else _NO_MERGE for token in normal}
    else:
        scores = {token: -float(rank) for token, rank in ranks.items()}
    return [scores[t] if kind == NORMAL else _SCORES[kind] for t, kind in zip(tokens, types, strict=True)]


def _space_prefix(tokenizer: dict[str, Any], folder: Path) -> bool:
    """Tell whether a blank goes before a text. Raises UnsupportedError for steps that llama.cpp does not take."""
    normalizer, pre = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    if tokenizer["model"].get("type") != "BPE":
        raise UnsupportedError(f"{folder}: a tokenizer of type {tokenizer['model'].get('type')} is not written to GGUF")
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepends = {"type": "Prepend", "prepend": SPACE} in steps
    unknown = [step for step in steps if step not in (blank, {"type": "Prepend", "prepend": SPACE})]
    if pre.get("type") == "Metaspace" and not steps and not pre.get("split"):
        return bool(pre.get("prepend_scheme", "always") != "never")
    no_split = pre.get("type") == "Split" and pre.get("pattern") == {"String": " "}  # no blank is left to split at
    if unknown or blank not in steps or (pre and not no_split):
        said = json.dumps(unknown or pre)[:160]
        raise UnsupportedError(f"{folder}: llama.cpp has no such step before SentencePiece's merges: {said}")
    return prepends


def _supported(tokenizer: dict[str, Any], folder: Path) -> str:
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"{folder}: a tokenizer of type {model.get('type')} is not written to GGUF; BPE is")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise UnsupportedError(f"{folder}: llama.cpp has no normalizer {normalizer} before byte-level BPE")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedError(f"{folder}: BPE with a subword prefix or suffix cannot be written to GGUF")
    found = tokenizer.get("pre_tokenizer") or {}
    steps = [_plain(step) for step in found.get("pretokenizers", [found])]
    for name, wanted in PRE_TOKENIZERS.items():
        if steps == wanted and bool(model.get("ignore_merges")) == (name == "llama-bpe"):
            return name
    raise UnsupportedError(
        f"{folder}: this pre-tokenizer has no known name in llama.cpp: {json.dumps(found)[:160]}; "
        f"known: {', '.join(PRE_TOKENIZERS)}"
    )


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """A pre-tokenizer step without what does not change how it splits."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _stop_ids(folder: Path) -> list[int]:
    """The end tokens that the checkpoint declares: generation_config.json, or else config.json."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (found := _json(folder / name).get("eos_token_id")) is not None:
            return sorted(found) if isinstance(found, list) else [found]
    raise SourceError(f"{folder}: neither generation_config.json nor config.json names an eos_token_id")


def _special(settings: dict[str, Any], ids: dict[str, int], stops: list[int]) -> dict[str, int]:
    special: dict[str, int] = {}
    for short in ("bos", "eos", "unk", "pad"):
        token = settings.get(f"{short}_token")
        text = token["content"] if isinstance(token, dict) else token
        if text is not None and text in ids:
            special[short] = ids[text]
    if special.get("eos") not in stops:
        special["eos"] = stops[0]
    others = [stop for stop in stops if stop != special["eos"]]
    special.update(zip(("eot", "eom"), others, strict=False))
    return special


def _template(folder: Path, settings: dict[str, Any]) -> str:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = settings.get("chat_template") or ""
    if not isinstance(found, str):
        raise UnsupportedError(f"{folder}: several named chat templates; keep the one that was trained with")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    return found
