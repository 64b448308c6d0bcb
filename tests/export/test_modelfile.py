"""Ollama's Modelfile: the chat template in Go says what Jinja says, and the stop set is training's."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edgetune.data.golden import Conversation, Golden
from edgetune.data.prompt import render_chat
from edgetune.errors import UnsupportedError, UsageError
from edgetune.export.modelfile import find_turns, go_template, modelfile

TALK = [
    {"role": "system", "content": "Answer in JSON."},
    {"role": "user", "content": 'say "{{ no }}"'},
    {"role": "assistant", "content": '{"say": {"no": 1}}'},
    {"role": "user", "content": "again\nplease"},
]
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '[end]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{% for m in messages %}{{ '<' + m['role'] + '>{{' + m['content'] + '}}' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>{{' }}{% endif %}"
)
NESTED = (  # the system turn stands inside of the first user's
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.index0 == 1 %}{{ messages[0].content }}\n\n"
    "{% endif %}{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
GO = """package main

import ("encoding/json"; "os"; "text/template")

type Message struct { Role, Content string }
type Job struct { Template string; Messages []*Message }

func main() {
	var job Job
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil { panic(err) }
	parsed := template.Must(template.New("").Parse(job.Template))
	if err := parsed.Execute(os.Stdout, map[string]any{"Messages": job.Messages}); err != nil { panic(err) }
}
"""


def golden(template: str, talk: list[dict[str, Any]] = TALK) -> Golden:
    last = {"role": "assistant", "content": "fine"}
    said = Conversation(messages=[*talk, last], text="", ids=[], prompt_length=0)
    return Golden(
        conversations=[said], texts=[], stop_ids=[2], bos_id=1, n_bos=1, chat_template=template,
        special_tokens={"bos_token": "<s>"},
    )  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, HEADERS])
@pytest.mark.parametrize("talk", [TALK, TALK[1:2], TALK[:2]])
def test_turns_say_what_the_template_says(template: str, talk: list[dict[str, Any]]) -> None:
    found = golden(template)
    assert find_turns(found).render(talk) == render_chat(found, talk)


@pytest.mark.skipif(shutil.which("go") is None, reason="needs go")
@pytest.mark.parametrize(
    ("template", "talk"), [(CHATML, TALK), (CHATML, TALK[1:]), (HEADERS, TALK), (NO_SYSTEM, TALK[1:])]
)
def test_go_says_what_jinja_says(tmp_path: Path, template: str, talk: list[dict[str, Any]]) -> None:
    found = golden(template, talk)
    (tmp_path / "say.go").write_text(GO)
    job = json.dumps({"Template": go_template(find_turns(found)), "Messages": talk})
    said = subprocess.run(["go", "run", "say.go"], input=job, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert said.stdout == render_chat(found, talk)


def test_the_file_carries_stops_and_the_system_turn() -> None:
    text = modelfile(golden(CHATML), "model.gguf", ["<|im_end|>", "</s>"])
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ if ne (index .Messages 0).Role "system" }}<|im_start|>')
    assert 'SYSTEM """Answer in JSON."""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n' in text


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (NESTED, "turns depend on each other"),
        ("", "no chat template"),
        ("{{ messages | length }}", "a turn changes those before it"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not say the user's turn once"),
        ("{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}", "a turn changes those before it"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for", "cannot render"),
        ("{{ strftime_now('%d %b %Y') }}" + CHATML, "asks for the day .strftime_now., which Ollama does not tell"),
    ],
)
def test_what_go_cannot_say_is_refused(template: str, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        modelfile(golden(template), "model.gguf", [])


def test_a_template_cannot_reach_out() -> None:
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UsageError, match="cannot render"):
        render_chat(golden(hostile), TALK)
