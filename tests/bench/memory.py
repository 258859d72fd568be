"""Peak memory of `mtgdm prompts` and `mtgdm teacher` over 1,000 and 100,000 rows: it must not grow with them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

FEW = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000, help="the larger number; 100,000 take 3 minutes")
    many = parser.parse_known_args()[0].rows
    if not Path("/proc/self/status").exists():
        print("peak memory: not measured, this system has no /proc")
        return
    peaks = [peaks_mib(rows) for rows in (FEW, many)]
    for command, few_mib, many_mib in zip(("prompts", "teacher", "teacher, resumed"), *peaks, strict=True):
        print(
            f"peak memory, mtgdm {command}: {few_mib:.1f} MiB with {FEW:,} rows, {many_mib:.1f} MiB with "
            f"{many:,}, {many_mib - few_mib:+.1f} MiB"
        )


def peaks_mib(rows: int) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        write_spots(Path(folder) / "spots.jsonl", -(-rows // 3))
        teacher = ("teacher", "--backend", "offline")
        return [
            peak_mib(Path(folder), *command)
            for command in (("prompts", "--spots", "spots.jsonl"), teacher, teacher)
        ]


def write_spots(path: Path, count: int) -> None:
    """So many records, each of which makes three prompts."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for number in range(count):
            name = f"第{number}号园"
            intro = f"{name}在杭州市，山水相映，四季皆宜。" * 3
            details = {"历史": f"始建于{1000 + number % 900}年。", "交通": "乘公交前往。"}
            spot = {
                "name": name,
                "province": "浙江省",
                "city": "杭州市",
                "geo": {"lat": 30.25, "lon": 120.15},
                "text_zh": {"short_intro": intro, "details": details},
            }
            file.write(json.dumps(spot, ensure_ascii=False) + "\n")


def peak_mib(workspace: Path, *arguments: str) -> float:
    """Run a command of ours and read the most memory it had: `ru_maxrss` of a child knows its parent's too."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom mtgdm.cli import main\n"
        "try:\n    main()\nfinally:\n    print(Path('/proc/self/status').read_text())\n"
    )
    command = [sys.executable, "-c", script, *arguments]
    ended = subprocess.run(
        command, cwd=workspace, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    return int(ended.stdout.split(b"VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
