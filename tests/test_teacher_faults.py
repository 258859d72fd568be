"""What a user meets who runs the teacher for a week: bad files, servers that only fail, disks that fill up.

Each time: one line with the place, the exit code of the contract, nothing finished lost, nothing half-written.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from mtgdm import pipeline
from mtgdm.errors import BadRow, UserError
from mtgdm.stage import Context
from mtgdm.teachers import loop
from tests import teacher_domain
from tests.conftest import CommandLine, Ran, clean_environment, read_rows, write_lines
from tests.ollama_server import Fault, OllamaServer
from tests.teacher_domain import prompt_rows, right_answer, run_teacher, write_prompts

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs a device that is full")
posix = pytest.mark.skipif(os.name == "nt", reason="needs signals, pipes or limits of POSIX")


@pytest.fixture
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)
    monkeypatch.setattr(loop, "FIRST_PAUSE_S", 0.001)


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer) as running:
        yield running


@pytest.fixture
def echo() -> Iterator[OllamaServer]:
    """Answers questions of no type, which any domain takes."""
    with OllamaServer(lambda question: f"{question.text}。") as running:
        yield running


def question(number: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": f"第{number}问"}]}


def write_questions(workspace: Path, count: int) -> Path:
    return write_lines(workspace / "data" / "prompts.jsonl", *map(question, range(count)))


def asking(server: OllamaServer, *more: str) -> list[str]:
    return ["teacher", "--backend", "ollama", "--model", "teacher:7b", "--url", server.url, *more]


def answers(workspace: Path) -> list[str]:
    return [row["messages"][-1]["content"] for row in read_rows(workspace / "data" / "teacher.jsonl")]


def right_answers(count: int) -> list[str]:
    return [f"第{number}问。" for number in range(count)]


def left(workspace: Path) -> list[str]:
    """What a run left in the folder of its output, locks and half-made files too."""
    names = (path.name for path in (workspace / "data").iterdir())
    return sorted(name for name in names if not name.startswith("prompts"))


def only_line(ran: Ran) -> str:
    """The error, after making sure that it is all that was said beside its hint."""
    first, *rest = ran.err.splitlines()
    assert first.startswith("error: "), ran.err
    assert all(line.startswith("hint: ") for line in rest), ran.err
    return first.removeprefix("error: ")


def ask(workspace: Path, server: OllamaServer, **settings: Any) -> Any:
    given = {"backend": "ollama", "url": server.url, "model": "teacher:7b", **settings}
    return run_teacher(workspace, **given)


# --- prompts that are none -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"messages": [{"role": "user", "con', "not JSON"),
        (json.dumps(question(9), ensure_ascii=False).encode("gbk"), "not UTF-8 (byte "),
        (b"\0" * 512, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "a number of more digits than Python reads"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "not a JSON object but an array"),
        (b'{"messages": []}', "`messages` is empty"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "message 1 has the role `tool`"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "the `content` of message 1 holds a part"),
        (b'{"messages": [{"role": "system", "content": "x"}]}', "`messages` holds no user turn"),
        (b'{"messages": [{"role": "user", "content": "x"}], "meta": 5}', "`meta` is no object but a number"),
    ],
    ids=[
        "torn", "GBK", "zeros", "digits", "depth", "a list", "no messages", "role", "content", "no user", "meta",
    ],
)  # fmt: skip
def test_a_bad_prompt_is_named_by_its_line_before_anything_is_asked(
    tmp_path: Path, gardens: None, server: OllamaServer, line: bytes, reason: str
) -> None:
    write_prompts(tmp_path, 2)
    with (tmp_path / "data" / "prompts.jsonl").open("ab") as file:
        file.write(line + b"\n")

    with pytest.raises(BadRow) as error:
        ask(tmp_path, server)

    assert reason in error.value.message
    assert error.value.where == f"{tmp_path / 'data' / 'prompts.jsonl'}:5"
    assert not server.questions
    assert left(tmp_path) == []


@posix
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.write_text("\n \r\n\n"), "there is no prompt in this file"),
        (lambda path: path.mkdir(), "this is a folder, not a file"),
        (lambda path: os.mkfifo(path), "a pipe or a device cannot be read twice"),
        (lambda path: write_lines(path, question(0), "{"), "prompts.jsonl:2: not JSON"),
    ],
    ids=["missing", "blank", "folder", "pipe", "torn"],
)
def test_what_holds_no_prompts_is_one_line_and_exit_code_1(
    mtgdm: CommandLine, tmp_path: Path, echo: OllamaServer, make: Callable[[Path], Any], reason: str
) -> None:
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / "prompts.jsonl")

    ran = mtgdm(*asking(echo))

    assert ran.code == 1
    assert reason in only_line(ran)
    assert str(tmp_path / "data" / "prompts.jsonl") in ran.err
    assert not echo.questions
    assert left(tmp_path) == []


def test_a_type_that_is_no_text_is_none(tmp_path: Path, gardens: None, server: OllamaServer) -> None:
    server.answer = lambda question: "好。"
    rows = [{**question(number), "meta": {"type": kind}} for number, kind in enumerate([7, ["card"], None])]
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    assert ask(tmp_path, server).result.counts["kept"] == 3


# --- a server that only fails --------------------------------------------------------------------


def changed(**more: Any) -> Fault:
    return Fault(change=lambda reply: {**reply, **more})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(500), "HTTP 500: boom"),
        (Fault(503), "HTTP 503: boom"),
        (Fault(429, headers={"Retry-After": "0.01"}), "HTTP 429: boom"),
        (Fault(429, headers={"Retry-After": format_datetime(datetime.now(UTC))}), "HTTP 429: boom"),
        (Fault(429, headers={"Retry-After": "soon"}), "HTTP 429: boom"),
        (Fault(drop=True), "the connection was closed before the reply was whole"),
        (Fault(half=True), "the connection was closed before the reply was whole"),
        (Fault(hang_s=0.3), "no answer within 0.05 s"),
        (Fault(body=b'{"message": {"content": "\xff"}}'), "the reply is not JSON"),
        (Fault(body=b"<html><title>Login</title>"), "a web page (Login)"),
        (Fault(body={"error": "out of memory"}), "the server says: out of memory"),
        (Fault(body=b"[" * 100_000), "the reply is not JSON"),
        (changed(message={"role": "assistant", "content": ""}), "the answer is empty"),
        (changed(done=None), "the answer broke off"),
        (Fault(400), "HTTP 400: boom"),
    ],
    ids=[
        "500", "503", "429", "429 with a date", "429 soon", "drops", "half", "hangs", "UTF-8", "HTML", "error",
        "depth", "empty", "not done", "400",
    ],
)  # fmt: skip
def test_a_server_that_only_fails_is_said_with_its_reason_and_rejects_no_row(
    tmp_path: Path, gardens: None, server: OllamaServer, fault: Fault, reason: str
) -> None:
    server.fault = lambda question: fault
    write_prompts(tmp_path, 20)

    with pytest.raises(UserError, match="rows failed in the same way and none was answered") as error:
        limit_s = 0.05 if fault.hang_s else 600.0
        ask(tmp_path, server, timeout_s=limit_s, first_token_timeout_s=limit_s)

    assert reason in error.value.message
    assert error.value.hint
    assert left(tmp_path) == []


@pytest.mark.parametrize("reason", ["length", "load"])
def test_answers_that_did_not_end_of_themselves_are_all_put_aside(
    mtgdm: CommandLine, tmp_path: Path, echo: OllamaServer, reason: str
) -> None:
    echo.fault = lambda question: changed(done_reason=reason)
    write_questions(tmp_path, 6)

    ran = mtgdm(*asking(echo))

    assert ran.code == 1
    assert "error: no answer was kept: 6 asked = 0 kept + 6 rejected" in ran.err
    assert "Traceback" not in ran.err
    assert left(tmp_path) == ["teacher.rejected.jsonl"]
    assert [row["messages"] for row in read_rows(tmp_path / "data" / "teacher.rejected.jsonl")] == [
        question(number)["messages"] for number in range(6)
    ]


# --- disks ---------------------------------------------------------------------------------------


@posix
def test_a_file_that_may_not_grow_keeps_its_rows_and_the_next_run_goes_on(
    mtgdm: CommandLine, tmp_path: Path, echo: OllamaServer
) -> None:
    """The limit cuts a row in two, as a full disk does."""
    write_questions(tmp_path, 200)
    words = " ".join([sys.executable, "-m", "mtgdm", *asking(echo)])
    limited = ["sh", "-c", f"ulimit -f 64; exec {words}"]  # of 512 bytes, or of 1,024 in bash

    ended = subprocess.run(
        limited, cwd=tmp_path, env=clean_environment(), capture_output=True, encoding="utf-8", check=False
    )

    out = tmp_path / "data" / "teacher.jsonl"
    assert ended.returncode == 1
    assert f"error: {out}: the row cannot be written: File too large" in ended.stderr
    assert "Traceback" not in ended.stderr
    *whole, torn = out.read_bytes().split(b"\n")
    assert torn
    assert len(whole) > 50
    asked = len(echo.questions)
    assert mtgdm(*asking(echo)).code == 0
    assert len(echo.questions) == asked + 200 - len(whole)
    assert answers(tmp_path) == right_answers(200)


@needs_full
@pytest.mark.parametrize("name", [".teacher.jsonl.tmp", ".teacher.jsonl.manifest.json.tmp"])
def test_a_disk_that_is_full_at_the_very_end_loses_nothing(
    tmp_path: Path, gardens: None, server: OllamaServer, name: str
) -> None:
    write_prompts(tmp_path, 5)
    ask(tmp_path, server)
    out = tmp_path / "data" / "teacher.jsonl"
    rows = read_rows(out)
    write_lines(out, *reversed(rows))
    (tmp_path / "data" / name).symlink_to(FULL)
    asked = len(server.questions)

    with pytest.raises(UserError, match="cannot be written: No space left on device") as error:
        ask(tmp_path, server)

    assert error.value.hint
    assert sorted(row["id"] for row in read_rows(out)) == sorted(row["id"] for row in rows)
    ask(tmp_path, server)
    assert read_rows(out) == rows
    assert len(server.questions) == asked


@needs_full
def test_a_log_that_cannot_be_written_is_warned_of_once_and_stops_no_run(
    tmp_path: Path, gardens: None, server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Context, "log_path", lambda self, suffix: FULL)
    write_prompts(tmp_path, 20)

    ran = ask(tmp_path, server)

    assert ran.result.counts["kept"] == 40
    assert ran.warnings == [f"{FULL}: the log cannot be written, the run goes on: No space left on device"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_said_before_anything_is_asked(
    tmp_path: Path, gardens: None, server: OllamaServer, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def acquired(path: Path) -> Any:
        if path.parent.name == "data":
            raise OSError(number, os.strerror(number), str(path))
        return original(path)

    original = pipeline._acquired
    monkeypatch.setattr(pipeline, "_acquired", acquired)
    write_prompts(tmp_path, 1)

    with pytest.raises(UserError, match="nothing may be written in this folder") as error:
        ask(tmp_path, server)

    assert error.value.where == str(tmp_path / "data")
    assert not server.questions


# --- what earlier runs left, damaged -------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"id": "0123456789abcdef01234567", "mess', "not JSON"),
        (b"\0" * 512, "not JSON"),
        (b"12", "not a JSON object but a number"),
        (json.dumps(prompt_rows(9)[-1]).encode(), "the row has no answer"),
    ],
    ids=["torn in the middle", "zeros", "a number", "a prompt"],
)
def test_a_damaged_answer_is_named_by_its_line_and_no_other_is_lost(
    tmp_path: Path, gardens: None, line: bytes, reason: str
) -> None:
    write_prompts(tmp_path, 9)
    run_teacher(tmp_path, limit=6)
    out = tmp_path / "data" / "teacher.jsonl"
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))

    for verify in (True, False):
        with pytest.raises(BadRow, match=reason) as error:
            run_teacher(tmp_path, resume_verify=verify)
        assert error.value.path == out
        assert set(lines) <= set(out.read_bytes().splitlines(keepends=True))


@pytest.mark.parametrize("line", ['{"id": "x', "12", '{"id": "0123456789abcdef01234567", "rejected": 5}'])
def test_a_damaged_line_among_the_rejected_rows_is_named(tmp_path: Path, gardens: None, line: str) -> None:
    write_prompts(tmp_path, 2)
    path = write_lines(tmp_path / "data" / "teacher.rejected.jsonl", line)

    with pytest.raises(BadRow) as error:
        run_teacher(tmp_path)

    assert error.value.where == f"{path}:1"


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("concurency: 3", "unknown key 'concurency' in the section 'teacher'"),
        ("url: []", "teacher.url = []"),
        ("url: ''", "teacher.url = []"),
        ("concurrency: 0", "teacher.concurrency = 0"),
        ("timeout_s: .nan", "teacher.timeout_s = nan"),
        ("retries: -1", "teacher.retries = -1"),
        ("limit: -1", "teacher.limit = -1"),
    ],
)
def test_a_wrong_setting_is_named_by_its_line_with_exit_code_2(
    mtgdm: CommandLine, tmp_path: Path, setting: str, reason: str
) -> None:
    (tmp_path / "mine.yaml").write_text(f"teacher:\n  backend: ollama\n  {setting}\n", encoding="utf-8")
    write_questions(tmp_path, 1)

    ran = mtgdm("teacher", "--profile", "mine.yaml")

    assert ran.code == 2
    assert only_line(ran).startswith(f"mine.yaml:3: {reason}")
    assert left(tmp_path) == []


def test_addresses_in_the_environment_share_the_work(
    mtgdm: CommandLine, tmp_path: Path, echo: OllamaServer
) -> None:
    write_questions(tmp_path, 3)
    command = ["teacher", "--backend", "ollama", "--model", "teacher:7b"]

    ran = mtgdm(*command, env={"MTGDM_TEACHER_URL": f"http://127.0.0.1:9,{echo.url}"})

    assert ran.code == 0
    assert ran.err.startswith("warning: http://127.0.0.1:9 is left aside for a while")
    assert answers(tmp_path) == right_answers(3)


# --- commands around a stage that is half done ---------------------------------------------------


@posix
def test_status_plan_and_all_know_what_a_killed_run_left(
    mtgdm: CommandLine, tmp_path: Path, echo: OllamaServer
) -> None:
    echo.fault = lambda question: Fault(hang_s=60) if question.number >= 12 else None
    write_questions(tmp_path, 60)
    (tmp_path / "mine.yaml").write_text(
        f"pipeline: [teacher]\nteacher: {{backend: ollama, model: 'teacher:7b', url: '{echo.url}'}}\n",
        encoding="utf-8",
    )
    mine = ("--profile", "mine.yaml")
    running = subprocess.Popen(
        [sys.executable, "-m", "mtgdm", "teacher", *mine],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    out = tmp_path / "data" / "teacher.jsonl"
    deadline = time.monotonic() + 30
    while not out.exists() or out.read_bytes().count(b"\n") < 12:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "another mtgdm run is at work" in only_line(mtgdm("teacher", *mine))
    running.send_signal(signal.SIGKILL)
    running.wait(30)
    echo.fault = lambda question: Fault(400) if "第33问" in question.text else None

    (stage,) = mtgdm("status", "--json", *mine).json
    assert (stage["state"], stage["why"]) == ("partial", "12 of 60")
    (stage,) = mtgdm("plan", "--json", *mine).json
    assert stage["to_ask"] == 48
    asked = len(echo.questions)
    (stage,) = mtgdm("plan", "--probe", "4", "--json", *mine).json
    assert stage["probe"] == stage["probe"] | {"asked": 4, "would_be_kept": 4}
    assert len(echo.questions) == asked + 4

    assert mtgdm("all", *mine).code == 0

    assert len(echo.questions) == asked + 4 + 48
    assert answers(tmp_path) == [one for one in right_answers(60) if one != "第33问。"]
    (stage,) = mtgdm("status", "--json", *mine).json
    assert stage["state"] == "done"
    assert stage["counts"] == stage["counts"] | {"asked": 60, "kept": 59, "rejected": 1}
