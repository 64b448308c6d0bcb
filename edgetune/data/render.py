"""Rows to token ids and label masks, under the model's own chat template.

A conversation is tokenized in the pieces in which a runtime will see it: the prompt up to the generation mark as one
text, then each answer. So the ids of training are the ids of inference, whatever the tokenizer merges across a seam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetune.artifact import json_digest
from edgetune.data.formats import Row
from edgetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rendered:
    """Token ids, and for each whether it is learned. `start` is where the last answer begins."""

    ids: tuple[int, ...]
    labels: tuple[bool, ...]
    start: int
    target_text: str
    line: int

    @property
    def n_labels(self) -> int:
        return sum(self.labels)


def rows_digest(rows: Sequence[Rendered]) -> str:
    """Digest of token ids and label masks."""
    return json_digest([[list(row.ids), [int(k) for k in row.labels]] for row in rows])


def render(row: Row, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Rendered:
    """Render one row: loss on answers and their end token only; a plain text is learned as a whole.

    Raises DataError where the model has no chat template, or the template cannot carry the row.
    """
    if row.text is not None:
        whole_text = (*tokenizer(row.text, add_special_tokens=False)["input_ids"], stop_ids[0])
        if len(whole_text) < 2:
            raise DataError(f"line {row.line}: the text gives no token")
        return Rendered(whole_text, (False, *[True] * (len(whole_text) - 1)), 1, row.text, row.line)
    if not tokenizer.chat_template:
        raise DataError("the model has no chat template, and the rows are conversations; use a chat model or text rows")
    ids: list[int] = []
    labels: list[bool] = []
    done, start = "", 0
    for turn, message in enumerate(row.as_dicts):
        if message["role"] != "assistant":
            continue
        prompt = _template(tokenizer, row, row.as_dicts[:turn], generate=True)
        whole = _template(tokenizer, row, row.as_dicts[: turn + 1], generate=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise DataError(f"line {row.line}: the chat template rewrites earlier turns; give one answer a row")
        given = tokenizer(prompt[len(done) :], add_special_tokens=False)["input_ids"]
        answer = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        learned = _through_stop(answer, stop_ids, row)
        start = len(ids) + len(given)
        ids += [*given, *answer]
        labels += [False] * len(given) + [True] * learned + [False] * (len(answer) - learned)
        done = whole
    end = start + sum(labels[start:])
    return Rendered(tuple(ids[:end]), tuple(labels[:end]), start, row.messages[-1][1], row.line)


def _through_stop(answer: list[int], stop_ids: Sequence[int], row: Row) -> int:
    """Number of tokens up to and with the end token, which training must show."""
    for index, token in enumerate(answer):
        if token in stop_ids:
            return index + 1
    raise DataError(f"line {row.line}: the chat template ends the answer with none of the stop tokens {list(stop_ids)}")


def _template(tokenizer: PreTrainedTokenizerBase, row: Row, messages: list[dict[str, str]], *, generate: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    except (TemplateError, ValueError) as error:
        raise DataError(f"line {row.line}: the chat template refuses the row ({error})") from error
