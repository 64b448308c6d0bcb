"""Fewer tokens of a byte-level BPE (arXiv:1508.07909), and a tokenizer that stays exact on those.

BPE begins with the bytes of a word and merges the adjacent pair of lowest rank, the leftmost of equal ones, until none
is left. What it makes on its way to a token is the token's derivation. A token stays together with its derivation, and
a merge stays where both parts and the result do. Then a text that was encoded in tokens that stay is encoded in the
same ones, renumbered:

- No merge crosses the border of two tokens of the result, so inside each of them happens what happens to its text
  alone. All merges of the whole way are therefore among those that stay.
- By induction both ways are in the same state. The pair of lowest rank among all merges is one that stays, so it is
  also the lowest among those that stay. At the end no merge applies, so none of those that stay does.

Merges that are gone can only have been lost comparisons. A text with tokens that are gone is encoded in shorter ones,
down to bytes. Tokens that BPE never comes to stand for whole words (`ignore_merges`), which are looked up first.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from edgetune.errors import UnsupportedError

NO_MERGE = 1 << 62
PLAIN_PROCESSORS = (None, "ByteLevel")  # hold no ids


def check_tokenizer(tokenizer: Mapping[str, Any], where: object) -> None:
    """Refuse a tokenizer.json that this file cannot cut. Raises UnsupportedError."""
    model, pre = tokenizer["model"], tokenizer.get("pre_tokenizer") or {}
    steps = [step.get("type") for step in pre.get("pretokenizers", [pre])]
    why = None
    if model.get("type") != "BPE" or model.get("byte_fallback") or "ByteLevel" not in steps:
        kind = "SentencePiece's BPE" if model.get("type") == "BPE" else str(model.get("type"))
        why = f"is {kind}, not byte-level BPE"
    elif model.get("dropout"):
        why = "drops merges at random"
    elif model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        why = "marks parts of words by a prefix or suffix"
    elif unknown := [name for name in _processors(tokenizer) if name not in (*PLAIN_PROCESSORS, "TemplateProcessing")]:
        why = f"has a post-processor {unknown[0]}"
    if why is not None:
        raise UnsupportedError(f"prune.vocabulary: the tokenizer of {where} {why}; leave vocabulary out")


def derivation(token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Give what BPE makes on its way to a token, itself last; nothing where it does not come to it."""
    parts, made = list(token), list[str]()
    while len(parts) > 1:
        rank, at = min((ranks.get(pair, NO_MERGE), at) for at, pair in enumerate(pairwise(parts)))
        if rank == NO_MERGE:
            return []
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        made.append(parts[at])
    return made


def must_stay(tokenizer: Mapping[str, Any], named: Iterable[int] = ()) -> set[int]:
    """Give the ids that every cut keeps: added tokens, bytes, the unknown token, `named` and what leads to those."""
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    added = {token["id"] for token in tokenizer.get("added_tokens") or []}
    unknown = vocab.get(tokenizer["model"].get("unk_token") or "")
    stay = added | {token for text, token in vocab.items() if len(text) == 1}
    stay |= set() if unknown is None else {unknown}
    closed = _Closure(tokenizer)
    for token in set(named) & set(vocab.values()):
        stay |= closed.of(token)
    return stay


def choose(
    tokenizer: Mapping[str, Any], n_keep: int, uses: Sequence[Mapping[int, int]], named: Iterable[int] = ()
) -> list[int]:
    """Give the `n_keep` ids that stay, ascending.

    `uses` counts each token in texts, those that matter most first: a token that the first text uses goes before all
    that only the second does. Then come the others in the tokenizer's own order. A token that does not fit with its
    derivation is passed over. Raises UnsupportedError where too few may stay, or all would.
    """
    closed, kept = _Closure(tokenizer), must_stay(tokenizer, named)
    n_all = len(closed.texts | {token["id"]: "" for token in tokenizer.get("added_tokens") or []})
    if not len(kept) <= n_keep < n_all:
        raise UnsupportedError(
            f"prune.vocabulary={n_keep}: {len(kept)} tokens must stay (special ones and bytes), and the tokenizer has "
            f"{n_all}; choose a number between"
        )
    for token in sorted(closed.texts, key=lambda token: (*(-use.get(token, 0) for use in uses), token)):
        if len(kept) == n_keep:
            break
        missing = closed.of(token) - kept
        if len(kept) + len(missing) <= n_keep:
            kept |= missing
    return sorted(kept)


def cut_tokenizer(tokenizer: Mapping[str, Any], kept: Collection[int]) -> dict[str, Any]:
    """Give the tokenizer.json of the tokens that stay, their ids renumbered in the old order."""
    place = {old: new for new, old in enumerate(sorted(kept))}
    model = tokenizer["model"]
    vocab = {text: place[token] for text, token in model["vocab"].items() if token in place}
    merges = [merge for merge, parts in zip(model["merges"], _pairs(model), strict=True)
              if all(text in vocab for text in (*parts, "".join(parts)))]  # fmt: skip
    made = {**tokenizer, "model": {**model, "vocab": vocab, "merges": merges}}
    made["added_tokens"] = [{**token, "id": place[token["id"]]} for token in tokenizer.get("added_tokens") or []]
    if padding := tokenizer.get("padding"):
        made["padding"] = {**padding, "pad_id": place[padding["pad_id"]]}
    if processor := tokenizer.get("post_processor"):
        made["post_processor"] = _renumbered(processor, place)
    return made


class _Closure:
    """What must stay with a token."""

    def __init__(self, tokenizer: Mapping[str, Any]) -> None:
        self._ids: dict[str, int] = tokenizer["model"]["vocab"]
        self.texts = {token: text for text, token in self._ids.items()}
        self._ranks = {pair: rank for rank, pair in enumerate(_pairs(tokenizer["model"]))}

    def of(self, token: int) -> set[int]:
        return {token, *(self._ids[text] for text in derivation(self.texts[token], self._ranks))}


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def _processors(tokenizer: Mapping[str, Any]) -> list[str | None]:
    processor = tokenizer.get("post_processor") or {}
    return [part.get("type") for part in processor.get("processors", [processor])]


def _renumbered(processor: Mapping[str, Any], place: Mapping[int, int]) -> dict[str, Any]:
    """A post-processor with the new ids of the special tokens that it adds."""
    if "processors" in processor:
        return {**processor, "processors": [_renumbered(part, place) for part in processor["processors"]]}
    if processor["type"] != "TemplateProcessing":
        return dict(processor)
    added = {
        name: {**token, "ids": [place[old] for old in token["ids"]]}
        for name, token in processor["special_tokens"].items()
    }
    return {**processor, "special_tokens": added}
