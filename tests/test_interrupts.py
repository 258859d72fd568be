"""Ctrl-C: the first ends the run in order, the second leaves at once, whatever the first one waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import clean_environment

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows sends Ctrl-C to a whole console, this test's own too"
)

PLUGIN = '''
import asyncio, hashlib, os, signal, sys, threading, time
from pathlib import Path
from mtgdm.stage import Context, StageConfig, stage

def begun():
    Path("begun").touch()

def left():
    Path("left").touch()

@stage
def quick(config: StageConfig, context: Context):
    """Ends soon after the first Ctrl-C."""
    with context.progress(10, "rows") as bar:
        bar.advance()
        begun()
        try:
            time.sleep(60)
        finally:
            left()

@stage
def slow(config: StageConfig, context: Context):
    """Cleans up for a minute."""
    with context.progress(10, "rows") as bar:
        bar.advance()
        try:
            begun()
            time.sleep(60)
        finally:
            left()
            time.sleep(60)

@stage
def thread(config: StageConfig, context: Context):
    """Waits for a thread that generates."""
    async def work():
        await asyncio.to_thread(lambda: (begun(), time.sleep(60)))
    asyncio.run(work())

@stage
def computing(config: StageConfig, context: Context):
    """Is in a library that does not look at Python."""
    begun()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)

@stage
def tasks(config: StageConfig, context: Context):
    """Cancels what is on its way, and waits for it."""
    async def one():
        try:
            begun()
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.05)
            left()
    async def work():
        await asyncio.gather(*(one() for _ in range(3)))
    asyncio.run(work())

@stage
def forked(config: StageConfig, context: Context):
    """Has a forked child, whom the same Ctrl-C reaches, and later."""
    child = os.fork()
    if not child:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            os._exit(0)
    begun()
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.4)
        os.kill(child, signal.SIGINT)
        os.waitpid(child, 0)
        time.sleep(0.4)
        left()
        raise
'''
STAGES = ("quick", "slow", "thread", "computing", "tasks", "forked")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a stage of the plugin, and wait until it has begun."""
    (tmp_path / "ctrl_c_plugin.py").write_text(PLUGIN, encoding="utf-8")
    package = tmp_path / "ctrl_c_plugin-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: ctrl-c-plugin\nVersion: 1.0\n", "utf-8")
    entries = "".join(f"{name} = ctrl_c_plugin:{name}\n" for name in STAGES)
    (package / "entry_points.txt").write_text(f"[mtgdm.stages]\n{entries}", "utf-8")
    running: list[subprocess.Popen[str]] = []

    def begin(stage: str, *, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "mtgdm", stage],
            cwd=tmp_path,
            env=clean_environment() | {"PYTHONPATH": str(tmp_path), "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            encoding="utf-8",
        )
        running.append(process)
        wait_for(tmp_path / "begun", process)
        return process

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)


def test_the_first_ends_the_run_in_order(start: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    process = start("quick")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[0].startswith("quick: 1/10 rows")
    assert err.splitlines()[1:] == [
        "warning: interrupted: what was finished is on disk, the same command goes on from there"
    ]
    assert (tmp_path / "left").exists()


def test_a_signal_that_is_sent_twice_at_once_is_one(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("tasks")
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, "interrupted" in err) == (130, True), err
    assert (tmp_path / "left").exists()


@pytest.mark.parametrize("stage", ["slow", "thread", "computing"])
def test_the_second_leaves_at_once_whatever_the_first_waits_for(
    start: Callable[..., subprocess.Popen[str]], stage: str
) -> None:
    process = start(stage)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert said == "warning: stopping: Ctrl-C again leaves at once, what is on disk stays\n"
    assert process.poll() is None
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (130, "")
    assert time.monotonic() - pressed < 5


def test_the_second_shows_the_cursor_again(start: Callable[..., subprocess.Popen[str]]) -> None:
    ours, theirs = os.openpty()
    process = start("slow", stderr=theirs)
    os.close(theirs)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.wait(timeout=10) == 130
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    assert "\x1b[?25l" in shown, "the bar hides the cursor"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_tasks_of_an_event_loop_are_cancelled_and_waited_for(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("tasks")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert (tmp_path / "left").exists()


def test_what_a_forked_child_gets_is_no_second_one(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start("forked")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode == 130
    assert (tmp_path / "left").exists()
