"""The OpenAI-compatible teacher: what it asks, and what each reply means."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from mtgdm.rows import Row
from mtgdm.teachers.openai import OpenAI
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, TeacherSettings, Unavailable
from tests.conftest import CommandLine, write_lines
from tests.teacher_domain import Gardens

MESSAGES = [{"role": "system", "content": "只用资料。"}, {"role": "user", "content": "西湖在哪里？"}]
KEY = "sk-never-in-a-log"


class Contract(BaseModel):
    name: str


def reply(text: str = '{"name": "西湖"}', **changes: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | changes
    return {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 9}}


def ask(
    respond: Callable[[httpx.Request], httpx.Response],
    contract: type[BaseModel] | None = Contract,
    url: str = "host:8000/v1",
) -> Completion:
    settings = TeacherSettings(backend="openai", model="qwen", url=url, api_key_env="TEACHER_KEY")
    options = Options(0.3, 0.9, 42, 512, Row("0", MESSAGES, {}, Path("rows.jsonl"), 1))

    async def once() -> Completion:
        async with OpenAI(settings, Gardens(), transport=httpx.MockTransport(respond)) as backend:
            return await backend.answer(MESSAGES, contract, options)

    return asyncio.run(once())


def answering(
    status: int = 200, value: Any = None, **options: Any
) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(status, json=reply() if value is None else value, **options)


def test_a_question_names_everything_that_shapes_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    seen: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=reply())

    completion = ask(respond)
    assert (completion.text, completion.finish_reason) == ('{"name": "西湖"}', "stop")
    assert (completion.prompt_tokens, completion.output_tokens) == (30, 9)
    (request,) = seen
    assert str(request.url) == "http://host:8000/v1/chat/completions"
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    body = json.loads(request.content)
    assert body["response_format"]["json_schema"]["schema"] == Contract.model_json_schema()
    del body["response_format"]
    assert body == {
        "model": "qwen",
        "messages": MESSAGES,
        "stream": False,
        "max_tokens": 512,
        "temperature": 0.3,
        "top_p": 0.9,
        "seed": 42,
    }


def test_prose_is_asked_without_a_schema_and_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)

    def respond(request: httpx.Request) -> httpx.Response:
        assert "response_format" not in json.loads(request.content)
        assert "Authorization" not in request.headers
        return httpx.Response(200, json=reply("西湖在杭州。"))

    assert ask(respond, contract=None).text == "西湖在杭州。"


def test_a_server_that_refuses_schemas_is_asked_without() -> None:
    asked: list[bool] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append("response_format" in json.loads(request.content))
        if asked[-1]:
            return httpx.Response(
                400, json={"error": {"message": "response_format json_schema is not supported"}}
            )
        return httpx.Response(200, json=reply())

    assert ask(respond).text == '{"name": "西湖"}'
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("respond", "error", "words"),
    [
        (
            answering(429, {"error": {"message": "slow down"}}, headers={"Retry-After": "7"}),
            Retryable,
            "slow down",
        ),
        (answering(503, {"error": "busy"}), Retryable, "busy"),
        (answering(200, reply(finish_reason=None)), Retryable, "broke off"),
        (answering(200, {"choices": []}), Retryable, "no message"),
        (answering(200, {"error": {"message": "out of memory"}}), Retryable, "out of memory"),
        (lambda request: httpx.Response(200, text="<html>"), Retryable, "not JSON"),
        (lambda request: httpx.Response(200, content=b'{"choices": [{"mess'), Retryable, "not JSON"),
        (answering(400, {"error": {"message": "context length exceeded"}}), Refused, "context length"),
        (answering(200, reply() | {"usage": {"prompt_tokens": 1}}), Refused, "the prompt was cut"),
        (
            answering(404, {"error": {"message": "The model `qwen` does not exist."}}),
            Unavailable,
            "not serve",
        ),
        (answering(404, {"detail": "Not Found"}), Unavailable, "HTTP 404"),
        (answering(401, {"error": {"message": "bad key"}}), Unavailable, "bad key"),
    ],
)
def test_what_a_reply_means(
    respond: Callable[[httpx.Request], httpx.Response], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        ask(respond)
    assert KEY not in str(caught.value)
    if isinstance(caught.value, Retryable) and "slow down" in words:
        assert caught.value.retry_after_s == 7


def test_a_cut_answer_says_so() -> None:
    assert ask(answering(200, reply(finish_reason="length"))).finish_reason == "length"


def test_a_missing_key_is_named_without_being_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    with pytest.raises(Unavailable) as caught:
        ask(answering(401, {"error": {"message": "no key"}}))
    assert "TEACHER_KEY is not set" in (caught.value.hint or "")


def test_no_server_is_one_line(mtgdm: CommandLine) -> None:
    row = {"messages": MESSAGES, "meta": {"spot": "西湖"}}
    write_lines(mtgdm.folder / "data/prompts.jsonl", row)
    ran = mtgdm("teacher", "--profile", "vllm", "--url", "http://127.0.0.1:9/v1")
    assert (ran.code, "no OpenAI-compatible server answers" in ran.err) == (1, True), ran.err
    assert "Traceback" not in ran.err
    assert not (mtgdm.folder / "data/teacher.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("localhost:8000", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/", "http://localhost:8000/v1/chat/completions"),
        ("https://host/api/v3", "https://host/api/v3/chat/completions"),
        ("https://host/v1beta/openai/chat/completions", "https://host/v1beta/openai/chat/completions"),
    ],
)
def test_an_address_with_a_path_is_taken_as_given(given: str, asked: str) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == asked
        return httpx.Response(200, json=reply())

    ask(respond, url=given)
