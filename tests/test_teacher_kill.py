"""A teacher run that is killed at any moment: nothing lost, nothing twice, nothing asked again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CommandLine, clean_environment, read_rows, write_lines
from tests.ollama_server import OllamaServer
from tests.teacher_domain import right_answer, write_prompts

ROOT = Path(__file__).resolve().parent.parent
CONCURRENCY = 4


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer, latency_s=0.01) as running:
        yield running


def start(workspace: Path, server: OllamaServer) -> subprocess.Popen[bytes]:
    settings = {
        "backend": "ollama", "url": server.url, "model": "teacher:7b", "concurrency": CONCURRENCY,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "tests.teacher_domain", str(workspace), json.dumps(settings)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(path: Path, count: int, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 60
    while lines(path) < count and process.poll() is None:
        assert time.monotonic() < deadline, f"{lines(path)} of {count} rows"
        time.sleep(0.005)


def without_timings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        del row["meta"]["teacher"]["seconds"]
    return rows


def test_kills_in_the_middle_lose_nothing_and_ask_nothing_twice(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path / "whole", 100)
    assert start(tmp_path / "whole", server).wait(60) == 0
    server.questions.clear()
    workspace = tmp_path / "killed"
    prompts = write_prompts(workspace, 100)
    out = workspace / "data" / "teacher.jsonl"

    kills = 0
    for target in (1, 60, 61, 130):
        process = start(workspace, server)
        wait_for(out, target, process)
        process.kill()
        kills += process.wait(60) != 0
        time.sleep(0.05)  # what was on the wire is answered to nobody
    assert kills == 4
    assert start(workspace, server).wait(60) == 0

    rows = read_rows(out)
    assert [row["id"] for row in rows] == [row["id"] for row in prompts]
    assert without_timings(rows) == without_timings(read_rows(tmp_path / "whole" / "data" / "teacher.jsonl"))
    again = [count - 1 for count in Counter(server.asked).values()]
    assert sum(again) <= kills * CONCURRENCY, "more was asked again than can have been on the wire"


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT to one process")
def test_ctrl_c_ends_with_130_and_the_next_run_goes_on(
    mtgdm: CommandLine, tmp_path: Path, server: OllamaServer
) -> None:
    # Rows of no type: any domain keeps any answer to them.
    questions = [{"messages": [{"role": "user", "content": f"第{number}问"}]} for number in range(200)]
    write_lines(tmp_path / "data" / "prompts.jsonl", *questions)
    server.answer = lambda question: question.text + "。"
    out = tmp_path / "data" / "teacher.jsonl"
    command = [
        "teacher",
        "--backend",
        "ollama",
        "--ollama-url",
        server.url,
        "--model",
        "teacher:7b",
        "--resume",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "mtgdm", *command],
        cwd=tmp_path,
        env=clean_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    wait_for(out, 50, process)

    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)

    assert process.returncode == 130
    assert "Traceback" not in said
    assert 50 <= lines(out) == len(read_rows(out)) < 200
    assert mtgdm(*command).code == 0
    answers = [row["messages"][-1]["content"] for row in read_rows(out)]
    assert answers == [f"第{number}问。" for number in range(200)]
