"""Starting again on a million finished rows of 1 KB, against `json.loads` of each line, in turns, in one run."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JsonObject = dict[str, Any]


# --- what is measured: each in a process of its own, from its start to its end ---------------------


def parse_answers(workspace: Path) -> None:
    for line in (workspace / "data/teacher.jsonl").open("rb"):
        json.loads(line)


def parse_both(workspace: Path) -> None:
    for line in (workspace / "data/prompts.jsonl").open("rb"):
        json.loads(line)
    parse_answers(workspace)


def read_ledger(workspace: Path) -> None:
    """What is done, as a run finds it out."""
    from mtgdm.teachers.ledger import Ledger

    with Ledger(workspace / "data/teacher.jsonl", fingerprint(workspace)) as ledger:
        assert len(ledger.kept_ids) > 0


def ask_first_question(workspace: Path) -> None:
    """`mtgdm teacher` until it would ask for the one row that is missing, the last."""
    from mtgdm.cli import main
    from mtgdm.teachers.offline import Offline

    async def stop(*question: object) -> None:
        print_peak()
        os._exit(0)

    Offline.answer = stop  # type: ignore[method-assign, assignment]
    os.chdir(workspace)
    sys.argv = ["mtgdm", "teacher", "--backend", "offline"]
    main()


# --- the rows ------------------------------------------------------------------------------------


def fingerprint(workspace: Path) -> str:
    with (workspace / "data/teacher.jsonl").open("rb") as file:
        found: str = json.loads(file.readline())["meta"]["teacher"]["fingerprint"]
        return found


def write_rows(workspace: Path, count: int) -> None:
    """So many prompts with the manifest of `mtgdm prompts`, and all answers but the last."""
    from mtgdm import manifest
    from mtgdm.rows import encode

    data = workspace / "data"
    data.mkdir(parents=True)
    (workspace / "spots.jsonl").write_text('{"name": "西湖", "province": "浙江省"}\n', encoding="utf-8")
    for command in (["prompts", "--spots", "spots.jsonl"], ["teacher", "--backend", "offline"]):
        subprocess.run(
            [sys.executable, "-m", "mtgdm", *command], cwd=workspace, check=True, capture_output=True
        )
    made = manifest.read(data / "prompts.jsonl")
    assert made is not None
    teacher = json.loads((data / "teacher.jsonl").read_bytes().split(b"\n")[-2])["meta"]["teacher"]
    with (data / "prompts.jsonl").open("wb") as prompts, (data / "teacher.jsonl").open("wb") as answers:
        for number, row in enumerate(numbered(count), start=1):
            prompts.write(encode(row))
            row["messages"].append({"role": "assistant", "content": "山水相映，四季皆宜。" * 6})
            row["meta"]["teacher"] = teacher
            if number < count:
                answers.write(encode(row))
    (data / "teacher.jsonl.manifest.json").unlink()
    output = manifest.state(data / "prompts.jsonl", workspace)
    manifest.write(made.model_copy(update={"output": output}), data / "prompts.jsonl")


def numbered(count: int) -> Iterator[JsonObject]:
    from mtgdm.rows import row_id

    for number in range(count):
        name = f"第{number}号园"
        words = f"{name}始建于{1000 + number % 900}年，请写一段介绍。" + "亭台楼阁，" * 14
        messages = [{"role": "system", "content": "你是导游。"}, {"role": "user", "content": words}]
        meta = {
            "spot": name,
            "province": "浙江省",
            "type": "bilingual",
            "split": "train",
            "record": {"name": name},
        }
        yield {"id": row_id(messages), "messages": messages, "meta": meta}


def without_manifest(workspace: Path) -> Path:
    """The same rows as another tool would have left them: each prompt has to be read."""
    other = workspace / "other"
    (other / "data").mkdir(parents=True)
    for name in ("prompts.jsonl", "teacher.jsonl"):
        os.link(workspace / "data" / name, other / "data" / name)
    return other


# --- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Took:
    """Time and peak memory of a process."""

    seconds: float
    peak_mib: float


def took(work: Callable[[Path], None], workspace: Path) -> Took:
    command = [sys.executable, __file__, "--work", work.__name__, str(workspace)]
    started = time.perf_counter()
    ended = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    seconds = time.perf_counter() - started
    return Took(seconds, int(ended.stdout.split(b"VmHWM:")[1].split()[0]) / 1024)


def print_peak() -> None:
    """The most memory this process had; `ru_maxrss` of a child knows its parent's too."""
    print(Path("/proc/self/status").read_text(encoding="utf-8"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="a million take 2 GB of disk and 4 minutes"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_known_args()[0]
    if options.work:
        globals()[options.work[0]](Path(options.work[1]))
        print_peak()
        return
    if not Path("/proc/self/status").exists():
        print("resume: not measured, this system has no /proc")
        return
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        write_rows(workspace, options.rows)
        sides = {
            "json.loads, answers": (parse_answers, workspace),
            "the ledger": (read_ledger, workspace),
            "json.loads, prompts and answers": (parse_both, workspace),
            "mtgdm teacher to its first question": (ask_first_question, workspace),
            "the same, prompts of another tool": (ask_first_question, without_manifest(workspace)),
        }
        bytes_a_row = (workspace / "data/teacher.jsonl").stat().st_size / options.rows
        runs = [{name: took(*side) for name, side in sides.items()} for _ in range(options.runs)]
    print(
        f"{options.rows:,} finished rows of {bytes_a_row:,.0f} bytes, medians of {options.runs}, whole processes:"
    )
    answers, ledger, both, start, parsed = sides
    for name, usual in ((answers, None), (ledger, answers), (both, None), (start, both), (parsed, both)):
        line = f"  {name}: {statistics.median(run[name].seconds for run in runs):.2f} s"
        line += f", peak {max(run[name].peak_mib for run in runs):.0f} MiB"
        if usual:
            ratios = [run[name].seconds / run[usual].seconds for run in runs]
            line += f", ratio to `{usual}` {statistics.median(ratios):.3f}"
            line += " (" + ", ".join(f"{ratio:.3f}" for ratio in ratios) + ")"
        print(line)


if __name__ == "__main__":
    main()
