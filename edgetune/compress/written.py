"""Rows that a model writes itself, to calibrate it where no data is at hand.

A model with a chat template is shown the opening of a user's turn, writes the question and then answers it (Magpie,
arXiv:2406.08464). One without goes on from its first token (LLM-QAT, arXiv:2305.17888, section 2.1). Each token is
drawn by a number of its own that follows from the seed, the row and the place: the same model writes the same rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from edgetune.artifact import Artifact, write_text
from edgetune.compress.layerwise import load_model
from edgetune.compress.on_policy import sample
from edgetune.data.golden import Golden
from edgetune.data.prompt import render_chat
from edgetune.devices import has_fast_bfloat16
from edgetune.errors import DataError
from edgetune.progress import Report, silent

TOGETHER = 64  # rows that are written together
DRY = 4  # times so many rows that none of them is kept, until writing is given up
QUESTION = "edgetune asks here"  # stands in a rendered turn where the question will


def write(
    model: Artifact,
    out: Path,
    *,
    n_tokens: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
    progress: Report = silent,
) -> int:
    """Write rows of `n_tokens` tokens in all, as JSONL; gives how many. `out` appears whole.

    A row is `messages` or `text`. A question or an answer that does not end within `max_new_tokens`, an empty one and a
    copy are left out; a plain text may be cut there. Raises DataError where a model writes nothing of use, UsageError
    where its template cannot be rendered.
    """
    network: Any = load_model(model)
    network = network.to(device, torch.bfloat16 if has_fast_bfloat16(device) else torch.float32)
    writer = _Writer(network, model, max_new_tokens, temperature, seed)
    rows, done, dry = dict[str, None](), 0, 0
    while done < n_tokens:
        found = writer.some()
        fresh = {line: n for line, n in found if line not in rows}
        rows |= dict.fromkeys(fresh)
        done += sum(fresh.values())
        dry = 0 if fresh else dry + 1
        if dry == DRY:
            raise DataError(
                f"{model.path}: of the last {DRY * TOGETHER} rows none ended within {max_new_tokens} tokens and was "
                "new; raise --max-new-tokens or --temperature"
            )
        progress(min(done, n_tokens), n_tokens, "tokens")
    write_text(out, "".join(f"{line}\n" for line in rows))
    return len(rows)


class _Writer:
    """Writes a few rows at a time, each with numbers of its own."""

    def __init__(self, network: Any, model: Artifact, max_new_tokens: int, temperature: float, seed: int) -> None:
        self._network, self._temperature, self._seed = network, temperature, seed
        self._golden = Golden.read(model.path)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model.path, local_files_only=True)
        self._stop = frozenset(self._golden.stop_ids)
        self._most = max_new_tokens
        self._n = 0

    def some(self) -> list[tuple[str, int]]:
        """Give the next rows that are of use: a line of JSON, and its tokens."""
        numbers = np.stack([self._numbers(self._n + i) for i in range(TOGETHER)])
        self._n += TOGETHER
        return self._talks(numbers) if self._golden.chat_template else self._texts(numbers)

    def _numbers(self, row: int) -> np.ndarray[Any, Any]:
        """Numbers in [0, 1) for a question and its answer, [2, M]."""
        return np.random.default_rng([self._seed, row]).random((2, self._most))

    def _texts(self, numbers: np.ndarray[Any, Any]) -> list[tuple[str, int]]:
        first = self._tokenizer.bos_token_id
        start = [first if first is not None else min(self._stop)]
        written = self._ended(self._go_on([start] * TOGETHER, numbers[:, 0]), cut=True)
        return [(json.dumps({"text": text}, ensure_ascii=False), n) for text, n in written if text]

    def _talks(self, numbers: np.ndarray[Any, Any]) -> list[tuple[str, int]]:
        system = self._golden.system
        before = [{"role": "system", "content": system}] if system else []
        opening = render_chat(self._golden, [*before, {"role": "user", "content": QUESTION}])
        if QUESTION not in opening:
            raise DataError("the chat template does not show a user's turn as it is written; give rows of your own")
        asked = self._ended(self._go_on([self._ids(opening.split(QUESTION)[0])] * TOGETHER, numbers[:, 0]))
        asking = [i for i, (text, _) in enumerate(asked) if text]
        if not asking:
            return []
        turns: list[list[dict[str, str]]] = [[*before, {"role": "user", "content": asked[i][0]}] for i in asking]
        prompts = [self._ids(render_chat(self._golden, messages)) for messages in turns]
        answers = self._ended(self._go_on(prompts, numbers[asking, 1]))
        return [
            (
                json.dumps({"messages": [*turn, {"role": "assistant", "content": text}]}, ensure_ascii=False),
                len(prompt) + n,
            )
            for turn, prompt, (text, n) in zip(turns, prompts, answers, strict=True)
            if text
        ]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _go_on(self, prompts: Sequence[Sequence[int]], numbers: np.ndarray[Any, Any]) -> list[list[int]]:
        return sample(self._network, prompts, numbers, self._temperature, sorted(self._stop))

    def _ended(self, written: Sequence[Sequence[int]], *, cut: bool = False) -> list[tuple[str, int]]:
        """Give text and number of tokens of what ended; nothing, and 0, for what did not and may not be `cut`."""
        found = []
        for ids in written:
            ended = ids[-1] in self._stop
            text = self._tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True).strip()
            found.append((text, len(ids)) if text and (ended or cut) else ("", 0))
        return found
