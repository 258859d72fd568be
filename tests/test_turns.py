"""Chat templates taken apart: what Ollama's TEMPLATE writes is what the training wrote, or none is written."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtgdm.domain import Message
from mtgdm.export.turns import NotOfTurns, Render, Turns, turns_of
from mtgdm.student.noise import quiet
from mtgdm.student.template import CHATML
from tests import go_template
from tests.tiny_student import LLAMA3, MARKED, THINKING

BOS = "<|begin_of_text|>"

WITH_A_SYSTEM_TEXT_OF_ITS_OWN = (
    "{%- if messages[0]['role'] == 'system' %}"
    "{{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}"
    "{%- else %}{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if not (m.role == 'system' and loop.first) %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""As Qwen2.5's own does: a chat without a system text gets one."""
SYSTEM_IN_THE_FIRST_QUESTION = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set ms = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}{% if m.role == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)
"""As those of Gemma 3 and of Mistral's first models do."""
SYSTEM_IN_THE_LAST_QUESTION = SYSTEM_IN_THE_FIRST_QUESTION.replace("loop.first", "loop.last")
"""As that of Mistral Nemo does."""
NO_LINE_ENDS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
"""As that of Phi-4-mini does: what stands behind a last turn stands behind no other."""
ANSWERS_WITHOUT_LEADING_LINES = CHATML.replace(
    "message['content']",
    "(message['content'].lstrip('\n') if message['role'] == 'assistant' else message['content'])",
)

TEMPLATES = {
    "chatml": CHATML,
    "llama-3": LLAMA3,
    "thinking": THINKING,
    "with generation marks": MARKED,
    "with a system text of its own": WITH_A_SYSTEM_TEXT_OF_ITS_OWN,
    "system in the first question": SYSTEM_IN_THE_FIRST_QUESTION,
    "system in the last question": SYSTEM_IN_THE_LAST_QUESTION,
    "without line ends": NO_LINE_ENDS,
    "answers without leading lines": ANSWERS_WITHOUT_LEADING_LINES,
}
CHATS: list[list[Message]] = [
    [{"role": role, "content": text} for role, text in chat]
    for chat in (
        [("user", "西湖在哪里？")],
        [("system", "你是讲解员。"), ("user", "资料：\n名称：西湖\n")],
        [("user", "a"), ("assistant", '{"b": {{ 1 }}}'), ("user", "c <|x|> {% d %}")],
        [
            ("system", "s"),
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
            ("user", "e"),
        ],
    )
]


def renderer(template: str) -> Render:
    """The template as transformers renders it in the training."""
    with quiet():
        from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: Sequence[Message], ask: bool) -> str:
        texts: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            add_generation_prompt=ask,
            enable_thinking=False,
        )[0]
        return str(texts[0])

    return render


def found(template: str) -> Turns:
    return turns_of(renderer(template), bos=BOS)


def chats_for(turns: Turns) -> list[list[Message]]:
    """Go's templates cannot trim: to one that does so texts come trimmed."""
    if not turns.trims:
        return CHATS
    return [[{**one, "content": one["content"].strip()} for one in chat] for chat in CHATS]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_writes_what_the_training_wrote(name: str) -> None:
    turns = found(TEMPLATES[name])
    for chat in chats_for(turns):
        assert go_template.render(turns.go(start=True), chat) == renderer(TEMPLATES[name])(chat, True)


@pytest.mark.skipif(shutil.which("go") is None, reason="there is no Go here")
def test_go_itself_agrees(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(
        """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }
type Case struct {
	Template string
	Messages []*Message
}

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil {
		panic(err)
	}
	var texts []string
	for _, one := range cases {
		var text strings.Builder
		parsed := template.Must(template.New("").Option("missingkey=zero").Parse(one.Template))
		if err := parsed.Execute(&text, map[string]any{"System": "", "Messages": one.Messages}); err != nil {
			panic(err)
		}
		texts = append(texts, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
""",
        encoding="utf-8",
    )
    cases, expected = [], []
    for template in TEMPLATES.values():
        turns = found(template)
        for chat in chats_for(turns):
            cases.append({"Template": turns.go(start=True), "Messages": [*go_template.fields(chat)]})
            expected.append(renderer(template)(chat, True))
    ran = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(cases).encode(),
        capture_output=True,
        check=True,
    )
    assert json.loads(ran.stdout) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_jinja_made_of_the_turns_writes_the_same(name: str) -> None:
    turns = found(TEMPLATES[name])
    for chat in CHATS:
        assert renderer(turns.jinja())(chat, True) == renderer(TEMPLATES[name])(chat, True)


def test_a_thinking_template_asks_as_in_the_training() -> None:
    assert found(THINKING).ask == "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_the_bos_token_is_left_to_a_server_that_adds_it() -> None:
    turns = found(LLAMA3)
    assert turns.start == BOS
    assert turns.trims
    assert BOS not in turns.go(start=False)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (
            SYSTEM_IN_THE_FIRST_QUESTION.replace("s + m", "m.content[:3] + s + m").replace(
                "(s ", "(m.content[:3] + s "
            ),
            "repeats|changes the texts",
        ),
        ("{{ raise_exception('no') }}" + CHATML, "refuses a chat"),
        (CHATML.replace("<|im_end|>", "{{"), "braces"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "leaves out, repeats or moves"),
        (
            CHATML.replace("message['content']", "message['content'] | replace('\n\n', '\n')"),
            "changes the texts of the role",
        ),
    ],
)
def test_a_template_that_does_more_is_refused(template: str, why: str) -> None:
    with pytest.raises(NotOfTurns, match=why):
        turns_of(renderer(template))


def test_a_prompt_that_would_be_written_otherwise_is_found() -> None:
    odd = CHATML.replace("message['content']", "message['content'] | replace('西湖', '東湖')")
    with pytest.raises(NotOfTurns):
        turns_of(renderer(odd), prompts=CHATS)
