"""The templates of today's families: an answer is trained after the very tokens that a server asks it with."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from datetime import datetime
from typing import Any

import pytest

from mtgdm.domain import Message
from mtgdm.errors import UserError
from mtgdm.evaluation import rendering
from mtgdm.export.modelfile import Modelfile
from mtgdm.export.turns import NotOfTurns, turns_of
from mtgdm.student.chat import IGNORED, Chat, ChatProblem
from mtgdm.student.noise import quiet
from mtgdm.student.template import student_template
from tests.ollama_server import MadeModel
from tests.templates import (
    CONTROL_TOKENS,
    GEMMA2,
    LLAMA32,
    QWEN3,
    QWEN3_THINKING,
    R1_DISTILL,
    SMOLLM3,
    TEMPLATES,
)

SYSTEM = {"role": "system", "content": "你是讲解员。"}
QUESTION = {"role": "user", "content": "介绍西湖。"}
ANSWER = {"role": "assistant", "content": '{"name":"西湖"}'}
AGAIN = {"role": "user", "content": "在哪？"}
PLACE = {"role": "assistant", "content": "在杭州。"}
THOUGHT = {"role": "assistant", "content": "<think>\n先看资料。\n</think>\n\n在杭州。"}
BESIDE = {"role": "assistant", "content": "在杭州。", "reasoning_content": "先看资料。"}
WHITE = {"role": "user", "content": " \n再说一遍 \n"}

ROWS: dict[str, list[Message]] = {
    "system and one turn": [SYSTEM, QUESTION, ANSWER],
    "one turn": [QUESTION, ANSWER],
    "two turns": [SYSTEM, QUESTION, ANSWER, AGAIN, PLACE],
    "white space": [WHITE, {"role": "assistant", "content": "在杭州。\n"}],
}
THINKING_ROWS: dict[str, list[Message]] = {
    "in the text": [QUESTION, THOUGHT],
    "beside it": [SYSTEM, QUESTION, BESIDE],
    "two turns": [QUESTION, THOUGHT, AGAIN, BESIDE],
    "none": [QUESTION, PLACE],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    with quiet():
        from mtgdm.student.tiny import build_tokenizer

        built = build_tokenizer()
    built.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *CONTROL_TOKENS]})
    return built


def chat_by(tokenizer: Any, template: Any, *, thoughts: bool | None = False) -> Chat:
    own = deepcopy(tokenizer)
    own.bos_token = "<bos>"
    own.eos_token = "</s>"
    own.chat_template = template
    return Chat(own, "the model", thoughts=thoughts)


def trained_turns(chat: Chat, messages: list[Message]) -> Iterator[tuple[list[int], str]]:
    """The tokens before each trained answer, and the text that is trained."""
    for encoded in chat.encode([messages]):
        begin = None
        for place, label in enumerate([*encoded.labels, IGNORED]):
            if begin is None and label != IGNORED:
                begin = place
            elif begin is not None and label == IGNORED:
                yield encoded.ids[:begin], str(chat.tokenizer.decode(encoded.ids[begin:place]))
                begin = None


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_every_answer_is_trained_after_the_prompt_that_asks_for_it(
    family: str, row: str, tokenizer: Any
) -> None:
    chat, messages = chat_by(tokenizer, TEMPLATES[family]), ROWS[row]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    found = list(trained_turns(chat, messages))
    assert [ids for ids, _ in found] == [chat.prompt(messages[:place]) for place in answers]
    end = chat.tokenizer.decode([chat.end_of_turn])
    for (_, text), place in zip(found, answers, strict=True):
        assert text.endswith(end)
        assert text.removesuffix(end).strip() == messages[place]["content"].strip()


@pytest.mark.parametrize("row", THINKING_ROWS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_thoughts_are_trained_where_the_student_is_to_write_them(
    family: str, row: str, tokenizer: Any
) -> None:
    chat, messages = chat_by(tokenizer, TEMPLATES[family], thoughts=True), THINKING_ROWS[row]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    found = list(trained_turns(chat, messages))
    assert [ids for ids, _ in found] == [chat.prompt(messages[:place]) for place in answers]
    knows_thoughts = "think>" in TEMPLATES[family]
    for ids, text in found:
        whole = str(chat.tokenizer.decode(ids[-20:])) + text
        if row != "none":
            assert whole.count("<think>\n先看资料。\n</think>\n\n在杭州。") == 1
        elif knows_thoughts:
            assert "<think>\n\n</think>\n\n在杭州。" in whole
        assert text.count("在杭州。") == 1


@pytest.mark.parametrize("family", TEMPLATES)
def test_an_answer_with_thoughts_is_refused_where_none_are_asked_for(family: str, tokenizer: Any) -> None:
    chat = chat_by(tokenizer, TEMPLATES[family])
    for message in (THOUGHT, BESIDE):
        with pytest.raises(ChatProblem, match="comes with thoughts") as caught:
            list(chat.encode([[QUESTION, message]]))
        assert "--thoughts keep" in (caught.value.hint or "")


@pytest.mark.parametrize("thoughts", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_the_template_is_the_same_whatever_a_server_passes_to_it_and_on_whatever_day(
    family: str, thoughts: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = chat_by(tokenizer, TEMPLATES[family], thoughts=thoughts)
    asked = chat.render([SYSTEM, QUESTION], True)
    for name, value in (
        ("enable_thinking", True),
        ("enable_thinking", False),
        ("thinking", True),
        ("date_string", "1 Jan 2030"),
    ):
        text = chat.tokenizer.apply_chat_template(
            [SYSTEM, QUESTION], tokenize=False, add_generation_prompt=True, **{name: value}
        )
        assert text == asked
    assert f"{datetime.now():%Y}" not in asked.replace("2024", "")
    again = chat_by(tokenizer, chat.template, thoughts=thoughts)
    assert (again.template, again.fingerprint) == (chat.template, chat.fingerprint), (
        "decided once, and for good"
    )


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_the_real_ollama_renders_is_what_was_trained(family: str, tokenizer: Any) -> None:
    """As the real one does: a TEMPLATE counts only where the template inside the GGUF offers no more."""
    chat = chat_by(tokenizer, TEMPLATES[family])
    made = made_in_ollama(chat)
    for messages in (
        [SYSTEM, QUESTION],
        [QUESTION],
        [QUESTION, ANSWER, AGAIN],
        [SYSTEM, QUESTION, ANSWER, AGAIN, PLACE, QUESTION],
        [SYSTEM, WHITE, PLACE, WHITE],
    ):
        for think in (None, False):
            rendered = made.rendered(messages, think)
            rendering.check(chat, messages, rendered.replace("{{ bos_token }}", "<bos>"), "Ollama")


def made_in_ollama(chat: Chat) -> MadeModel:
    """A model that a server made of the package of this student."""
    try:
        turns = turns_of(chat.render, bos="<bos>")
    except NotOfTurns:
        jinja, template = chat.template.replace("bos_token", "'<bos>'"), None
    else:
        jinja, template = turns.jinja(), None if turns.trims else turns.go(start=False)
        assert "<think>" not in jinja and "tool" not in jinja, "it offers nothing that was not trained"
    request = Modelfile("x.gguf", template, "", 512).request()
    key, text = b"tokenizer.chat_template", jinja.encode()
    kind = (8).to_bytes(4, "little")
    return MadeModel(request, key + kind + len(text).to_bytes(8, "little") + text)


def test_a_template_with_a_switch_would_be_asked_otherwise_and_is_found_out(tokenizer: Any) -> None:
    """What happened to Qwen3: the template of the base inside the GGUF, and a TEMPLATE with the empty thought."""
    chat = chat_by(tokenizer, QWEN3)
    text = QWEN3.encode()
    file = b"tokenizer.chat_template" + (8).to_bytes(4, "little") + len(text).to_bytes(8, "little") + text
    made = MadeModel({"template": turns_of(chat.render).go(start=False)}, file)
    rendered = made.rendered([QUESTION])
    with pytest.raises(UserError, match="asks the student otherwise than it was trained") as caught:
        rendering.check(chat, [QUESTION], rendered, "Ollama")
    assert "<think>\\n\\n</think>" in caught.value.message, "both texts are shown"


def test_named_templates_and_line_ends_of_windows_are_one_template(tokenizer: Any) -> None:
    plain = chat_by(tokenizer, QWEN3)
    for form in (
        {"default": QWEN3, "tool_use": "{{ tools }}"},
        QWEN3.replace("\n", "\r\n"),
        QWEN3 + "\n",
    ):
        other = chat_by(tokenizer, form)
        assert other.fingerprint == plain.fingerprint
        assert other.prompt([QUESTION]) == plain.prompt([QUESTION])
        assert isinstance(other.tokenizer.chat_template, str), (
            "a checkpoint is saved with the one that was trained"
        )


def test_the_weight_0_leaves_an_answer_untrained(tokenizer: Any) -> None:
    chat = chat_by(tokenizer, TEMPLATES["Qwen2.5"])
    bad: Message = {**ANSWER, "weight": 0}  # type: ignore[dict-item]  # as OpenAI's files have it
    ((ids, text),) = trained_turns(chat, [QUESTION, bad, AGAIN, PLACE])
    assert text == "在杭州。<|im_end|>"
    assert ids == chat.prompt([QUESTION, ANSWER, AGAIN])
    with pytest.raises(ChatProblem, match="weight 0"):
        list(chat.encode([[QUESTION, bad]]))


@pytest.mark.parametrize("template", [QWEN3_THINKING, R1_DISTILL])
def test_a_prompt_that_always_opens_a_thought_is_closed_or_left_open_as_the_rows_want(
    template: str, tokenizer: Any
) -> None:
    closed, opened, own = (chat_by(tokenizer, template, thoughts=one) for one in (False, True, None))
    assert closed.answer_start.endswith("<think>\n\n</think>\n\n")
    assert opened.answer_start.endswith("<think>\n")
    assert (own.thoughts, own.answer_start) == (True, opened.answer_start), (
        "a model of others is asked as its own"
    )
    assert any("closed at once" in line for line in closed.decided)
    assert opened.template == template


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (QWEN3, "thinking is off"),
        (SMOLLM3, "26 Jul 2024"),
        (LLAMA32, "26 Jul 2024"),
        (GEMMA2, "before the first question"),
    ],
)
def test_what_was_decided_is_told(template: str, words: str, tokenizer: Any) -> None:
    assert any(words in line for line in chat_by(tokenizer, template).decided)


def test_an_ordinary_template_is_left_as_it_is(tokenizer: Any) -> None:
    chat = chat_by(tokenizer, TEMPLATES["Qwen2.5"])
    assert chat.template == TEMPLATES["Qwen2.5"]
    assert chat.decided == ()
    assert student_template(chat.tokenizer, "the model").text == chat.template
