"""The first prompt of a served student: what the server renders is held against the training's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from mtgdm.errors import UserError
from mtgdm.evaluation import served_prompt
from mtgdm.student.chat import Chat
from mtgdm.student.noise import quiet

ROW = [{"role": "system", "content": "你是讲解员。"}, {"role": "user", "content": "介绍西湖。"}]
LOOSE = "Cafe\u0301"


@pytest.fixture(scope="module")
def chat() -> Chat:
    with quiet():
        from mtgdm.student.tiny import build_tokenizer

        return Chat(build_tokenizer(), "the student")


def asked(
    chat: Chat, answer: Callable[[str, dict[str, Any]], Any], backend: str = "openai", **more: Any
) -> tuple[bool, list[httpx.Request]]:
    """Whether the server showed its prompt, and what it was asked; `answer` gives JSON, or None for a 404."""
    seen: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        value = answer(request.url.path, json.loads(request.content))
        return httpx.Response(404, json={"error": "no"}) if value is None else httpx.Response(200, json=value)

    given = {"url": "http://localhost:1/v1", "model": "guide", "messages": ROW, **more}
    shown = served_prompt.check(chat, backend=backend, transport=httpx.MockTransport(reply), **given)
    return shown, seen


def test_ollama_shows_its_prompt(chat: Chat) -> None:
    text = chat.prompt_text(ROW)
    shown, seen = asked(chat, lambda path, body: {"_debug_info": {"rendered_template": text}}, "ollama")
    assert shown
    body = json.loads(seen[0].content)
    assert (seen[0].url.path, body["_debug_render_only"], body["model"]) == ("/api/chat", True, "guide")


def test_llama_cpp_shows_its_prompt(chat: Chat) -> None:
    prompts = {"/apply-template": {"prompt": chat.prompt_text(ROW)}}
    shown, _ = asked(chat, lambda path, body: prompts.get(path))
    assert shown


def test_vllm_shows_its_tokens(chat: Chat) -> None:
    prompts = {"/tokenize": {"tokens": chat.prompt(ROW), "count": 9}}
    shown, _ = asked(chat, lambda path, body: prompts.get(path))
    assert shown


@pytest.mark.parametrize("path", ["/api/chat", "/apply-template", "/tokenize"])
def test_another_prompt_ends_the_evaluation_with_both_texts(path: str, chat: Chat) -> None:
    other = "You are Qwen.\n" + chat.prompt_text(ROW)
    replies: dict[str, Any] = {
        "/api/chat": {"_debug_info": {"rendered_template": other}},
        "/apply-template": {"prompt": other},
        "/tokenize": {"tokens": chat.tokens(other)},
    }
    backend = "ollama" if path == "/api/chat" else "openai"
    with pytest.raises(UserError, match="asks the student otherwise than it was trained") as caught:
        asked(chat, lambda at, body: replies[path] if at == path else None, backend)
    assert "You are Qwen." in caught.value.message
    assert "<|im_start|>system" in caught.value.message


@pytest.mark.parametrize("backend", ["ollama", "openai"])
def test_a_server_that_shows_nothing_is_no_error(backend: str, chat: Chat) -> None:
    assert asked(chat, lambda path, body: {"message": {"content": "西湖"}}, backend)[0] is False
    assert asked(chat, lambda path, body: None, backend)[0] is False
    assert asked(chat, lambda path, body: ["no object"], backend)[0] is False


def test_a_server_that_is_not_there_is_left_to_the_questions(chat: Chat) -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    shown = served_prompt.check(
        chat, ROW, backend="openai", url="http://localhost:1", model="m", transport=httpx.MockTransport(gone)
    )
    assert shown is False


def test_the_key_and_texts_in_nfc_go_along(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    row = [{"role": "user", "content": LOOSE}]
    text = chat.prompt_text([{"role": "user", "content": "Caf\u00e9"}])
    shown, seen = asked(
        chat, lambda path, body: {"prompt": text}, messages=row, normalise=True, api_key_env="MY_KEY"
    )
    assert shown
    assert seen[0].headers["Authorization"] == "Bearer secret"
    assert json.loads(seen[0].content)["messages"] == [{"role": "user", "content": "Caf\u00e9"}]


def test_a_bos_token_that_the_server_adds_by_itself_is_no_difference(chat: Chat, tmp_path: Path) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(chat.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    led = Chat(tokenizer, "the student")
    prompts = {"/apply-template": {"prompt": led.prompt_text(ROW).removeprefix("<|im_start|>")}}
    assert asked(led, lambda path, body: prompts.get(path))[0]
