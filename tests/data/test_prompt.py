"""A chat template without Transformers: what is rendered is what Transformers renders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from edgetune.data.golden import make_golden
from edgetune.data.prompt import render_chat
from edgetune.errors import UsageError
from tests.conftest import tiny_tokenizer

TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "is 3 < 4 & \"ü\" > 'u'?", "name": None},
    {"role": "assistant", "content": "<yes>"},
]
TEMPLATE = """{%- if tools is none and documents is none %}alone
{% endif %}
{% set last = 'outside' %}
{% for m in messages %}
{{ m | tojson }}{{ m | tojson(indent=2, sort_keys=true) }}
    {% if m.role == 'assistant' %}
    {% generation %}
{% set last = m.content %}
{{ last + eos_token }}
    {%- endgeneration %}

    {% endif %}
{% endfor %}
{{ last }}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("ask", [True, False])
def test_it_is_what_transformers_renders(tokenizer: Any, ask: bool) -> None:
    tokenizer.chat_template = TEMPLATE
    theirs = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=ask)
    assert render_chat(make_golden(tokenizer, [TALK], [2]), TALK, add_generation_prompt=ask) == theirs
    assert theirs.startswith("alone")
    assert "<yes><|im_end|>" in theirs


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('') }}", "TemplateError$"),
        ("{{ nothing | tojson }}", "Undefined is not JSON serializable$"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_what_a_template_cannot_render_is_one_line(tokenizer: Any, template: str, says: str) -> None:
    golden = make_golden(tokenizer, [TALK], [2]).model_copy(update={"chat_template": template})
    with pytest.raises(UsageError, match=f"the chat template cannot render this: .*{says}"):
        render_chat(golden, TALK)
