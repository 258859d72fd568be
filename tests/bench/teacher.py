"""`mtgdm teacher` at a server of fixed latency: its pace against the ideal, its CPU against a shared httpx client's."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS = 75
LOOP_TOKENS = 300
PEERS = Path(__file__).parent / "peers"
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith("MTGDM_") and not key.lower().endswith("_proxy")
}
JsonObject = dict[str, Any]
Client = Callable[[str, Path, int], None]
"""Answers the prompts of a workspace: the server's address, the workspace, questions in flight."""


@dataclass(frozen=True)
class Run:
    """What one run of a client took: CPU of its whole process, and what the server saw of it."""

    cpu_ms_per_row: float
    span_s: float
    most_open: int
    tokens: int


class Rows:
    """Prompts of the shipped sample, of all three types, as often as it takes, and the answers to them."""

    def __init__(self, folder: Path) -> None:
        mtgdm(folder, "prompts", "--profile", "quickstart")
        mtgdm(folder, "teacher", "--profile", "quickstart")
        self._prompts = read(folder / "data" / "prompts.jsonl")
        self.answers = folder / "answers.jsonl"
        write(self.answers, map(server_row, read(folder / "data" / "teacher.jsonl")))

    def write(self, path: Path, count: int, *, typed: bool) -> None:
        """So many prompts, each another one; without a type there is no contract and no record to check."""
        write(path, (self._row(number, typed) for number in range(count)))

    def _row(self, number: int, typed: bool) -> JsonObject:
        row = self._prompts[number % len(self._prompts)]
        *others, last = row["messages"]
        messages = [*others, last | {"content": f"{last['content']}\n[row {number}]"}]
        return {"messages": messages, "meta": row["meta"] if typed else {"spot": row["meta"]["spot"]}}


def server_row(row: JsonObject) -> JsonObject:
    """What the server says to a prompt: the offline teacher's answer, and a likely count of tokens."""
    *prompt, answer = row["messages"]
    characters = sum(len(message["content"]) for message in prompt)
    return {"answer": answer["content"], "prompt_tokens": int(characters * 0.7)}


def read(path: Path) -> list[JsonObject]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, rows: Iterable[JsonObject]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def mtgdm(workspace: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "mtgdm", *arguments]
    subprocess.run(command, cwd=workspace, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)


def ours(url: str, workspace: Path, slots: int, *more: str) -> None:
    """The command line as users have it, with every check, its answers streamed."""
    server = ("--backend", "ollama", "--model", "teacher", "--url", url)
    mtgdm(workspace, "teacher", *server, "--concurrency", str(slots), *more)


def ours_whole(url: str, workspace: Path, slots: int) -> None:
    """The same, each answer in one piece."""
    ours(url, workspace, slots, "--no-stream")


def shared_httpx(url: str, workspace: Path, slots: int, *kept: int) -> None:
    """The usual way, which checks nothing."""
    files = (workspace / "data" / "prompts.jsonl", workspace / "data" / "teacher.jsonl")
    command = [sys.executable, str(PEERS / "shared_httpx.py"), url, *map(str, files)]
    subprocess.run([*command, *map(str, (slots, *kept))], env=ENVIRONMENT, check=True)


def shared_httpx_kept(url: str, workspace: Path, slots: int) -> None:
    """The same with a connection kept open for each question in flight."""
    shared_httpx(url, workspace, slots, slots)


@contextmanager
def server(answers: Path, latency_s: float, *more: float) -> Iterator[str]:
    command = [sys.executable, str(PEERS / "mock_ollama.py"), str(answers), *map(str, (latency_s, *more))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


def run(
    client: Client, rows: Rows, count: int, url: str, slots: int, *, typed: bool, once: bool = True
) -> Run:
    """A client in a workspace of its own; every row must be answered there, and asked for once."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        rows.write(data / "prompts.jsonl", count, typed=typed)
        before = os.times()
        client(url, Path(folder), slots)
        after = os.times()
        with (data / "teacher.jsonl").open("rb") as file:
            assert sum(1 for _ in file) == count or not once
    with urllib.request.urlopen(f"{url}/span") as response:
        seen = json.load(response)
    assert seen["answers"] == count or not once, seen
    cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(cpu_s / count * 1000, seen["span_s"], seen["most_open"], seen["tokens"])


def pace(rows: Rows, runs: int, count: int, latency_s: float, slots: int) -> None:
    ideal_s = count * latency_s / slots
    with server(rows.answers, latency_s) as url:
        found = [run(ours, rows, count, url, slots, typed=True) for _ in range(runs)]
    print(
        f"{count:,} rows, {latency_s * 1000:.0f} ms, {slots} slots, ideal {ideal_s:.2f} s: first question to "
        f"last answer {statistics.median(one.span_s for one in found):.2f} s, "
        f"{max(one.most_open for one in found)} in flight at most"
    )
    print(f"  span / ideal: {shown([one.span_s / ideal_s for one in found])}")


def cpu(rows: Rows, runs: int, count: int, latency_s: float, slots: int) -> None:
    usual: dict[str, Client] = {
        "a shared httpx client as it is made": shared_httpx,
        "a shared httpx client that keeps all its connections": shared_httpx_kept,
    }
    own: dict[str, tuple[Client, bool]] = {
        "mtgdm teacher in one piece, rows without a contract": (ours_whole, False),
        "mtgdm teacher, rows without a contract": (ours, False),
        "mtgdm teacher in one piece, rows with contracts and facts": (ours_whole, True),
        "mtgdm teacher, rows with contracts and facts": (ours, True),
    }
    found: dict[str, list[float]] = {name: [] for name in (*usual, *own)}
    with server(rows.answers, latency_s) as url:
        for _ in range(runs):
            for name, client in usual.items():
                found[name].append(run(client, rows, count, url, slots, typed=True).cpu_ms_per_row)
            for name, (client, typed) in own.items():
                found[name].append(run(client, rows, count, url, slots, typed=typed).cpu_ms_per_row)
    print(f"{count:,} rows of {TOKENS} tokens, {latency_s * 1000:.0f} ms, {slots} slots: CPU a row")
    for name in found:
        print(f"  {name}: {statistics.median(found[name]):.2f} ms")
        for peer in usual if name in own else ():
            ratios = [mine / theirs for mine, theirs in zip(found[name], found[peer], strict=True)]
            print(f"    against {peer}: {shown(ratios)}")
    for kind in ("without a contract", "with contracts and facts"):
        streamed, whole = (found[f"mtgdm teacher{how}, rows {kind}"] for how in ("", " in one piece"))
        ratios = [one / other for one, other in zip(streamed, whole, strict=True)]
        print(f"  streamed against in one piece, rows {kind}: {shown(ratios)}")


def loops(rows: Rows, runs: int, count: int, share: float, slots: int) -> None:
    """What loops cost: each would go on to its limit of tokens."""
    found: list[dict[bool, Run]] = []
    for _ in range(runs):
        one = {}
        for looping in (False, True):
            more = (LOOP_TOKENS, share if looping else 0.0)
            with server(rows.answers, 0.3, *more) as url:
                one[looping] = run(ours, rows, count, url, slots, typed=True, once=not looping)
        found.append(one)
    print(f"{count:,} rows of {LOOP_TOKENS} tokens, {share:.0%} of the answers loop: tokens against none")
    print(f"  {shown([one[True].tokens / one[False].tokens for one in found])}")


def shown(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.3f} (" + ", ".join(f"{ratio:.3f}" for ratio in ratios) + ")"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_known_args()[0].runs
    if hasattr(os, "getloadavg"):
        print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(Path(folder))
        pace(rows, runs, count=1_000, latency_s=0.1, slots=32)
        cpu(rows, runs, count=10_000, latency_s=0.02, slots=64)
        loops(rows, runs, count=1_000, share=0.05, slots=32)


if __name__ == "__main__":
    main()
