"""The ollama teacher against a server that speaks Ollama's API: what is sent, what is noticed, what is kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtgdm.contracts import schema_of
from mtgdm.errors import SettingError, UserError
from mtgdm.rows import Row
from mtgdm.teachers import loop
from mtgdm.teachers.ollama import Ollama
from mtgdm.teachers.seam import Options, Retryable, TeacherSettings
from mtgdm.teachers.server import server_url
from mtgdm.testing import StageRun
from tests import teacher_domain
from tests.conftest import CommandLine, read_rows, write_lines
from tests.ollama_server import Fault, OllamaServer, Question
from tests.teacher_domain import Card, Gardens, prompt_rows, right_answer, run_teacher, write_prompts


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)
    monkeypatch.setattr(loop, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer) as running:
        yield running


def ask(workspace: Path, server: OllamaServer, **settings: Any) -> StageRun:
    return run_teacher(
        workspace, **{"backend": "ollama", "url": server.url, "model": "teacher:7b", **settings}
    )


def kept(workspace: Path) -> list[dict[str, Any]]:
    return read_rows(workspace / "data" / "teacher.jsonl")


def rejected(workspace: Path) -> list[dict[str, Any]]:
    return read_rows(workspace / "data" / "teacher.rejected.jsonl")


def reasons(workspace: Path) -> list[str]:
    return [row["rejected"]["reason"] for row in rejected(workspace)]


def once(fault: Fault) -> Callable[[Question], Fault | None]:
    """The fault at the first try of every prompt."""
    return lambda question: fault if question.times == 0 else None


def always(fault: Fault, *, garden: str) -> Callable[[Question], Fault | None]:
    """The fault for one garden, however often it is asked."""
    return lambda question: fault if any(garden in m["content"] for m in question.body["messages"]) else None


# --- what is sent and what is kept ---------------------------------------------------------------


def test_every_answer_is_kept_with_what_it_took(tmp_path: Path, server: OllamaServer) -> None:
    prompts = write_prompts(tmp_path, 6)

    ran = ask(tmp_path, server)

    rows = kept(tmp_path)
    assert [row["id"] for row in rows] == [row["id"] for row in prompts]
    teacher = rows[0]["meta"]["teacher"]
    assert teacher["finish_reason"] == "stop"
    assert teacher["prompt_tokens"] > 10
    assert teacher["output_tokens"] > 10
    assert teacher["seconds"] > 0
    assert ran.result.summary == "12 asked = 12 kept + 0 rejected · ollama teacher:7b"
    assert sorted(server.asked) == sorted(row["messages"][-1]["content"] for row in prompts)


def test_nothing_is_left_to_the_servers_defaults(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 1)

    ask(tmp_path, server, temperature=0.1, top_p=0.5, seed=7, max_tokens=500)

    card, note = sorted(
        (question.body for question in server.questions), key=lambda body: "format" not in body
    )
    assert card["format"] == schema_of(Card)
    assert "format" not in note
    assert (card["stream"], card["think"], card["truncate"], card["shift"]) == (True, False, False, False)
    assert card["keep_alive"] == "30m"
    options = card["options"]
    assert options.pop("num_ctx") == 2048  # a short prompt, two answers of 500 tokens, rounded up
    assert options == {"num_predict": 500, "num_gpu": 999, "temperature": 0.1, "top_p": 0.5, "seed": 7}


def test_the_context_is_sized_from_the_longest_prompt_that_is_asked(
    tmp_path: Path, server: OllamaServer
) -> None:
    rows = prompt_rows(2, types=["note"])
    rows[1]["messages"][-1]["content"] += "园" * 9000
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    ask(tmp_path, server, limit=1)
    ask(tmp_path, server)

    first, second = (question.body["options"]["num_ctx"] for question in server.questions)
    assert first < 9000 < second < 18000


def test_a_context_given_by_hand_is_used(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 1)

    ask(tmp_path, server, num_ctx=5000, ollama_num_gpu=0)

    assert server.questions[0].body["options"]["num_ctx"] == 5000
    assert server.questions[0].body["options"]["num_gpu"] == 0


def test_so_many_questions_are_in_flight_as_were_allowed(tmp_path: Path, server: OllamaServer) -> None:
    server.latency_s = 0.05
    write_prompts(tmp_path, 10)

    ask(tmp_path, server, concurrency=5)

    assert server.most_in_flight == 5


def test_thoughts_and_fences_are_taken_off(tmp_path: Path, server: OllamaServer) -> None:
    server.answer = lambda question: (
        f"<think>\n想一想{{}}\n</think>\n\n```json\n{right_answer(question)}\n```"
        if "format" in question.body
        else f"<think>嗯</think>{right_answer(question)}"
    )
    write_prompts(tmp_path, 1)

    ask(tmp_path, server)

    answers = [row["messages"][-1]["content"] for row in kept(tmp_path)]
    assert answers == ['{"name":"第0园","year":1100}', "第0园建于1100年。"]


def test_a_model_that_knows_no_think_key_is_asked_without(tmp_path: Path, server: OllamaServer) -> None:
    server.knows_think = False
    write_prompts(tmp_path, 3)

    ask(tmp_path, server, concurrency=1)

    assert len(kept(tmp_path)) == 6
    assert ["think" in question.body for question in server.questions] == [True] + [False] * 6


def test_questions_in_flight_when_the_think_key_is_first_refused_are_asked_without_too(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.knows_think = False
    server.latency_s = 0.05
    write_prompts(tmp_path, 3)

    ask(tmp_path, server, concurrency=6)

    assert len(kept(tmp_path)) == 6
    assert {row["meta"]["teacher"]["attempts"] for row in kept(tmp_path)} == {1}
    assert sum("think" in question.body for question in server.questions) == 6


@pytest.mark.parametrize("given", ["localhost:11434", "http://localhost:11434/", "http://localhost:11434/v1"])
def test_an_address_may_be_written_as_people_write_it(given: str) -> None:
    assert server_url(given, Ollama.paths) == "http://localhost:11434"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "http://",
        "ftp://localhost",
        "http://local host:x",
        "http://two..dots",
        f"http://{64 * 'a'}.example",
        "localhost:65537",
        "localhost:0",
        "localhost:-1",
    ],
)
def test_what_is_no_address_is_a_wrong_setting(given: str) -> None:
    with pytest.raises(SettingError, match="no address of a server"):
        server_url(given, Ollama.paths)


# --- a teacher that cannot be asked --------------------------------------------------------------


def test_a_server_that_is_down_is_said_at_once(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)

    with pytest.raises(UserError, match=r"no Ollama server answers at http://127\.0\.0\.1:9") as error:
        run_teacher(tmp_path, backend="ollama", model="teacher:7b", url="127.0.0.1:9")

    assert "ollama serve" in (error.value.hint or "")
    assert not list((tmp_path / "data").glob("teacher*"))


def test_a_model_that_is_not_pulled_comes_with_the_command(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 3)

    with pytest.raises(UserError, match=r"the model 'qwen2\.5:32b' is not pulled") as error:
        ask(tmp_path, server, model="qwen2.5:32b")

    assert error.value.hint == "ollama pull qwen2.5:32b"
    assert server.questions == []
    assert not list((tmp_path / "data").glob("teacher*"))


def test_a_server_that_knows_only_the_chat_is_asked_all_the_same(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.busy_shows = 100
    write_prompts(tmp_path, 2)

    assert ask(tmp_path, server).result.counts["kept"] == 4


def test_a_check_that_finds_the_queue_full_says_that_the_server_is_busy(server: OllamaServer) -> None:
    server.busy_shows = 1
    settings = TeacherSettings(backend="ollama", model="teacher:7b", url=[server.url])

    async def check() -> None:
        async with Ollama(settings, Gardens()) as backend:
            with pytest.raises(Retryable, match="server busy") as caught:
                await backend.check()
            assert caught.value.overloaded
            await backend.check()

    asyncio.run(check())


@pytest.mark.parametrize(("status", "overloaded"), [(429, True), (503, True), (500, False), (502, False)])
def test_a_server_that_has_too_much_to_do_is_told_from_one_that_fails(
    server: OllamaServer, status: int, overloaded: bool
) -> None:
    server.fault = lambda question: Fault(status)
    settings = TeacherSettings(backend="ollama", model="teacher:7b", url=[server.url])
    (row,) = prompt_rows(1, types=["note"])
    options = Options(0.3, 0.9, 42, 500, Row(row["id"], row["messages"], row["meta"], Path("rows.jsonl"), 1))

    async def answer() -> None:
        async with Ollama(settings, Gardens()) as backend:
            with pytest.raises(Retryable) as caught:
                await backend.answer(row["messages"], None, options)
        assert (caught.value.overloaded, caught.value.lost) == (overloaded, False)

    asyncio.run(answer())


def test_a_name_and_a_password_in_the_address_are_used_and_not_shown(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_prompts(tmp_path, 1)
    with pytest.raises(UserError, match=r"no Ollama server answers at http://127\.0\.0\.1:9$"):
        ask(tmp_path, server, url="http://name:secret@127.0.0.1:9")

    there = server.url.replace("//", "//name:secret@")
    run = ask(tmp_path, server, url=["http://name:secret@127.0.0.1:9", there])

    assert len(kept(tmp_path)) == 2
    assert run.warnings[0].startswith("http://127.0.0.1:9 is left aside for a while")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".log", ".json", ".jsonl"} <= {path.suffix for path in written}
    assert [path for path in written if b"secret" in path.read_bytes()] == []


def test_a_server_that_sends_questions_elsewhere_is_said_with_where(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.fault = lambda question: Fault(302, b"", {"Location": "https://login.example/"})
    write_prompts(tmp_path, 1)

    with pytest.raises(UserError, match=r"sends questions on to https://login\.example/"):
        ask(tmp_path, server)


def test_no_model_is_a_wrong_setting(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 1)

    with pytest.raises(SettingError, match="needs a model"):
        run_teacher(tmp_path, backend="ollama", url=server.url)


def test_a_server_that_is_no_ollama_is_said(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 1)

    with pytest.raises(UserError, match=r"HTTP 404.*404 page not found"):
        ask(tmp_path, server, url=f"{server.url}/elsewhere")


def test_a_model_that_is_removed_meanwhile_stops_the_run_and_keeps_what_is_there(
    tmp_path: Path, server: OllamaServer
) -> None:
    def fault(question: Question) -> Fault | None:
        return Fault(404, {"error": "model 'teacher:7b' not found"}) if question.number >= 4 else None

    server.fault = fault
    write_prompts(tmp_path, 10)

    with pytest.raises(UserError, match="not pulled"):
        ask(tmp_path, server, concurrency=1)

    assert len(kept(tmp_path)) == 4
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()


def test_the_same_failure_on_the_first_rows_stops_the_run_and_leaves_nothing(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.fault = lambda question: Fault(500, {"error": "model requires more system memory"})
    write_prompts(tmp_path, 100)

    with pytest.raises(UserError, match=r"5 rows failed in the same way.*more system memory"):
        ask(tmp_path, server, retries=1)

    assert len(server.questions) < 20
    assert not list((tmp_path / "data").glob("teacher*"))


def test_a_teacher_that_begins_to_refuse_every_row_stops_the_run(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.fault = lambda question: (
        Fault(400, {"error": "num_predict is too large"}) if question.number > 9 else None
    )
    write_prompts(tmp_path, 100)

    with pytest.raises(UserError, match=r"20 rows failed in the same way since the last answer.*num_predict"):
        ask(tmp_path, server, concurrency=1)  # else a late answer may come between the refusals

    assert len(server.questions) == 30
    assert [path.name for path in (tmp_path / "data").glob("teacher*")] == ["teacher.jsonl"]
    assert len(read_rows(tmp_path / "data" / "teacher.jsonl")) == 10


def test_a_server_that_dies_in_the_middle_rejects_no_row(tmp_path: Path, server: OllamaServer) -> None:
    server.fault = lambda question: Fault(drop=True) if question.number >= 20 else None
    prompts = write_prompts(tmp_path, 50)
    with pytest.raises(UserError, match="5 rows failed in the same way since the last answer"):
        ask(tmp_path, server, retries=1)
    assert 15 <= len(kept(tmp_path)) <= 20  # the last ones may still be on the way when it stops
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()

    server.fault = lambda question: None
    ask(tmp_path, server)

    assert [row["id"] for row in kept(tmp_path)] == [row["id"] for row in prompts]


def test_the_command_line_says_both_in_one_line_and_ends_with_1(
    mtgdm: CommandLine, tmp_path: Path, server: OllamaServer
) -> None:
    write_prompts(tmp_path, 1)
    command = ("teacher", "--backend", "ollama", "--model", "absent")

    missing = mtgdm(*command, "--url", server.url)
    down = mtgdm(*command, "--url", "127.0.0.1:9")

    assert (missing.code, down.code) == (1, 1)
    assert "error: the model 'absent' is not pulled\nhint: ollama pull absent\n" in missing.err
    assert "error: no Ollama server answers at http://127.0.0.1:9\nhint: " in down.err
    assert mtgdm("teacher", "--temperature", "9").code == 2


# --- failures that pass --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, {"error": "model runner has unexpectedly stopped"}),
        Fault(502, b"<html>bad gateway</html>"),
        Fault(503, {"error": "server busy, please try again.  maximum pending requests exceeded"}),
        Fault(429, {"error": "slow down"}, {"Retry-After": "0.05"}),
        Fault(drop=True),
        Fault(half=True),
        Fault(body=b"<html>a proxy says hello</html>", headers={"Content-Type": "text/html"}),
        Fault(body=b'{"message": {"content": "\xe5\x9b'),
        Fault(body=b"[]"),
        Fault(body={"error": "something broke on the way"}),
        Fault(body={"model": "m"}),
        Fault(change=lambda reply: {**reply, "done": False}),
        Fault(change=lambda reply: {**reply, "message": {"role": "assistant", "content": " "}}),
        Fault(hang_s=1.0),
    ],
    ids=[
        "500", "502 with HTML", "503", "429", "dropped", "half a body", "HTML", "invalid UTF-8", "a list",
        "error under 200", "no message", "not done", "empty", "hangs",
    ],
)  # fmt: skip
def test_a_failure_that_passes_costs_a_second_try_and_no_row(
    tmp_path: Path, server: OllamaServer, fault: Fault
) -> None:
    server.fault = once(fault)
    write_prompts(tmp_path, 2)

    ask(tmp_path, server, timeout_s=0.5, first_token_timeout_s=0.5)

    rows = kept(tmp_path)
    assert len(rows) == 4
    assert {row["meta"]["teacher"]["attempts"] for row in rows} == {2}
    assert len(server.questions) == 8


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (
            Fault(body=b"<html><title>Sign in</title><p>...", headers={"Content-Type": "text/html"}),
            "the reply is not JSON but a web page (Sign in): a proxy or a login page answers",
        ),
        (Fault(body=b"\n <p>Wait&hellip;</p>"), "the reply is not JSON but a web page (Wait&hellip;): "),
        (Fault(502, b"<html><h1>Bad gateway</h1><style>h1 {}</style>"), "HTTP 502: Bad gateway"),
        (
            Fault(
                400, {"error": '{"error":{"code":400,"message":"request (9 tokens) exceeds the context"}}'}
            ),
            "HTTP 400: request (9 tokens) exceeds the context",
        ),
        (Fault(400, {"error": '{"not": "JSON'}), 'HTTP 400: {"not": "JSON'),
        (Fault(body=b'{"message": {"content": "\xe5\x9b'), "the reply is not JSON but {"),
        (Fault(drop=True), "the connection was closed before the reply was whole"),
    ],
)
def test_the_reason_is_in_the_servers_own_words(
    tmp_path: Path, server: OllamaServer, fault: Fault, reason: str
) -> None:
    server.fault = always(fault, garden="第1园")
    write_prompts(tmp_path, 3, types=["note"])

    ask(tmp_path, server, retries=1, concurrency=1)

    (said,) = reasons(tmp_path)
    assert said.startswith(reason)


def test_retry_after_is_honoured(tmp_path: Path, server: OllamaServer) -> None:
    server.fault = once(Fault(429, {"error": "slow down"}, {"Retry-After": "0.4"}))
    write_prompts(tmp_path, 1)
    started = time.monotonic()

    ask(tmp_path, server)

    assert time.monotonic() - started >= 0.4


def test_an_empty_answer_is_asked_for_with_another_seed(tmp_path: Path, server: OllamaServer) -> None:
    server.fault = once(
        Fault(change=lambda reply: {**reply, "message": {"role": "assistant", "content": ""}})
    )
    write_prompts(tmp_path, 1, types=["note"])

    ask(tmp_path, server, seed=5)

    assert [question.body["options"]["seed"] for question in server.questions] == [5, 6]


def test_a_lost_connection_is_tried_again_with_the_same_seed(tmp_path: Path, server: OllamaServer) -> None:
    server.fault = once(Fault(drop=True))
    write_prompts(tmp_path, 1, types=["note"])

    ask(tmp_path, server, seed=5)

    assert [question.body["options"]["seed"] for question in server.questions] == [5, 5]


def test_one_prompt_that_always_fails_is_put_aside_alone(tmp_path: Path, server: OllamaServer) -> None:
    server.fault = always(Fault(500), garden="第1园")
    write_prompts(tmp_path, 5, types=["note"])

    ran = ask(tmp_path, server, retries=2)

    assert (ran.result.counts["kept"], ran.result.counts["rejected"]) == (4, 1)
    assert reasons(tmp_path) == ["HTTP 500: boom"]
    assert rejected(tmp_path)[0]["rejected"]["attempts"] == 3


def test_a_question_the_server_refuses_is_asked_once(tmp_path: Path, server: OllamaServer) -> None:
    server.fault = always(Fault(400, {"error": "bad words"}), garden="第1园")
    write_prompts(tmp_path, 5, types=["note"])

    ask(tmp_path, server)

    assert reasons(tmp_path) == ["HTTP 400: bad words"]
    assert len(server.questions) == 5


# --- answers that are not what was asked for ------------------------------------------------------


def test_an_invalid_answer_is_repaired_in_a_second_turn(tmp_path: Path, server: OllamaServer) -> None:
    def answer(question: Question) -> str:
        right = right_answer(question)
        return right if len(question.body["messages"]) > 2 else right.replace('"year":1100', '"year":"1100"')

    server.answer = answer
    write_prompts(tmp_path, 1, types=["card"])

    ask(tmp_path, server)

    (row,) = kept(tmp_path)
    assert row["messages"][-1]["content"] == '{"name":"第0园","year":1100}'
    assert len(row["messages"]) == 3
    assert (row["meta"]["teacher"]["attempts"], row["meta"]["teacher"]["repaired"]) == (2, True)
    shown, said = server.questions[1].body["messages"][2:]
    assert shown == {"role": "assistant", "content": '{"name":"第0园","year":"1100"}'}
    assert "year: Input should be a valid integer" in said["content"]


def test_an_answer_that_stays_invalid_is_put_aside(tmp_path: Path, server: OllamaServer) -> None:
    server.answer = lambda question: "{" if "第1园" in str(question.body) else right_answer(question)
    write_prompts(tmp_path, 3, types=["card"])

    ran = ask(tmp_path, server)

    (row,) = rejected(tmp_path)
    assert row["rejected"]["reason"].startswith("not JSON")
    assert row["rejected"]["text"] == "{"
    assert row["rejected"]["attempts"] == 2
    assert any(line.startswith("rejected 1 × not JSON") for line in ran.printed)


def test_a_cut_answer_is_asked_for_again_shorter_and_never_kept(tmp_path: Path, server: OllamaServer) -> None:
    long = "".join(f"第{number}段。" for number in range(300))

    def answer(question: Question) -> str:
        if "第1园" in question.text:
            return long
        return right_answer(question) if "be brief" in question.text else long

    server.answer = answer
    write_prompts(tmp_path, 2, types=["note"])

    ask(tmp_path, server, max_tokens=50)

    assert [row["messages"][-1]["content"] for row in kept(tmp_path)] == ["第0园建于1100年。"]
    assert reasons(tmp_path) == ["the answer was cut at 50 tokens"]
    assert rejected(tmp_path)[0]["rejected"]["finish_reason"] == "length"
    assert all(len(question.body["messages"]) == 2 for question in server.questions)


def test_a_prompt_that_does_not_fit_is_refused_by_the_server_not_cut(
    tmp_path: Path, server: OllamaServer
) -> None:
    rows = prompt_rows(2, types=["note"])
    rows[1]["messages"][0]["content"] += "园" * 3000
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    ask(tmp_path, server, num_ctx=1024)

    assert len(kept(tmp_path)) == 1
    assert "exceeds the available context size (1024 tokens)" in reasons(tmp_path)[0]


def test_a_prompt_cut_by_an_old_server_is_noticed(tmp_path: Path, server: OllamaServer) -> None:
    server.cuts_prompts = True
    rows = prompt_rows(2, types=["note"])
    rows[1]["messages"][0]["content"] += "园" * 3000
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    ask(tmp_path, server, num_ctx=1024)

    assert len(kept(tmp_path)) == 1
    assert reasons(tmp_path)[0].startswith("the prompt was cut: the server saw 512 tokens of at least 1")


def test_a_prompt_cut_to_a_half_is_noticed_by_what_the_others_take(
    tmp_path: Path, server: OllamaServer
) -> None:
    server.cuts_prompts = True
    rows = prompt_rows(31, types=["note"])
    rows[30]["messages"][0]["content"] += "园" * 1450
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    ask(tmp_path, server, num_ctx=1024, concurrency=1)

    assert len(kept(tmp_path)) == 30
    assert reasons(tmp_path)[0].startswith("the prompt was cut: the server saw 512 tokens of at least ")


def test_faults_of_every_kind_leave_each_row_kept_or_rejected_and_none_wrong(
    tmp_path: Path, server: OllamaServer
) -> None:
    kinds = [
        Fault(500),
        Fault(drop=True),
        Fault(429, {"error": "slow"}, {"Retry-After": "0.01"}),
        Fault(half=True),
        Fault(change=lambda reply: {**reply, "message": {"role": "assistant", "content": ""}}),
        Fault(change=lambda reply: {**reply, "done_reason": "length"}),
        Fault(change=lambda reply: {**reply, "message": {"role": "assistant", "content": "{"}}),
    ]
    server.fault = lambda question: kinds[question.number // 5 % 7] if question.number % 5 == 0 else None
    prompts = write_prompts(tmp_path, 100)

    ran = ask(tmp_path, server, concurrency=8)

    counts = ran.result.counts
    assert counts["asked"] == counts["kept"] + counts["rejected"] == 200
    assert counts["kept"] >= 190
    right = {row["id"]: right_answer(Question({"messages": row["messages"]}, 0, 0)) for row in prompts}
    assert all(row["messages"][-1]["content"] == right[row["id"]] for row in kept(tmp_path))
