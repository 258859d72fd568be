"""Answers that are read as they are written: the forms of streams, the watch, the clock, and servers that cannot."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from mtgdm.errors import UserError
from mtgdm.rows import Row
from mtgdm.teachers import http, lengths, loop
from mtgdm.teachers.ollama import Ollama
from mtgdm.teachers.openai import OpenAI
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, TeacherSettings
from mtgdm.teachers.watch import AnswerWatch
from mtgdm.testing import StageRun
from tests import teacher_domain
from tests.conftest import read_rows, write_lines
from tests.ollama_server import Fault, OllamaServer, Question
from tests.teacher_domain import Card, Gardens, prompt_rows, right_answer, run_teacher, write_prompts

MESSAGES = [{"role": "system", "content": "只用资料。"}, {"role": "user", "content": "西湖在哪里？"}]
ROW = Row("0", MESSAGES, {}, Path("rows.jsonl"), 1)
LONG = "".join(f"第{number}句说的是湖。" for number in range(200))


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)
    monkeypatch.setattr(loop, "FIRST_PAUSE_S", 0.01)


# --- the forms of streams --------------------------------------------------------------------------


def chunk(**delta: Any) -> dict[str, Any]:
    reason = delta.pop("finish_reason", None)
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}


def sse(*events: Any, end: str = "\n\n", done: bool = True) -> bytes:
    lines = [
        one if isinstance(one, str) else "data: " + json.dumps(one, ensure_ascii=False) for one in events
    ]
    return "".join(f"{line}{end}" for line in [*lines, *(["data: [DONE]"] if done else [])]).encode()


async def in_pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for place in range(0, len(data), size):
        yield data[place : place + size]


def read(
    body: bytes,
    *,
    kind: str = "text/event-stream",
    size: int = 7,
    backend: type[OpenAI | Ollama] = OpenAI,
    max_tokens: int = 512,
) -> Completion:
    """What a backend makes of a reply with this body, which comes in pieces of so many bytes."""

    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Type": kind}, content=in_pieces(body, size))

    settings = TeacherSettings(backend="openai", model="m", url=["http://host"])

    async def once() -> Completion:
        async with backend(settings, Gardens(), transport=httpx.MockTransport(respond)) as teacher:
            return await teacher.answer(MESSAGES, None, Options(0.3, 0.9, 42, max_tokens, ROW))

    return asyncio.run(once())


USAGE = {"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 9}}
WORDS = (
    chunk(role="assistant", content=""),
    chunk(content="西湖"),
    chunk(content="在杭州"),
    chunk(content="。😀"),
    chunk(finish_reason="stop"),
)


@pytest.mark.parametrize("size", [1, 5, 100_000])
@pytest.mark.parametrize(
    "body",
    [
        sse(*WORDS, USAGE),
        sse(*WORDS, USAGE, end="\r\n\r\n"),
        sse(*WORDS, USAGE, end="\n"),
        sse(": OPENROUTER PROCESSING", *WORDS, "event: ping", USAGE),
        sse(*WORDS, USAGE, done=False),
        sse(*WORDS, USAGE)[:-2],
        sse("data: " + json.dumps(WORDS[1], indent=1).replace("\n", "\ndata: "), *WORDS[2:], USAGE),
        b"".join(
            b"data:" + json.dumps(one, separators=(",", ":")).encode() + b"\n\n" for one in (*WORDS, USAGE)
        ),
    ],
    ids=["plain", "CRLF", "no blank lines", "comments", "no DONE", "cut end", "several lines", "compact"],
)
def test_server_sent_events_in_every_form_are_one_answer(body: bytes, size: int) -> None:
    found = read(body, size=size)
    assert (found.text, found.finish_reason) == ("西湖在杭州。😀", "stop")
    assert (found.prompt_tokens, found.output_tokens) == (30, 9)


def line(content: str, **more: Any) -> bytes:
    message = {"role": "assistant", "content": content}
    return json.dumps({"model": "m", "message": message, "done": False, **more}).encode() + b"\n"


LAST = {"done": True, "done_reason": "stop", "prompt_eval_count": 30, "eval_count": 9}


@pytest.mark.parametrize("size", [1, 5, 100_000])
@pytest.mark.parametrize("kind", ["application/x-ndjson", "application/json", "text/plain; charset=utf-8"])
@pytest.mark.parametrize("backend", [Ollama])
def test_json_lines_are_one_answer_whatever_they_are_called(
    size: int, kind: str, backend: type[Ollama]
) -> None:
    body = line("西湖") + line("在杭州。") + line("", **LAST)
    for found in (body, body[:-1]):
        completion = read(found, kind=kind, size=size, backend=backend)
        assert (completion.text, completion.prompt_tokens, completion.output_tokens) == (
            "西湖在杭州。",
            30,
            9,
        )


@pytest.mark.parametrize("kind", ["application/json", "text/plain"])
def test_events_that_are_called_otherwise_are_read_all_the_same(kind: str) -> None:
    assert read(sse(*WORDS, USAGE), kind=kind).text == "西湖在杭州。😀"


def test_a_whole_chat_in_one_event_is_an_answer() -> None:
    whole = {
        "choices": [{"message": {"role": "assistant", "content": "西湖在杭州。"}, "finish_reason": "stop"}]
    }
    assert read(sse(whole)).text == "西湖在杭州。"


def test_thoughts_in_fields_of_their_own_are_no_part_of_the_answer() -> None:
    thoughts = (chunk(reasoning_content="想"), chunk(reasoning="一想"))
    assert read(sse(*thoughts, *WORDS)).text == "西湖在杭州。😀"
    body = line("", message={"content": "", "thinking": "想一想"}) + line("好。") + line("", **LAST)
    assert read(body, kind="application/x-ndjson", backend=Ollama).text == "好。"


def test_a_lone_surrogate_in_an_event_is_read() -> None:
    body = sse('data: {"choices": [{"delta": {"content": "a\\ud83d"}, "finish_reason": "stop"}]}')
    assert read(body).text == "a\ud83d"


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 0, "completion_tokens": 0}, (None, None)),
        ({"prompt_tokens": -1, "completion_tokens": -1}, (None, None)),
        ({"prompt_tokens": None, "completion_tokens": "9"}, (None, None)),
        ({"prompt_tokens": 30.0, "completion_tokens": True}, (None, None)),
        ({"prompt_tokens": 10**400, "completion_tokens": 9}, (None, 9)),
        (None, (None, None)),
        ([], (None, None)),
    ],
)
def test_what_is_no_count_costs_nothing(usage: Any, counts: tuple[int | None, int | None]) -> None:
    completion = read(sse(*WORDS, {"choices": [], "usage": usage}))
    assert (completion.prompt_tokens, completion.output_tokens) == counts


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (
            sse(*WORDS[:3], {"error": {"message": "out of memory"}}),
            Retryable,
            "the server says: out of memory",
        ),
        (sse({"error": {"message": "maximum context length is 9", "code": 400}}), Refused, "maximum context"),
        (sse(*WORDS[:3], done=False), Retryable, "broke off"),
        (sse(done=True), Retryable, "no message"),
        (sse("data: {broken", done=False), Retryable, "not JSON"),
        (sse("data: [1]", done=False), Retryable, "no JSON object but list"),
        (b"", Retryable, "no message"),
    ],
    ids=[
        "an error in the middle",
        "an error at first",
        "broken off",
        "empty",
        "no JSON",
        "a list",
        "nothing",
    ],
)
def test_a_stream_that_fails_says_how(body: bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read(body)


def test_an_error_in_a_stream_of_ollama_is_one() -> None:
    with pytest.raises(Retryable, match="runner has stopped"):
        read(line("西湖") + b'{"error":"runner has stopped"}\n', kind="application/x-ndjson", backend=Ollama)


def test_a_reply_that_grows_without_end_is_left() -> None:
    endless = b"data: " + json.dumps(chunk(content="", padding="x" * 9000)).encode() + b"\n\n"
    found = read(endless * 1000, size=1 << 20, max_tokens=16)
    assert (found.text, found.finish_reason) == ("", "length")
    with pytest.raises(Retryable, match="longer than"):
        read(b'{"a": "' + b"x" * 9_000_000 + b'"}', kind="application/json", size=1 << 20, max_tokens=16)


# --- over a real connection ------------------------------------------------------------------------


@dataclass
class Speaker:
    """A server that says pieces with pauses between them, and sees when it is left."""

    pieces: list[bytes]
    pause_s: float = 0.0
    ends: bool = True
    written: int = 0
    left_after: list[int] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
                await reader.readexactly(length)
                await self._speak(reader, writer)
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for piece in self.pieces:
            if reader.at_eof():
                self.left_after.append(self.written)
                return
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            self.written += 1
            await writer.drain()
            await asyncio.sleep(self.pause_s)
        if self.ends:
            writer.write(b"0\r\n\r\n")
        else:
            await reader.read()  # until the client hangs up


def talk(speaker: Speaker, times: int = 1, watch: AnswerWatch | None = None) -> list[Completion]:
    async def run() -> list[Completion]:
        server = await asyncio.start_server(speaker.serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            settings = TeacherSettings(backend="ollama", model="m", url=[f"http://127.0.0.1:{port}"])
            async with Ollama(settings, Gardens()) as teacher:
                options = Options(0.3, 0.9, 42, 512, ROW, *([watch] if watch else []))
                found = [await teacher.answer(MESSAGES, None, options) for _ in range(times)]
            await asyncio.sleep(0.1)
        return found

    return asyncio.run(run())


def test_a_connection_carries_one_stream_after_the_other() -> None:
    speaker = Speaker([line("西湖"), line("在杭州。"), line("", **LAST)])
    assert [one.text for one in talk(speaker, 3)] == ["西湖在杭州。"] * 3
    assert len(speaker.heads) == 3


def test_a_server_that_does_not_end_its_reply_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LATE_END_S", 0.05)
    started = time.monotonic()
    assert [one.text for one in talk(Speaker([line("好。"), line("", **LAST)], ends=False), 2)] == [
        "好。"
    ] * 2
    assert time.monotonic() - started < 5


def test_a_lost_answer_is_left_at_once() -> None:
    speaker = Speaker([line("于") for _ in range(2000)], pause_s=0.001)
    watch = AnswerWatch(max_tokens=9000, is_json=False, script=None, stops=True, began=lambda: None)
    (found,) = talk(speaker, watch=watch)
    assert found.finish_reason == "stopped"
    assert found.output_tokens is not None
    assert found.output_tokens < 200
    assert found.text == "于" * found.output_tokens
    assert speaker.written < 400
    assert speaker.left_after or speaker.written < 2000


# --- a run -----------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer) as running:
        yield running


def ask(workspace: Path, server: OllamaServer, **settings: Any) -> StageRun:
    return run_teacher(
        workspace, **{"backend": "ollama", "url": server.url, "model": "teacher:7b", **settings}
    )


def rejected(workspace: Path) -> list[dict[str, Any]]:
    return [row["rejected"] for row in read_rows(workspace / "data" / "teacher.rejected.jsonl")]


def meta(workspace: Path) -> list[dict[str, Any]]:
    return [row["meta"]["teacher"] for row in read_rows(workspace / "data" / "teacher.jsonl")]


def first_time(answer: Callable[[Question], str]) -> Callable[[Question], str]:
    """An answer to what is asked for the first time; then the right one."""
    asked: set[str] = set()

    def say(question: Question) -> str:
        garden = str(question.body["messages"][1]["content"])[:4]
        if garden in asked:
            return right_answer(question)
        asked.add(garden)
        return answer(question)

    return say


def test_a_loop_is_stopped_and_asked_for_again_otherwise(tmp_path: Path, server: OllamaServer) -> None:
    server.answer = first_time(lambda question: "西湖" + "适合拍照，" * 2000)
    server.loop_breaker = False
    write_prompts(tmp_path, 2, types=["note"])
    ask(tmp_path, server)
    assert [(one["attempts"], one["repaired"]) for one in meta(tmp_path)] == [(2, True)] * 2
    assert server.tokens_written < 2500
    assert [question.body["options"]["seed"] for question in server.questions].count(43) == 2
    assert all("适合拍照" not in str(question.body) for question in server.questions)


def test_a_loop_that_comes_in_one_piece_is_one_too(tmp_path: Path, server: OllamaServer) -> None:
    server.streams = False
    server.answer = first_time(lambda question: "西湖" + "适合拍照，" * 200)
    write_prompts(tmp_path, 2, types=["note"])
    ask(tmp_path, server)
    assert [(one["attempts"], one["repaired"]) for one in meta(tmp_path)] == [(2, True)] * 2
    assert all("适合拍照" not in str(question.body) for question in server.questions)


def test_a_loop_that_comes_again_is_put_aside_with_what_it_repeats(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.answer = lambda question: (
        "西湖" + "适合拍照，" * 900 if "第1园" in str(question.body) else right_answer(question)
    )
    write_prompts(tmp_path, 3, types=["note"])
    ask(tmp_path, server)
    (one,) = rejected(tmp_path)
    assert one["reason"].startswith("the answer repeats '")
    assert (one["finish_reason"], one["attempts"]) == ("repetition", 2)
    assert len(one["text"]) < 500


def test_what_the_server_gives_up_is_asked_for_with_another_seed(
    tmp_path: Path, server: OllamaServer
) -> None:
    """30 equal tokens, and the stream ends without `done`."""
    server.answer = first_time(lambda question: "西湖" + "于" * 90)
    write_prompts(tmp_path, 2, types=["note"])
    ask(tmp_path, server)
    assert [one["attempts"] for one in meta(tmp_path)] == [2, 2]
    assert server.tokens_written < 150


def test_thoughts_alone_are_said_with_what_stops_them(tmp_path: Path, server: OllamaServer) -> None:
    thought = {"message": {"role": "assistant", "content": "", "thinking": "想一想"}}
    server.fault = lambda question: Fault(change=lambda reply: {**reply, **thought})
    write_prompts(tmp_path, 1)
    with pytest.raises(UserError, match=r"the answer is empty: the model only thought .*enable_thinking"):
        ask(tmp_path, server, retries=0)


def test_prose_where_json_was_asked_for_is_stopped(tmp_path: Path, server: OllamaServer) -> None:
    server.answer = first_time(lambda question: LONG)
    write_prompts(tmp_path, 1, types=["card"])
    ask(tmp_path, server)
    assert server.tokens_written < 1200 < len(LONG)
    assert meta(tmp_path)[0]["repaired"]


def test_silence_is_timed_and_not_the_length_of_an_answer(tmp_path: Path, server: OllamaServer) -> None:
    server.token_s = 0.02
    write_prompts(tmp_path, 1, types=["card"])
    ask(tmp_path, server, timeout_s=0.2, first_token_timeout_s=0.2)
    assert meta(tmp_path)[0]["attempts"] == 1
    assert meta(tmp_path)[0]["seconds"] > 0.25


def test_a_stream_that_falls_silent_is_asked_for_again(tmp_path: Path, server: OllamaServer) -> None:
    def change(reply: dict[str, Any]) -> dict[str, Any]:
        server.token_s = 1.0
        return reply

    def fault(question: Question) -> Fault | None:
        server.token_s = 0.0
        return Fault(change=change) if question.times == 0 else None

    server.fault = fault
    write_prompts(tmp_path, 1, types=["note"])
    ran = ask(tmp_path, server, timeout_s=0.2)
    assert meta(tmp_path)[0]["attempts"] == 2
    log = next((tmp_path / "log").glob("teacher-*.log")).read_text(encoding="utf-8")
    assert "no token for 0.2 s, after 1" in log
    assert ran.result.counts["kept"] == 1


def test_waiting_in_a_queue_is_no_silence(tmp_path: Path) -> None:
    with OllamaServer(right_answer, slots=1, token_s=0.02) as server:
        write_prompts(tmp_path, 3)
        ask(tmp_path, server, timeout_s=0.3, concurrency=6)
        assert {one["attempts"] for one in meta(tmp_path)} == {1}
        assert max(one["seconds"] for one in meta(tmp_path)) > 0.6


def test_a_deadline_holds_for_the_whole_answer(tmp_path: Path, server: OllamaServer) -> None:
    server.token_s = 0.05
    write_prompts(tmp_path, 1, types=["note"])
    with pytest.raises(UserError, match=r"no whole answer within 0\.2 s"):
        ask(tmp_path, server, deadline_s=0.2, retries=0)


def test_how_many_a_server_writes_at_once_is_found_out_and_said(tmp_path: Path) -> None:
    with OllamaServer(right_answer, slots=1, token_s=0.004) as server:
        write_prompts(tmp_path, 10)
        ran = ask(tmp_path, server, concurrency=4)
    (said,) = ran.warnings
    assert (
        "writes 1 answer at a time, and 4 are asked for at once: start it with OLLAMA_NUM_PARALLEL=4" in said
    )
    assert "--concurrency 1" in said


def test_of_a_server_that_writes_all_at_once_nothing_is_said(tmp_path: Path, server: OllamaServer) -> None:
    server.token_s = 0.004
    write_prompts(tmp_path, 10)
    assert ask(tmp_path, server, concurrency=4).warnings == []


# --- limits that are learned -----------------------------------------------------------------------


def test_the_limit_of_a_type_is_learned_from_what_was_kept(
    tmp_path: Path, server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lengths, "FLOOR", 30)
    monkeypatch.setattr(lengths, "LEARNED_FROM", 5)
    write_prompts(tmp_path, 12, types=["note"])
    long = LONG[:150] + "。"
    server.answer = lambda question: long if "第9园" in question.text else right_answer(question)
    ask(tmp_path, server, concurrency=1, max_tokens=500)
    limits = [question.body["options"]["num_predict"] for question in server.questions]
    assert limits[:5] == [500] * 5
    assert limits[5] == 30
    again = [place for place, question in enumerate(server.questions) if "第9园" in question.text]
    assert [limits[place] for place in again] == [30, 500], (
        "cut by the learned limit, then asked with the whole"
    )
    rows = {row["meta"]["spot"]: row for row in read_rows(tmp_path / "data" / "teacher.jsonl")}
    assert rows["第9园"]["messages"][-1]["content"] == long
    assert not rows["第9园"]["meta"]["teacher"]["repaired"]
    assert max(limits[again[1] + 1 :], default=0) > 200, "and what it took is learned too"


def test_a_limit_that_cuts_every_row_stops_the_run_with_the_setting(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.answer = lambda question: LONG
    write_prompts(tmp_path, 40, types=["note"])
    with pytest.raises(
        UserError, match=r"the first 5 rows failed for one setting: the answer was cut at 60"
    ) as caught:
        ask(tmp_path, server, max_tokens=60, concurrency=2)
    assert caught.value.hint == "allow more with --max-tokens 120"
    assert len(server.questions) <= 14
    assert not list((tmp_path / "data").glob("teacher*"))


def test_a_context_that_holds_no_row_of_a_type_stops_the_run_too(
    tmp_path: Path, server: OllamaServer
) -> None:
    rows = prompt_rows(30)
    for row in rows:
        if row["meta"]["type"] == "card":
            row["messages"][0]["content"] += "园" * 1500
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)
    with pytest.raises(
        UserError, match=r"the first 5 rows of the type card failed for one setting"
    ) as caught:
        ask(tmp_path, server, num_ctx=768, concurrency=2)
    assert "--num-ctx" in (caught.value.hint or "")
    assert {row["meta"]["type"] for row in read_rows(tmp_path / "data" / "teacher.jsonl")} == {"note"}
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()


def test_a_context_is_rounded_up_before_it_is_held_against_an_answer(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_prompts(tmp_path, 1, types=["note"])
    server.fault = lambda question: Fault(
        change=lambda reply: {**reply, "prompt_eval_count": 400, "eval_count": 300}
    )
    ask(tmp_path, server, num_ctx=640)
    assert meta(tmp_path)[0]["output_tokens"] == 300


def test_contracts_of_a_card_go_to_the_server_with_their_bounds(tmp_path: Path, server: OllamaServer) -> None:
    from mtgdm.contracts import schema_of

    write_prompts(tmp_path, 3, types=["card"])
    said = {
        "error": json.dumps({"error": {"message": "Failed to initialize samplers: failed to parse grammar"}})
    }

    def fault(question: Question) -> Fault | None:
        return Fault(400, said) if "maxLength" in json.dumps(question.body.get("format")) else None

    server.fault = fault
    ran = ask(tmp_path, server, concurrency=1)
    assert [question.body["format"] for question in server.questions] == [
        schema_of(Card),
        *[schema_of(Card, bounded=False)] * 3,
    ]
    assert any("is asked without bounds in the schema: Failed to initialize" in one for one in ran.warnings)
    assert ran.manifests[0].counts["adjusted"] == {server.url: ["without bounds in the schema"]}
    assert {one["adjusted"] for one in meta(tmp_path)} == {"without bounds in the schema"}
