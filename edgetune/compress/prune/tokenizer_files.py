"""The files of a tokenizer whose vocabulary is cut, and of what names its tokens by id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune.artifact import write_text
from edgetune.compress.prune.vocabulary import check_tokenizer, cut_tokenizer
from edgetune.data.contract import GENERATION
from edgetune.data.golden import Golden, rendered_again
from edgetune.errors import SourceError, UnsupportedError
from edgetune.gguf_header import read_header

if TYPE_CHECKING:
    from edgetune.sources import Source

TOKENIZER, SETTINGS, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
AS_THEY_ARE = ("special_tokens_map.json", "chat_template.jinja")  # name tokens by text
LISTS = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
    "sequence_bias",
)  # fmt: skip


def check_source(source: Source) -> None:
    """Refuse a base whose tokenizer cannot be cut, before it is read. Raises UnsupportedError, SourceError."""
    if source.form == "folder":
        check_folder(source.path)
    elif (kind := read_header(source.path).metadata.get("tokenizer.ggml.model")) != "gpt2":
        raise UnsupportedError(
            f"prune.vocabulary: the tokenizer of {source.path} is {kind!r}, not byte-level BPE; leave vocabulary out"
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """Refuse a folder whose tokenizer cannot be cut; give its tokenizer.json. Raises UnsupportedError, SourceError."""
    tokenizer = _json(folder / TOKENIZER)
    if tokenizer is None:
        raise SourceError(f"prune.vocabulary: {folder} has no {TOKENIZER}, which says how it merges")
    check_tokenizer(tokenizer, folder)
    given = [key for key in LISTS if (_json(folder / GENERATION) or {}).get(key)]
    if given:
        raise UnsupportedError(
            f"prune.vocabulary: {folder / GENERATION} names tokens in {given[0]}, which would not be renumbered; "
            "remove it there"
        )
    return tokenizer


def named_ids(folder: Path) -> set[int]:
    """Give the ids that config.json and generation_config.json name: bos, eos, pad and the like."""
    named = set()
    for name in ("config.json", GENERATION):
        for key, value in (_json(folder / name) or {}).items():
            if key.endswith("_token_id") and value is not None:
                named |= set(value) if isinstance(value, list) else {value}
    return named


def renumbered(config: Mapping[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """Give a config with the new ids of the tokens that it names; one that no token has becomes None."""
    place = {old: new for new, old in enumerate(kept)}
    made = dict(config)
    for key, value in config.items():
        if key.endswith("_token_id"):
            new = [place[old] for old in value if old in place] if isinstance(value, list) else place.get(value)
            made[key] = new
    return made


def write(source: Path, out: Path, kept: Sequence[int]) -> None:
    """Write the tokenizer of the tokens that stay, with template, generation config and golden conversations.

    `kept` are ids of the tokenizer in `source`, ascending. `out` may have a config.json already, which stays.
    """
    from transformers import AutoTokenizer

    from edgetune.sources import copy_beside

    tokenizer = _json(source / TOKENIZER)
    assert tokenizer is not None, "checked before"
    _write(out / TOKENIZER, cut_tokenizer(tokenizer, kept))
    place = {old: new for new, old in enumerate(kept)}
    if (settings := _json(source / SETTINGS)) is not None:
        if decoder := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {str(place[int(old)]): token for old, token in decoder.items()}
        _write(out / SETTINGS, settings)
    if (added := _json(source / ADDED)) is not None:
        _write(out / ADDED, {text: place[old] for text, old in added.items()})
    if (generation := _json(source / GENERATION)) is not None:
        _write(out / GENERATION, renumbered(generation, kept))
    for name in AS_THEY_ARE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    copy_beside(source, out)
    golden = Golden.read(source)
    tokenizer_here = AutoTokenizer.from_pretrained(out, local_files_only=True)
    rendered_again(golden, tokenizer_here, [place[old] for old in golden.stop_ids]).write(out)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_bytes())
    return found


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
