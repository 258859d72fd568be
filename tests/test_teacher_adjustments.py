"""What a server does not take is left out, replaced or folded, told once, and remembered for its address."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import httpx
import pytest
from pydantic import BaseModel

from mtgdm.rows import Row
from mtgdm.teachers.adjustments import folded
from mtgdm.teachers.http import Reply
from mtgdm.teachers.openai import OpenAI
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, TeacherSettings, Unavailable
from mtgdm.teachers.words import said
from tests.conftest import CommandLine, read_rows, write_lines
from tests.teacher_domain import Gardens

MESSAGES = [{"role": "system", "content": "只用资料。"}, {"role": "user", "content": "西湖在哪里？"}]
ROW = Row("0", MESSAGES, {}, Path("rows.jsonl"), 1)
OPTIONS = Options(0.3, 0.9, 42, 512, ROW)
Body = dict[str, Any]


class Contract(BaseModel):
    name: str


def answer(text: str = '{"name": "西湖"}') -> Body:
    return {
        "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 30, "completion_tokens": 9},
    }


class Picky:
    """A server that refuses some questions; what it was asked and what was told of it is kept."""

    def __init__(self, refuse: Callable[[Body], tuple[int, Any] | None]) -> None:
        self.refuse = refuse
        self.asked: list[Body] = []
        self.told: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(json.loads(request.content))
        refused = self.refuse(self.asked[-1])
        status, body = refused or (200, answer())
        return httpx.Response(status, json=body)

    def ask(
        self, times: int = 1, *, contract: type[BaseModel] | None = Contract, **settings: Any
    ) -> list[Completion]:
        given = {"backend": "openai", "model": "m", "url": ["http://host"], **settings}

        async def run() -> list[Completion]:
            teacher = OpenAI(
                TeacherSettings.model_validate(given), Gardens(), transport=httpx.MockTransport(self)
            )
            teacher.tell = self.told.append
            async with teacher:
                found = [await teacher.answer(MESSAGES, contract, OPTIONS) for _ in range(times)]
            self.adjustments = teacher.adjustments
            return found

        return asyncio.run(run())


def refusing(key: str, words: str | Body, status: int = 400) -> Callable[[Body], tuple[int, Any] | None]:
    body = words if isinstance(words, dict) else {"error": {"message": words}}
    return lambda asked: (status, body) if key in asked else None


@pytest.mark.parametrize(
    ("key", "words", "status"),
    [
        ("seed", "Unrecognized request argument supplied: seed", 400),
        ("seed", 'Invalid JSON payload received. Unknown name "seed": Cannot find field.', 400),
        (
            "seed",
            {"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs"}]},
            422,
        ),
        ("seed", {"error": {"message": "no", "param": "seed"}}, 400),
        ("seed", "property 'seed' is unsupported", 400),
        ("top_p", "`temperature` and `top_p` cannot both be specified for this model.", 400),
        ("temperature", "Unsupported value: 'temperature' does not support 0.3 with this model.", 400),
        ("stream_options", "stream_options is not supported by this backend", 400),
        ("stream_options", {"error": {"message": "Unknown parameter", "param": "stream_options"}}, 400),
        ("response_format", "Json mode is not supported for this model.", 400),
        ("response_format", {"code": 20024, "message": "Json mode is not supported for this model."}, 400),
        ("response_format", "This response_format type is unavailable now", 400),
        ("response_format", "The provided JSON mode is invalid", 400),
        ("response_format", "No endpoints found that support structured outputs", 404),
        ("response_format", "'response_format.type' must be 'json_object'", 422),
    ],
)
def test_a_field_that_a_server_refuses_is_left_out_from_then_on(
    key: str, words: str | Body, status: int
) -> None:
    server = Picky(refusing(key, words, status))
    found = server.ask(3)
    assert [one.text for one in found] == ['{"name": "西湖"}'] * 3
    assert [key in body for body in server.asked] == [True, False, False, False]
    (told,) = server.told
    assert told.startswith("http://host/v1 is asked without ")
    assert len(server.adjustments) == 1
    assert found[0].adjusted == server.adjustments[0]


def test_the_limit_goes_by_another_name_or_not_at_all() -> None:
    words = "Unsupported parameter: '{}' is not supported with this model."
    server = Picky(refusing("max_tokens", words.format("max_tokens")))
    server.ask(2)
    assert [body.get("max_completion_tokens") for body in server.asked] == [None, 512, 512]

    def neither(asked: Body) -> tuple[int, Any] | None:
        key = next((key for key in ("max_tokens", "max_completion_tokens") if key in asked), None)
        return (400, {"error": {"message": words.format(key)}}) if key else None

    server = Picky(neither)
    server.ask()
    assert server.adjustments == ["without a limit of tokens"]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "words",
    [
        "System role not supported",
        "Developer instruction is not enabled for models/gemma-3-27b-it",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "messages[0].role 'system' is not allowed",
    ],
)
@pytest.mark.parametrize("status", [400, 500])
def test_a_system_text_goes_into_the_first_user_turn(words: str, status: int) -> None:
    server = Picky(
        lambda asked: (
            (status, {"error": {"message": words}}) if asked["messages"][0]["role"] == "system" else None
        )
    )
    server.ask(2)
    assert server.asked[1]["messages"] == [{"role": "user", "content": "只用资料。\n\n西湖在哪里？"}]
    assert len(server.asked) == 3
    assert server.adjustments == ["with the system text in the first user turn"]


def test_what_follows_the_first_user_turn_stays() -> None:
    talk = [*MESSAGES, {"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]
    assert folded(talk) == [{"role": "user", "content": "只用资料。\n\n西湖在哪里？"}, *talk[2:]]
    assert folded(talk[1:]) == talk[1:]


@pytest.mark.parametrize(
    ("streams", "words"),
    [
        (
            False,
            "This model only support stream mode, please enable the stream parameter to access the model.",
        ),
        (False, "parameter.enable_thinking must be set to false for non-streaming calls"),
        (True, "Streaming is not supported"),
        (True, {"error": {"message": "Unsupported value", "param": "stream"}}),
        (True, "stream=true is not supported for this model"),
    ],
)
def test_a_server_that_streams_only_or_not_at_all_is_asked_so(streams: bool, words: str | Body) -> None:
    body = words if isinstance(words, dict) else {"error": {"message": words}}
    server = Picky(lambda asked: (400, body) if asked["stream"] is streams else None)
    server.ask(2, stream=streams)
    assert [asked["stream"] for asked in server.asked] == [streams, not streams, not streams]


def test_a_schema_that_alone_makes_a_server_fail_is_left_out() -> None:
    server = Picky(refusing("response_format", "Internal Server Error", 500))
    with pytest.raises(Retryable, match="HTTP 500"):
        server.ask()
    assert len(server.asked) == 1, "once may be chance"

    async def twice() -> str:
        teacher = OpenAI(
            TeacherSettings(backend="openai", model="m", url=["http://host"]),
            Gardens(),
            transport=httpx.MockTransport(server),
        )
        async with teacher:
            with pytest.raises(Retryable):
                await teacher.answer(MESSAGES, Contract, OPTIONS)
            text = (await teacher.answer(MESSAGES, Contract, OPTIONS)).text
            await teacher.answer(MESSAGES, Contract, OPTIONS)
        assert not teacher.holds_to_schema
        return text

    server.asked.clear()
    assert asyncio.run(twice()) == '{"name": "西湖"}'
    assert ["response_format" in body for body in server.asked] == [True, True, False, False]


@pytest.mark.parametrize(
    ("status", "words", "error", "said"),
    [
        (400, "No connected db.", Unavailable, "HTTP 400: No connected db"),
        (400, "API key not valid. Please pass a valid API key.", Unavailable, "HTTP 400: API key"),
        (
            400,
            "Invalid model name passed in model=m. Call `/v1/models`",
            Unavailable,
            "does not serve the model",
        ),
        (400, "m is not a valid model ID", Unavailable, "does not serve the model"),
        (400, "Output data may contain inappropriate content.", Refused, "the server's content filter"),
        (400, "Content Exists Risk", Refused, "the server's content filter"),
        (400, "系统检测到输入或生成内容可能包含不安全或敏感内容", Refused, "the server's content filter"),
        (400, "max_tokens=9000 cannot be greater than max_model_len=4096", Refused, "max_model_len=4096"),
        (400, "This model's maximum context length is 4096 tokens.", Refused, "maximum context"),
        (400, "temperature must be between 0 and 1", Refused, "must be between"),
        (400, "the seed of the sunflower is a word of this prompt", Refused, "sunflower"),
        (500, "model requires more system memory (9 GiB)", Retryable, "more system memory"),
    ],
)
def test_other_refusals_are_asked_once_and_say_what_they_are(
    status: int, words: str, error: type[Exception], said: str
) -> None:
    server = Picky(lambda asked: (status, {"error": {"message": words, "code": "x"}}))
    with pytest.raises(error, match=said) as caught:
        server.ask()
    assert len(server.asked) == 1
    if "max_model_len" in words or "maximum context" in words:
        assert isinstance(caught.value, Refused)
        assert caught.value.setting
        assert "--max-tokens" in (caught.value.hint or "")


def test_more_keys_are_handed_on_and_are_part_of_the_fingerprint() -> None:
    more = {"chat_template_kwargs": {"enable_thinking": False}, "top_k": 20, "stream_options": {"x": 1}}
    server = Picky(lambda asked: None)
    server.ask(extra_body=more)
    (asked,) = server.asked
    assert asked["chat_template_kwargs"] == {"enable_thinking": False}
    assert asked["top_k"] == 20
    assert asked["stream_options"] == {"include_usage": True, "x": 1}

    def fingerprint(**settings: Any) -> str:
        given = TeacherSettings(backend="openai", model="m", url=["http://host"], **settings)
        return OpenAI(given, Gardens()).fingerprint

    assert fingerprint() == fingerprint(extra_body={}) == fingerprint(stream=False, timeout_s=9, deadline_s=9)
    assert len({fingerprint(), fingerprint(extra_body=more), fingerprint(extra_body={"top_k": 1})}) == 3


def test_an_endless_page_is_cut_before_anything_looks_at_it() -> None:
    reply = Reply(502, {"content-type": "text/html"}, b"<script" + b"<p>" * 3_000_000)
    assert len(said(reply)) <= 301


# --- on the command line ---------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[Body]] = []

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if "seed" in body:
            self._send(400, {"error": {"message": "Unrecognized request argument supplied: seed"}})
        else:
            self._send(200, answer("好。"))

    def _send(self, status: int, value: Body) -> None:
        data = json.dumps(value).encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""


@pytest.fixture
def url() -> Iterator[str]:
    _Handler.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_run_tells_it_once_and_its_manifest_remembers_it(mtgdm: CommandLine, url: str) -> None:
    rows = [{"messages": [{"role": "user", "content": f"第{n}问"}]} for n in range(6)]
    write_lines(mtgdm.folder / "data" / "prompts.jsonl", *rows)
    command = ["teacher", "--backend", "openai", "--model", "m", "--url", url]

    ran = mtgdm(*command, "--extra-body", '{"top_k": 20}')

    assert ran.code == 0, ran.err
    assert ran.err.count("is asked without seed: Unrecognized request argument") == 1
    assert {body["top_k"] for body in _Handler.asked} == {20}
    manifest = json.loads((mtgdm.folder / "data" / "teacher.jsonl.manifest.json").read_text(encoding="utf-8"))
    assert manifest["counts"]["adjusted"] == {url: ["without seed"]}
    teacher = read_rows(mtgdm.folder / "data" / "teacher.jsonl")[0]["meta"]["teacher"]
    assert teacher["adjusted"] == "without seed"
    other = mtgdm(*command, "--extra-body", '{"top_k": 21}')
    assert (other.code, "other sampling settings" in other.err) == (1, True)


def test_more_keys_come_from_a_profile_the_environment_or_a_flag(mtgdm: CommandLine) -> None:
    profile = "teacher:\n  extra_body: {chat_template_kwargs: {enable_thinking: false}}\n"
    (mtgdm.folder / "mine.yaml").write_text(profile, encoding="utf-8")

    def shown(**environment: str) -> Any:
        ran = mtgdm("config", "show", "teacher", "--json", "--profile", "mine.yaml", env=environment)
        return ran.json

    assert '"enable_thinking": false' in json.dumps(shown())
    assert '"top_k": 3' in json.dumps(shown(MTGDM_TEACHER_EXTRA_BODY='{"top_k": 3}'))
    wrong = mtgdm("teacher", "--extra-body", "{top_k: 3}")
    assert wrong.code == 2
    assert "teacher.extra_body" in wrong.err
    assert "this is not JSON" in wrong.err
