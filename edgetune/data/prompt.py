"""A golden's chat template applied without Transformers, for engines that bring none."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgetune.data.golden import Golden
from edgetune.errors import UsageError


def render_chat(golden: Golden, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """Render messages as Transformers does, in a sandbox. Raises UsageError where no template is there, or it fails."""
    if not golden.chat_template:
        raise UsageError("the model has no chat template")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        template = environment.from_string(golden.chat_template)
        return template.render(
            messages=[{k: v for k, v in message.items() if v is not None} for message in messages], tools=None,
            documents=None, add_generation_prompt=add_generation_prompt, **golden.special_tokens,
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"the chat template cannot render this: {reason}") from error


class Generation(Extension):
    """`{% generation %}`: what stands in it is written as it is, since only masks of Transformers ask for it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        """Read the block as a call, in a scope of its own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:  # fmt: skip
    """Write JSON as it is, where Jinja's own filter escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
