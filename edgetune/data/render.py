"""Rows to token ids and label masks, under the model's own chat template.

A conversation is tokenized in the pieces in which a runtime will see it: the prompt up to the generation mark as one
text, then each answer. So the ids of training are the ids of inference, whatever the tokenizer merges across a seam.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from edgetune.artifact import list_digest
from edgetune.data.formats import Row
from edgetune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template that asks for the day is told, in training and in goldens: Llama's own answer where there is no clock.
DAY = datetime(2024, 7, 26)
CLOCK = "strftime_now"  # what templates ask it with
_DIRECTIVES = [f"%{one}" for one in ("-d", "-m", "-H", "-I", *"aAbBcdDefFHIjmMpSTUwxXyYZ%")]


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

    @property
    def asks(self) -> bool:
        """Whether the last answer is learned and there is a prompt before it: a plain text asks nothing."""
        return self.start > 1 and any(self.labels[self.start :])

    @property
    def mask(self) -> str:
        """The labels as text: "1" where a token is learned, else "0"."""
        return "".join(str(int(learned)) for learned in self.labels)


def rows_digest(rows: Iterable[Rendered]) -> str:
    """Digest of token ids and label masks."""
    return list_digest([row.ids, [int(k) for k in row.labels]] for row in rows)


def render(row: Row, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Rendered:
    """Render one row: loss on answers and their end token only; a plain text is learned as a whole.

    A turn that the row mutes is shown and not learned, so that a row may end up without any label.
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
    turns = row.as_dicts
    for turn, message in enumerate(turns):
        if message["role"] != "assistant":
            continue
        prompt = _template(tokenizer, row, turns[:turn], generate=True)
        whole = _template(tokenizer, row, turns[: turn + 1], generate=False)
        if not prompt.startswith(done) or not whole.startswith(prompt):
            raise DataError(f"line {row.line}: the chat template rewrites earlier turns; give one answer a row")
        given = tokenizer(prompt[len(done) :], add_special_tokens=False)["input_ids"]
        answer = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
        learned = _through_stop(answer, stop_ids, row)
        start = len(ids) + len(given)
        end = start + learned
        ids += [*given, *answer]
        labels += [False] * len(given) + [turn not in row.muted] * learned + [False] * (len(answer) - learned)
        done = whole
    _shows_tools(tokenizer, row, done)
    target = row.messages[-1][1]
    if row.extras and row.extras[-1]:  # the template alone knows how calls are spelled
        target = str(tokenizer.decode(ids[start : end - 1]))
    return Rendered(tuple(ids[:end]), tuple(labels[:end]), start, target, row.line)


def _shows_tools(tokenizer: PreTrainedTokenizerBase, row: Row, rendered: str) -> None:
    """Refuse a template that leaves out the tools, the calls or their results: it would teach to answer without."""
    if row.tools and rendered == _template(tokenizer, replace(row, tools=()), row.as_dicts, generate=False):
        raise DataError(
            f"line {row.line}: the chat template does not show the row's tools; use a model that takes tools"
        )
    for (role, content), extra in zip(row.messages, row.extras, strict=False):
        names = [call["function"]["name"] for call in extra.get("tool_calls", ())]
        missing = [part for part in (*names, *([content] if role == "tool" else ())) if part.strip() not in rendered]
        if missing:
            raise DataError(
                f"line {row.line}: the chat template leaves out {missing[0][:40]!r} of a tool call; "
                "use a model that takes tools"
            )


def _through_stop(answer: list[int], stop_ids: Sequence[int], row: Row) -> int:
    """Number of tokens up to and with the end token, which training must show."""
    for index, token in enumerate(answer):
        if token in stop_ids:
            return index + 1
    raise DataError(f"line {row.line}: the chat template ends the answer with none of the stop tokens {list(stop_ids)}")


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, Any]], *, tools: Sequence[Any], generate: bool
) -> str:
    """Render messages with the tokenizer's own template, on the same day whenever it is done.

    Transformers hands templates no function, so that a macro stands before those that ask for the day.
    """
    template = tokenizer.get_chat_template(tools=list(tools) or None)
    if CLOCK in template:
        told = "".join(f" | replace('{one}', '{DAY.strftime(one)}')" for one in _DIRECTIVES)
        template = f"{{%- macro {CLOCK}(format) -%}}{{{{ format{told} }}}}{{%- endmacro %}}\n{template}"
    return str(
        tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=generate,
            chat_template=template,
        )
    )  # fmt: skip


def _template(tokenizer: PreTrainedTokenizerBase, row: Row, messages: list[dict[str, Any]], *, generate: bool) -> str:
    from jinja2 import TemplateError

    try:
        return apply_template(tokenizer, messages, tools=row.tools, generate=generate)
    except (TemplateError, ValueError, TypeError) as error:
        raise DataError(f"line {row.line}: the chat template refuses the row ({error})") from error
