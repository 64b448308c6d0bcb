"""Rendering: loss on answers and their end token only, and ids that are those of inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgetune.data.formats import Row
from edgetune.data.render import Rendered, render
from edgetune.errors import DataError
from tests.conftest import CHAT_TEMPLATE, tiny_tokenizer

STOP = [2]
ONE = Row((("user", "set the light to 30"), ("assistant", '{"level":30}')), None, 1)
WITH_SYSTEM = Row((("system", "JSON."), *ONE.messages), None, 2)
TALK = Row((*WITH_SYSTEM.messages, ("user", "what is 7 × 6?"), ("assistant", "42 — naturally")), None, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(made)
    return made


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    """Loaded anew for each test, which may change its template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def learned(found: Rendered, tokenizer: Any) -> str:
    return str(tokenizer.decode([i for i, on in zip(found.ids, found.labels, strict=True) if on]))


@pytest.mark.parametrize("row", [ONE, WITH_SYSTEM], ids=["user", "system"])
def test_loss_is_on_the_answer_and_its_end_token(tokenizer: Any, row: Row) -> None:
    found = render(row, tokenizer, STOP)
    assert learned(found, tokenizer) == '{"level":30}<|im_end|>'
    assert found.labels == (False,) * found.start + (True,) * (len(found.ids) - found.start)
    assert found.ids[-1] == 2  # what the template writes behind the end token is left out
    assert (found.n_labels, found.target_text, found.line) == (len(found.ids) - found.start, '{"level":30}', row.line)


@pytest.mark.parametrize("row", [ONE, WITH_SYSTEM, TALK], ids=["user", "system", "talk"])
def test_the_prompt_has_the_ids_that_inference_gives_it(tokenizer: Any, row: Row) -> None:
    found = render(row, tokenizer, STOP)
    if row is not TALK:
        text = tokenizer.apply_chat_template(row.as_dicts[:-1], tokenize=False, add_generation_prompt=True)
        assert list(found.ids[: found.start]) == tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.apply_chat_template(row.as_dicts, tokenize=False)
    assert tokenizer.decode(found.ids) == whole.removesuffix("\n")


def test_a_talk_learns_every_answer(tokenizer: Any) -> None:
    found = render(TALK, tokenizer, STOP)
    assert learned(found, tokenizer) == '{"level":30}<|im_end|>42 — naturally<|im_end|>'
    assert tokenizer.decode(found.ids[found.start :]) == "42 — naturally<|im_end|>"
    assert found.target_text == "42 — naturally"
    first = render(WITH_SYSTEM, tokenizer, STOP)
    assert found.ids[: len(first.ids)] == first.ids
    assert found.labels[: len(first.ids)] == first.labels


def test_an_answer_that_would_merge_with_its_prompt_is_kept_apart(tokenizer: Any) -> None:
    """The template ends its prompt with a letter that would melt into the answer's first word."""
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + ' t' }}{% else %}{{ m.content + '<|im_end|>' }}"
        "{% endif %}{% endfor %}"
    )
    found = render(Row((("user", "turn"), ("assistant", "he light")), None, 1), tokenizer, STOP)
    assert list(found.ids[: found.start]) == tokenizer("turn t", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found.ids) == "turn the light<|im_end|>"
    melted = tokenizer("turn the light<|im_end|>", add_special_tokens=False)["input_ids"]
    assert list(found.ids) != melted  # else this test shows nothing


def test_the_end_token_may_be_any_of_the_stop_set(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    assert render(ONE, tokenizer, [0, 2]).ids[-1] == 0
    with pytest.raises(DataError, match=r"^line 1: the chat template ends the answer with none of the stop"):
        render(ONE, tokenizer, [2])


def test_no_chat_template_is_refused_for_conversations_only(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template, and the rows are conversations; use a chat model or text"):
        render(ONE, tokenizer, STOP)
    assert render(Row((), "turn the light", 1), tokenizer, STOP).n_labels > 0


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages|length }}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match="line 3: the chat template rewrites earlier turns; give one answer a row"):
        render(TALK, tokenizer, STOP)


def test_a_template_that_refuses_the_row_says_why(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE
    )
    render(ONE, tokenizer, STOP)
    with pytest.raises(DataError, match=r"^line 2: the chat template refuses the row \(no system turn\)$"):
        render(WITH_SYSTEM, tokenizer, STOP)


def test_plain_text_is_learned_as_a_whole(tokenizer: Any) -> None:
    found = render(Row((), "turn the light", 4), tokenizer, STOP)
    assert tokenizer.decode(found.ids) == "turn the light<|im_end|>"
    assert found.labels == (False, *[True] * (len(found.ids) - 1))
    assert (found.start, found.target_text, found.line) == (1, "turn the light", 4)


def test_special_tokens_written_by_a_user_are_not_hidden(tokenizer: Any) -> None:
    """A row that holds an end token in its answer is learned up to there, as inference would stop there."""
    found = render(Row((("user", "a"), ("assistant", "b<|im_end|>c")), None, 1), tokenizer, STOP)
    assert learned(found, tokenizer) == "b<|im_end|>"
    assert found.ids[-1] == 2


def test_a_talk_that_begins_with_an_answer(tokenizer: Any) -> None:
    row = Row((("assistant", "hello"), *ONE.messages), None, 1)
    try:
        assert learned(render(row, tokenizer, STOP), tokenizer).endswith('{"level":30}<|im_end|>')
    except DataError as error:
        assert str(error).startswith("line 1: ")  # noqa: PT017


def test_plain_text_without_an_end_token_of_the_tokenizer(tokenizer: Any) -> None:
    tokenizer.eos_token = None
    assert render(Row((), "turn the light", 1), tokenizer, STOP).ids[-1] == 2
