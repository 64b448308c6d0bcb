"""An Ollama `Modelfile` beside a GGUF file: its chat template in Go, its stop texts, its system turn.

Ollama does not read Jinja. What the template puts around each turn is found by rendering turns with it, and held to the
golden conversations: where turns do not stand one after the other, each by itself, no Modelfile is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from edgetune.data.golden import Golden
from edgetune.data.prompt import render_chat
from edgetune.data.render import CLOCK
from edgetune.errors import UnsupportedError, UsageError

FILE = "Modelfile"
_SAID = {role: f"\u2983{role}\u2984" for role in ("system", "user", "assistant")}  # stand for what is said
Around = tuple[str, str]


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around the turns, and where there are none."""

    around: dict[str, Around]  # role -> before and after its content; the system's holds what starts a conversation
    start: str  # of a conversation that has no system turn
    answer: str  # what asks for an answer

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """Write a conversation as Ollama will."""
        text = "" if messages and messages[0]["role"] == "system" else self.start
        for message in messages:
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.answer


def modelfile(golden: Golden, file: str, stop_texts: Sequence[str]) -> str:
    """Give the Modelfile of a GGUF file's name. Raises UnsupportedError where the template is none that Go can say."""
    turns = find_turns(golden)
    lines = [f"FROM ./{file}", f"TEMPLATE {_quoted(go_template(turns))}"]
    if (system := _system(golden)) is not None:
        lines.append(f"SYSTEM {_quoted(system)}")
    if any('"' in text or "\n" in text for text in stop_texts):
        raise UnsupportedError("a stop text with a quotation mark or a line's end has no place in an Ollama Modelfile")
    lines += [f'PARAMETER stop "{text}"' for text in stop_texts]
    return "\n".join(lines) + "\n"


def find_turns(golden: Golden) -> Turns:
    """Take a chat template apart. Raises UnsupportedError where turns are more than what stands around them."""
    if CLOCK in golden.chat_template:
        raise UnsupportedError(f"the template asks for the day ({CLOCK}), which Ollama does not tell a Modelfile")

    def text(*roles: str, ask: bool = False) -> str:
        messages = [{"role": role, "content": _SAID[role]} for role in roles]
        return render_chat(golden, messages, add_generation_prompt=ask)

    try:
        alone, talk = text("user"), text("user", "assistant")
        user = _end(text("user", "assistant", "user"), talk)
        start = _cut(alone, user)
        around = {"user": _around(user, "user"), "assistant": _around(_end(talk, alone), "assistant")}
        answer = _end(text("user", ask=True), alone)
    except UsageError as error:
        raise UnsupportedError(str(error)) from error
    with suppress(UsageError, UnsupportedError):  # a template may have no system turn
        around["system"] = _around(_cut(text("system", "user"), user), "system")
    turns = Turns(around, start, answer)
    for conversation in golden.conversations:
        messages = conversation.messages[:-1]
        if conversation.tools or any(set(message) != {"role", "content"} for message in messages):
            raise UnsupportedError("a Modelfile carries no tools, and training had some")
        if not {message["role"] for message in messages} <= around.keys() or turns.render(messages) != render_chat(
            golden, messages
        ):
            raise UnsupportedError("the template's turns depend on each other")
    return turns


def go_template(turns: Turns) -> str:
    """Say the turns in Go's text/template, over Ollama's `.Messages`."""
    first, *others = [
        f'if eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}'
        for role, (before, after) in turns.around.items()
    ]
    each = "{{ range .Messages }}{{ " + "{{ else ".join([first, *others]) + "{{ end }}{{ end }}"
    start = _go(turns.start)
    if start and "system" in turns.around:
        start = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{start}{{{{ end }}}}'
    return start + each + _go(turns.answer)


def _go(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quoted(text: str) -> str:
    if '"""' in text:
        raise UnsupportedError("three quotation marks have no place in an Ollama Modelfile")
    return f'"""{text}"""'


def _system(golden: Golden) -> str | None:
    """Give the system turn that all golden conversations have in common."""
    first = {c.messages[0]["content"] if c.messages[0]["role"] == "system" else None for c in golden.conversations}
    return first.pop() if len(first) == 1 else None


def _end(text: str, start: str) -> str:
    if not text.startswith(start):
        raise UnsupportedError("in the template a turn changes those before it")
    return text.removeprefix(start)


def _cut(text: str, end: str) -> str:
    if not text.endswith(end):
        raise UnsupportedError("in the template a first turn is not like a later one")
    return text.removesuffix(end)


def _around(turn: str, role: str) -> Around:
    before, found, after = turn.partition(_SAID[role])
    if not found or _SAID[role] in after:
        raise UnsupportedError(f"the template does not say the {role}'s turn once")
    return before, after
