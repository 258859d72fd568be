"""The OpenAI-compatible teacher: what it asks, and what each reply means."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from mtgdm.contracts import schema_of
from mtgdm.errors import SettingError
from mtgdm.rows import Row
from mtgdm.teachers.openai import OpenAI
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, TeacherSettings, Unavailable
from tests.conftest import CommandLine, write_lines
from tests.teacher_domain import Gardens

MESSAGES = [{"role": "system", "content": "只用资料。"}, {"role": "user", "content": "西湖在哪里？"}]
OPTIONS = Options(0.3, 0.9, 42, 512, Row("0", MESSAGES, {}, Path("rows.jsonl"), 1))
KEY = "sk-never-in-a-log"


class Contract(BaseModel):
    name: str


def reply(text: str = '{"name": "西湖"}', **changes: Any) -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} | changes
    return {"choices": [choice], "usage": {"prompt_tokens": 30, "completion_tokens": 9}}


def backend(
    respond: Callable[[httpx.Request], httpx.Response], url: str = "host:8000/v1", **settings: Any
) -> OpenAI:
    settings = {"backend": "openai", "model": "qwen", "url": url, "api_key_env": "TEACHER_KEY"} | settings
    return OpenAI(TeacherSettings.model_validate(settings), Gardens(), transport=httpx.MockTransport(respond))


def ask(
    respond: Callable[[httpx.Request], httpx.Response],
    contract: type[BaseModel] | None = Contract,
    url: str = "host:8000/v1",
    messages: Sequence[Any] = MESSAGES,
    **sampling: Any,
) -> Completion:
    async def once() -> Completion:
        async with backend(respond, url) as teacher:
            return await teacher.answer(messages, contract, replace(OPTIONS, **sampling))

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
    assert body["response_format"]["json_schema"]["schema"] == schema_of(Contract)
    del body["response_format"]
    assert body == {
        "model": "qwen",
        "messages": MESSAGES,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 512,
        "temperature": 0.3,
        "top_p": 0.9,
        "seed": 42,
    }


def test_keys_of_training_data_are_not_sent() -> None:
    seen: list[Any] = []

    def respond(request: httpx.Request) -> httpx.Response:
        seen.extend(json.loads(request.content)["messages"])
        return httpx.Response(200, json=reply())

    earlier = {"role": "assistant", "content": "b", "weight": 0, "reasoning_content": "c"}
    ask(respond, messages=[{"role": "user", "content": "a"}, earlier, {"role": "user", "content": "d"}])
    assert seen[1] == {"role": "assistant", "content": "b"}


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


def refusing(**refused: str) -> tuple[Callable[[httpx.Request], httpx.Response], list[dict[str, Any]]]:
    """A server that takes none of these keys, for the reason given, and the questions it got."""
    asked: list[dict[str, Any]] = []

    def respond(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        for key, words in refused.items():
            if key in asked[-1]:
                return httpx.Response(400, json={"error": {"message": words, "param": key}})
        return httpx.Response(200, json=reply())

    return respond, asked


def test_a_model_that_calls_the_limit_otherwise_gets_it_under_that_name() -> None:
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    respond, asked = refusing(max_tokens=words)
    assert ask(respond).text == '{"name": "西湖"}'
    assert [body.get("max_tokens") for body in asked] == [512, None]
    assert asked[1]["max_completion_tokens"] == 512
    assert asked[1]["response_format"] == asked[0]["response_format"]


def test_what_is_refused_is_left_out() -> None:
    respond, asked = refusing(
        temperature="Unsupported value: 'temperature' does not support 1 with this model.",
        top_p="Unsupported parameter: 'top_p' is not supported with this model.",
        seed='[{"type":"extra_forbidden","loc":["body","seed"]}]',
    )
    assert ask(respond, temperature=1.0, top_p=1.0).text == '{"name": "西湖"}'
    assert len(asked) == 4
    assert asked[-1].keys() == {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "response_format",
    }


def test_a_greedy_answer_that_the_model_does_not_give_is_said_rather_than_dropped() -> None:
    words = "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
    respond, asked = refusing(temperature=words)
    with pytest.raises(Unavailable, match="takes no temperature of 0: Unsupported value") as caught:
        ask(respond, temperature=0.0)
    assert caught.value.hint == "--temperature 1"
    assert len(asked) == 1


def test_what_was_refused_once_is_not_sent_again() -> None:
    respond, asked = refusing(max_tokens="'max_tokens' is not supported", seed="'seed' is not supported")

    async def twice() -> None:
        async with backend(respond) as teacher:
            for _ in range(2):
                await teacher.answer(MESSAGES, None, OPTIONS)

    asyncio.run(twice())
    assert len(asked) == 4


@pytest.mark.parametrize(
    "message",
    [
        {"content": [{"type": "text", "text": "西湖在"}, {"type": "text", "text": "杭州。"}]},
        {"content": [{"type": "thinking", "thinking": "嗯"}, {"type": "text", "text": "西湖在杭州。"}]},
        {"content": "西湖在杭州。", "reasoning_content": "想一想"},
    ],
    ids=["parts", "a thought among the parts", "a thought beside"],
)
def test_the_answer_is_the_text_without_thoughts(message: dict[str, Any]) -> None:
    assert ask(answering(200, reply(message=message)), contract=None).text == "西湖在杭州。"


@pytest.mark.parametrize("message", [{"content": None, "reasoning_content": "想一想"}, {"content": None}])
def test_a_thought_alone_is_no_answer(message: dict[str, Any]) -> None:
    assert ask(answering(200, reply(message=message))).text == ""


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        (lambda: format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True), 39.0),
        ("Tue, 15 Nov 1994 08:12:31 GMT", 0.0),
        ("soon", None),
        ("", None),
        (f"Tue, 15 Nov {20 * '9'} 08:12:31 GMT", None),
    ],
)
def test_retry_after_is_a_number_of_seconds_or_a_date(
    given: str | Callable[[], str], seconds: float | None
) -> None:
    header = given if isinstance(given, str) else given()
    with pytest.raises(Retryable) as caught:
        ask(answering(429, {"error": "slow"}, headers={"Retry-After": header}))
    assert caught.value.overloaded
    found = caught.value.retry_after_s
    assert found is seconds is None or found == pytest.approx(seconds, abs=1.0)


def test_a_check_tells_a_busy_server_from_a_wrong_key_and_from_one_that_lists_nothing() -> None:
    def check(respond: Callable[[httpx.Request], httpx.Response]) -> None:
        async def run() -> None:
            async with backend(respond) as teacher:
                await teacher.check()

        asyncio.run(run())

    check(answering(200, {"data": []}))
    check(answering(404, {"detail": "Not Found"}))
    with pytest.raises(Retryable, match="Loading model") as busy:
        check(answering(503, {"error": {"message": "Loading model"}}))
    assert busy.value.overloaded
    with pytest.raises(Unavailable, match="bad key"):
        check(answering(401, {"error": {"message": "bad key"}}))


@pytest.mark.parametrize("key", ["sk-ünusual", "sk-two\nlines"])
def test_a_key_that_no_header_can_hold_is_named_without_being_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    with pytest.raises(SettingError, match="TEACHER_KEY is no key") as caught:
        ask(answering())
    assert key not in str(caught.value)


def test_a_key_that_the_server_repeats_is_not_repeated_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with pytest.raises(Unavailable, match=r"the key \*\*\* is unknown") as caught:
        ask(answering(401, {"error": {"message": f"the key {KEY} is unknown"}}))
    assert caught.value.hint == (
        "the key in the environment variable TEACHER_KEY was refused; api_key_env names another variable"
    )


@pytest.mark.parametrize("key", ["EMPTY", "none", "30"])
def test_a_key_that_stands_in_an_answer_by_chance_is_left_in_it(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", key)
    text = '{"name": "none of 30 halls is EMPTY"}'
    completion = ask(answering(200, reply(text)))
    assert (completion.text, completion.prompt_tokens) == (text, 30)


@pytest.mark.parametrize(
    "reply",
    [httpx.Response(200, json={"error": f"bad {KEY}"}), httpx.Response(200, html=f"<p>bad {KEY}</p>")],
)
def test_a_key_is_not_shown_where_an_error_comes_under_status_200(
    reply: httpx.Response, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with pytest.raises(Retryable, match=r"bad \*\*\*"):
        ask(lambda request: reply)


def test_white_space_around_a_key_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")

    def respond(request: httpx.Request) -> httpx.Response:
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        return httpx.Response(200, json=reply())

    ask(respond)


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
        (answering(200, {"error": '{"error": ' + "[" * 200_000}), Retryable, "the server says"),
        (lambda request: httpx.Response(200, text="<html>"), Retryable, "not JSON"),
        (lambda request: httpx.Response(200, content=b'{"choices": [{"mess'), Retryable, "not JSON"),
        (lambda request: httpx.Response(200, content=b"[" * 200_000), Retryable, "not JSON"),
        (answering(400, {"error": {"message": "context length exceeded"}}), Refused, "context length"),
        (answering(200, reply() | {"usage": {"prompt_tokens": 1}}), Refused, "the prompt was cut"),
        (
            answering(404, {"error": {"message": "The model `qwen` does not exist."}}),
            Unavailable,
            "not serve",
        ),
        (answering(404, {"detail": "Not Found"}), Unavailable, "HTTP 404"),
        (answering(401, {"error": {"message": "bad key"}}), Unavailable, "bad key"),
        (answering(402, {"error": {"message": "no credit left"}}), Unavailable, "no credit left"),
        (
            answering(429, {"error": {"message": "check your plan", "code": "insufficient_quota"}}),
            Unavailable,
            "check your plan",
        ),
        (answering(302, headers={"Location": "https://login.example"}), Unavailable, "login.example"),
        (
            answering(200, reply(message={"content": None, "refusal": "I cannot help"})),
            Refused,
            "I cannot help",
        ),
        (answering(422, {"detail": "messages: field required"}), Refused, "field required"),
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
