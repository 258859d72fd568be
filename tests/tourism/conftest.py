from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtgdm.domain import Record
from mtgdm.errors import BadRow
from mtgdm.tourism import Tourism

SAMPLE = Path(__file__).parents[2] / "data" / "sample" / "spots.jsonl"

ReadSpots = Callable[..., tuple[list[Record], list[BadRow]]]


@pytest.fixture
def tourism() -> Tourism:
    return Tourism()


@pytest.fixture(scope="session")
def sample() -> list[Record]:
    bad: list[BadRow] = []
    records = list(Tourism().read(SAMPLE, bad.append))
    assert not bad
    return records


@pytest.fixture
def read_spots(tmp_path: Path) -> ReadSpots:
    """Write lines (objects, text or bytes) to a file and read it: its records and its bad lines."""

    def read(*lines: Any, start: bytes = b"", end: bytes = b"\n") -> tuple[list[Record], list[BadRow]]:
        path = tmp_path / "spots.jsonl"
        path.write_bytes(start + end.join(_encoded(line) for line in lines) + end)
        bad: list[BadRow] = []
        return list(Tourism().read(path, bad.append)), bad

    return read


def _encoded(line: Any) -> bytes:
    if isinstance(line, bytes):
        return line
    return line.encode() if isinstance(line, str) else json.dumps(line, ensure_ascii=False).encode()
