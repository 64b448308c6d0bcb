"""The rendering contract: every folder that carries a tokenizer must render golden conversations as training did.

Exports are held to it by their own runtime's tokenizer, in `edgetune.export.contract`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgetune.data.golden import Conversation, Golden, conversation_of
from edgetune.data.render import render
from edgetune.errors import ContractError, DataError

GENERATION = "generation_config.json"


def hold(folder: Path) -> None:
    """Hold the tokenizer, template and stop set of a `model` or `gptq` folder to its golden conversations.

    Raises ContractError naming what differs and both values.
    """
    from transformers import AutoTokenizer

    golden = Golden.read(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found: dict[str, tuple[Any, Any]] = {
        "chat template": (golden.chat_template, str(tokenizer.chat_template or "")),
        "BOS": (golden.bos_id, tokenizer.bos_token_id),
        "stop set": (golden.stop_ids, declared_stop_ids(folder) or golden.stop_ids),
    }
    if tokenizer.eos_token_id not in (None, *golden.stop_ids):
        found["end token"] = (golden.stop_ids, tokenizer.eos_token_id)
    for name, (trained, here) in found.items():
        if trained != here:
            raise ContractError(
                f"{folder}: {name} differs from training's: {str(trained)[:60]!r}, here {str(here)[:60]!r}"
            )
    for index, conversation in enumerate(golden.conversations):
        _same(folder, index, conversation, tokenizer, golden)
    for index, text in enumerate(golden.texts):
        if tokenizer(text.text, add_special_tokens=False)["input_ids"] != text.ids:
            raise ContractError(
                f"{folder}: token ids of golden text {index} ({text.text[:40]!r}) differ from training's"
            )


def _same(folder: Path, index: int, trained: Conversation, tokenizer: Any, golden: Golden) -> None:
    try:
        here = conversation_of(tokenizer, trained.messages, trained.tools)
        row = render(trained.row, tokenizer, golden.stop_ids) if trained.trained_ids is not None else None
    except DataError as error:
        raise ContractError(f"{folder}: golden conversation {index} cannot be rendered ({error})") from error
    if (here.text, here.ids, here.prompt_length) != (trained.text, trained.ids, trained.prompt_length):
        raise ContractError(f"{folder}: golden conversation {index} is rendered otherwise than in training")
    if row is not None and (list(row.ids), row.mask) != (trained.trained_ids, trained.labels):
        raise ContractError(f"{folder}: golden conversation {index} has other ids or labels than in training")


def declared_stop_ids(folder: Path) -> list[int]:
    """The stop set that a model's folder declares; empty where it declares none."""
    path = folder / GENERATION
    declared = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    if declared is None:
        return []
    return sorted(declared) if isinstance(declared, list) else [declared]
