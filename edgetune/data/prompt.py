"""A golden's chat template applied without Transformers, for engines that bring none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgetune.data.golden import Golden
from edgetune.errors import UsageError


def render_chat(golden: Golden, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """Render messages as Transformers does, in a sandbox. Raises UsageError where no template is there, or it fails."""
    if not golden.chat_template:
        raise UsageError("the model has no chat template")
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        template = environment.from_string(golden.chat_template)
        return template.render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **golden.special_tokens
        )
    except TemplateError as error:
        raise UsageError(f"the chat template cannot render this: {str(error).splitlines()[0]}") from error


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
