"""What every test may use: the command line in a workspace of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Ran:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass
class CommandLine:
    """`mtgdm` in a process of its own, in a folder of its own."""

    folder: Path

    def __call__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Ran:
        ended = subprocess.run(
            [sys.executable, "-m", "mtgdm", *map(str, arguments)],
            cwd=self.folder,
            env=clean_environment() | (env or {}),
            capture_output=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
            timeout=600,
            check=False,
        )
        return Ran(ended.returncode, ended.stdout, ended.stderr)


def clean_environment() -> dict[str, str]:
    """The environment without a user's own mtgdm settings, wide enough that nothing wraps."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MTGDM_")}
    return kept | {"COLUMNS": "200", "NO_COLOR": "1", "PYTHONUTF8": "1", "TERM": "dumb"}


@pytest.fixture
def mtgdm(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path)


def spot(name: str, **more: Any) -> dict[str, Any]:
    """A spot record as the collector writes it."""
    return {
        "name": name,
        "province": "浙江省",
        "city": "杭州市",
        "geo": {"lat": 30.25, "lon": 120.15},
        "text_zh": {
            "short_intro": f"{name}在杭州市。",
            "details": {"历史": f"{name}始建于1089年。", "交通": "乘公交前往。"},
        },
        **more,
    }


def write_lines(path: Path, *rows: Any) -> Path:
    """A file of JSON rows; a text is written as it is, as a line."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every row of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
