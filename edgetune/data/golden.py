"""Golden conversations: what the tokenizer, the template and the stop set must give at every later stage.

They are written as `golden.json` into every `model`, `adapter` and `gptq` artifact, and every export is held to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from edgetune.data.formats import Row
from edgetune.data.render import apply_template, render
from edgetune.errors import ArtifactError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "golden.json"
GOLDEN_ROWS = 8  # training rows that become golden conversations

# Scripts, emoji, code, digits and whitespace: where tokenizers of two runtimes come apart first.
TEXTS = (
    "Dim the kitchen lights to 30 percent at 21:45, please.",
    "Grüße aus Zürich — naïve café, 東京の天気は? Привет! مرحبا 👩‍🔧🔥",
    "def f(x):\n    return {'a': [1, 22, 333], \"b\": x**2}  # ok\n\n\n",
    "  two spaces,\ttab, 1234567890, 3.14159, I'm, they'LL, e\u0301",
)


class Conversation(BaseModel):
    """One rendered conversation. `ids[:prompt_length]` is the prompt with the generation mark."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    messages: list[dict[str, Any]]
    text: str
    ids: list[int]
    prompt_length: int
    tools: list[dict[str, Any]] = []
    muted: list[int] = []  # turns that are shown and not learned
    trained_ids: list[int] | None = None  # as training saw it: tokenized turn by turn, through the last end token
    labels: str | None = None  # for each of these "1" where it is learned, else "0"

    @property
    def row(self) -> Row:
        """The conversation as a row, to be rendered again."""
        turns = tuple((message["role"], message["content"]) for message in self.messages)
        extras = tuple({k: v for k, v in m.items() if k not in ("role", "content")} for m in self.messages)
        return Row(turns, None, 0, tuple(self.tools), extras if any(extras) else (), frozenset(self.muted))


class PlainText(BaseModel):
    """A text and its ids, no template, no special tokens added."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    text: str
    ids: list[int]


class Golden(BaseModel):
    """The contract between training and every runtime."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    conversations: list[Conversation]
    texts: list[PlainText]
    stop_ids: list[int]  # any of them ends an answer
    bos_id: int | None
    n_bos: int  # BOS tokens at the start of a rendered conversation, as trained
    chat_template: str
    special_tokens: dict[str, str] = {}  # those that the template names, such as bos_token

    @property
    def system(self) -> str | None:
        """The system turn of the first conversation, which is that of training where it had one."""
        first = self.conversations[0].messages[0] if self.conversations else {"role": "user"}
        return str(first["content"]) if first["role"] == "system" else None

    @classmethod
    def read(cls, folder: Path) -> Golden:
        """Read the golden conversations of an artifact folder. Raises ArtifactError."""
        try:
            return cls.model_validate_json((folder / FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{folder / FILE} cannot be read: {str(error).splitlines()[0]}") from error

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(self.model_dump_json(indent=1, exclude_defaults=True) + "\n", encoding="utf-8")


def make_golden(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, str]]], stop_ids: Sequence[int]
) -> Golden:
    """Render conversations (each ends with an assistant turn) with the model's own template."""
    return _golden(tokenizer, [conversation_of(tokenizer, messages, []) for messages in conversations], stop_ids)


def trained_golden(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], stop_ids: Sequence[int]) -> Golden:
    """Render training rows, with the ids and the label mask that training gives each."""
    return _golden(tokenizer, [_trained(tokenizer, row, stop_ids) for row in rows], stop_ids)


def rendered_again(golden: Golden, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Golden:
    """Render the same conversations and texts with a tokenizer of other ids."""
    made = [
        conversation_of(tokenizer, talk.messages, talk.tools)
        if talk.trained_ids is None
        else _trained(tokenizer, talk.row, stop_ids)
        for talk in golden.conversations
    ]
    return _golden(tokenizer, made, stop_ids)


def _trained(tokenizer: PreTrainedTokenizerBase, row: Row, stop_ids: Sequence[int]) -> Conversation:
    seen = render(row, tokenizer, stop_ids)
    talk = conversation_of(tokenizer, row.as_dicts, list(row.tools))
    learned = {"muted": sorted(row.muted), "trained_ids": list(seen.ids), "labels": seen.mask}
    return talk.model_copy(update=learned)


def conversation_of(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> Conversation:
    """Render one conversation as a runtime gets it: one text."""
    text = apply_template(tokenizer, messages, tools=tools, generate=False)
    prompt = apply_template(tokenizer, messages[:-1], tools=tools, generate=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    n_prompt = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return Conversation(messages=messages, text=text, ids=ids, prompt_length=n_prompt, tools=tools)


def _golden(tokenizer: PreTrainedTokenizerBase, made: list[Conversation], stop_ids: Sequence[int]) -> Golden:
    bos = tokenizer.bos_token_id
    n_bos = 0
    if made and bos is not None:
        while made[0].ids[n_bos : n_bos + 1] == [bos]:
            n_bos += 1
    texts = [PlainText(text=t, ids=tokenizer(t, add_special_tokens=False)["input_ids"]) for t in TEXTS]
    template = str(tokenizer.chat_template or "")
    named = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if name in template}
    return Golden(
        conversations=made, texts=texts, stop_ids=sorted(stop_ids), bos_id=bos, n_bos=n_bos, chat_template=template,
        special_tokens=named,
    )  # fmt: skip
