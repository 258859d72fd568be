"""The openai teacher against a server that is not ours: `transformers serve` with the tiny base.

What the server does beside answering (transformers 5.23): it takes `response_format` and ignores it, knows
its model by the very words it was started with, and lists no model that is not in the Hub's cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import UserError
from mtgdm.student.noise import quiet
from mtgdm.testing import StageRun
from tests import teacher_domain
from tests.conftest import CommandLine, clean_environment, read_rows, write_lines
from tests.teacher_domain import run_teacher, write_prompts

SERVING = ("fastapi", "uvicorn", "starlette", "openai")
MODEL = "./teacher"
START_S = 120
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(
        any(find_spec(module) is None for module in SERVING),
        reason='pip install "transformers[serving]" brings the server',
    ),
]


@dataclass
class Served:
    """A server that answers, and what it writes."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """`transformers serve` on a free port, ended whatever happens."""
    with quiet():
        from mtgdm.student import base

        shutil.copytree(base.locate(base.TINY, folder), folder / MODEL)
    (folder / "home" / "hub").mkdir(parents=True)
    log = folder / "server.log"
    flags = ["--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", "0"]
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    home["HF_HUB_DISABLE_UPDATE_CHECK"] = "1"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", "serve", MODEL, *flags],
            cwd=folder,
            env=os.environ | home,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        yield Served(address(process, log), log, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server listens, once it does: uvicorn says so."""
    deadline = time.monotonic() + START_S
    while True:
        said = log.read_text(encoding="utf-8", errors="replace")
        if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", said):
            return found[1]
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("served")) as running:
        yield running


def write_greetings(workspace: Path, count: int) -> list[str]:
    """Rows of another tool, without a contract, which the tiny base answers with an echo."""
    texts = [f"你好，第{number}号" for number in range(count)]
    rows = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    write_lines(workspace / "data" / "prompts.jsonl", *rows)
    return texts


def ask(workspace: Path, server: Served, **settings: Any) -> StageRun:
    return run_teacher(workspace, **{"backend": "openai", "url": server.url, "model": MODEL, **settings})


def rejected(workspace: Path) -> list[dict[str, Any]]:
    return [row["rejected"] for row in read_rows(workspace / "data" / "teacher.rejected.jsonl")]


def test_every_row_is_kept_with_the_counts_of_the_server(tmp_path: Path, server: Served) -> None:
    texts = write_greetings(tmp_path, 8)

    ran = ask(tmp_path, server)

    assert ran.result.summary == "8 asked = 8 kept + 0 rejected · openai ./teacher"
    rows = read_rows(tmp_path / "data" / "teacher.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == texts
    assert all(row["messages"][1]["content"].startswith("你好") for row in rows)
    with quiet():
        from mtgdm.student import base
        from mtgdm.student.chat import Chat

        chat = Chat(base.load_tokenizer(base.locate(base.TINY, tmp_path), base.TINY), base.TINY)
    for row in rows:
        teacher = row["meta"]["teacher"]
        assert teacher["prompt_tokens"] == len(chat.prompt(row["messages"][:1]))
        assert teacher["output_tokens"] == len(chat.tokens(row["messages"][1]["content"])) + 1
        assert teacher["finish_reason"] == "stop"
        assert teacher["seconds"] > 0


def test_an_answer_that_the_server_cut_is_rejected(tmp_path: Path, server: Served) -> None:
    write_greetings(tmp_path, 3)
    with pytest.raises(UserError, match="3 asked = 0 kept \\+ 3 rejected"):
        ask(tmp_path, server, max_tokens=2)
    assert [(one["reason"], one["finish_reason"]) for one in rejected(tmp_path)] == [
        ("the answer was cut at 2 tokens", "length")
    ] * 3


def test_a_schema_that_the_server_ignores_is_held_to_here(tmp_path: Path, server: Served) -> None:
    write_prompts(tmp_path, 2, types=("card",))
    with pytest.raises(UserError, match="2 asked = 0 kept \\+ 2 rejected"):
        ask(tmp_path, server, max_tokens=40, retries=0)
    assert all(one["reason"] for one in rejected(tmp_path))
    said = server.log.read_text(encoding="utf-8", errors="replace")
    assert re.search(r"Ignoring unsupported fields in the request: \{[^}]*'response_format'", said)


def test_a_model_that_the_server_does_not_have_stops_the_run(tmp_path: Path, server: Served) -> None:
    write_greetings(tmp_path, 20)
    with pytest.raises(UserError) as caught:
        ask(tmp_path, server, model="qwen2.5:32b")
    assert "Server is pinned to './teacher'; requested 'qwen2.5:32b'" in str(caught.value)
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()


def test_doctor_finds_the_server(mtgdm: CommandLine, server: Served) -> None:
    profile = f"teacher:\n  backend: openai\n  model: {MODEL}\n  url: {server.url}\n"
    (mtgdm.folder / "served.yaml").write_text(profile, encoding="utf-8")
    findings = {one["what"]: one for one in mtgdm("doctor", "--json", "--profile", "served.yaml").json}
    assert findings["teacher openai"]["state"] == "ok"
    assert findings["teacher openai"]["found"] == MODEL


def test_a_server_killed_in_the_middle_loses_nothing_and_the_next_goes_on(
    mtgdm: CommandLine, server: Served
) -> None:
    texts = write_greetings(mtgdm.folder, 60)
    out = mtgdm.folder / "data" / "teacher.jsonl"
    arguments = ("teacher", "--backend", "openai", "--model", MODEL, "--retries", "1")
    (mtgdm.folder / "served").mkdir()
    with serving(mtgdm.folder / "served") as dying:
        running = subprocess.Popen(
            [sys.executable, "-m", "mtgdm", *arguments, "--url", dying.url],
            cwd=mtgdm.folder,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        deadline = time.monotonic() + 60
        while (not out.exists() or out.read_bytes().count(b"\n") < 5) and running.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        dying.process.kill()
        _, said = running.communicate(timeout=120)

    assert running.returncode == 1, said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
    assert "Traceback" not in said
    finished = read_rows(out)
    assert 5 <= len(finished) < 60

    again = mtgdm(*arguments, "--url", server.url)
    assert again.code == 0, again.err
    assert "teacher: 60 asked = 60 kept + 0 rejected" in again.out
    rows = read_rows(out)
    assert [row["messages"][0]["content"] for row in rows] == texts
    by_id = {row["id"]: row for row in rows}
    assert all(by_id[row["id"]] == row for row in finished)  # seconds and all: they were not asked again
