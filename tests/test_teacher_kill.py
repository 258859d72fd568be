"""A teacher run that is killed at any moment: nothing lost, nothing twice, nothing asked again."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
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


def test_fifty_kills_at_random_moments_lose_nothing(tmp_path: Path, server: OllamaServer) -> None:
    """From before the first question to behind the last answer, in the middle of a write or of the sorting."""
    server.latency_s = 0.04
    write_prompts(tmp_path / "whole", 500)
    assert start(tmp_path / "whole", server).wait(120) == 0
    asked_whole = sorted(server.asked)
    server.questions.clear()
    workspace = tmp_path / "killed"
    prompts = write_prompts(workspace, 500)
    words = {row["id"]: row["messages"][-1]["content"] for row in prompts}
    out = workspace / "data" / "teacher.jsonl"
    moments = random.Random(20261124)

    for kill in range(50):
        finished = {words[row_id_of(line)] for line in whole_lines(out)}
        asked_before = len(server.questions)
        process = start(workspace, server)
        if kill % 10:
            wait_for(out, lines(out) + 1, process)
        time.sleep(moments.uniform(0, 0.25))
        process.kill()
        process.wait(60)
        time.sleep(0.06)  # what was on the wire is answered to nobody
        again = finished.intersection(server.asked[asked_before:])
        assert not again, "a finished row was asked again"
        assert finished <= {words[row_id_of(line)] for line in whole_lines(out)}, "a finished row was lost"
    assert lines(out) < 1000, "the kills came too late to kill anything"
    assert start(workspace, server).wait(120) == 0

    rows = read_rows(out)
    assert [row["id"] for row in rows] == [row["id"] for row in prompts]
    assert without_timings(rows) == without_timings(read_rows(tmp_path / "whole" / "data" / "teacher.jsonl"))
    assert set(server.asked) == set(asked_whole)
    assert len(server.asked) - len(asked_whole) <= 50 * CONCURRENCY


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a journal that end, which is when a row is finished."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def row_id_of(line: bytes) -> str:
    identity: str = json.loads(line)["id"]
    return identity


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
