"""How fast a teacher answered: its logs, sitting after sitting, as work done over time worked."""

from __future__ import annotations

import re
from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mtgdm.rows import read_lines

BUCKETS = 120
"""A chart of the pace has at most so many bars."""

_TIME = re.compile(rb"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) INFO ")
_BEGIN = re.compile(rb"fingerprint (\S+), num_ctx \d+: \d+ prompts")
_ROW = re.compile(rb"[0-9a-f]{24} \xc2\xb7 .*? \xc2\xb7 (kept|rejected: )")
_TOKENS = re.compile(rb" \xc2\xb7 (\d+)\+(\d+) tokens \xc2\xb7 ")


@dataclass
class Pace:
    """Every answer that came, in order, with the seconds worked until then; pauses between sittings left out."""

    sittings: int = 0
    seconds: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("Q"))
    output_tokens: array[int] = field(default_factory=lambda: array("Q"))
    rejected: bytearray = field(default_factory=bytearray)
    """1 for an answer that was not kept."""

    def __len__(self) -> int:
        return len(self.seconds)

    @property
    def worked_s(self) -> float:
        """All seconds worked."""
        return self.seconds[-1] if self.seconds else 0.0


@dataclass(frozen=True)
class Bucket:
    """The work of a while."""

    begin_s: float
    end_s: float
    rows: int
    rejected: int
    output_tokens: int


def read_pace(logs: Iterable[Path], fingerprints: Collection[str] | None) -> Pace:
    """The answers in these logs, the oldest first, of sittings that asked a teacher of these fingerprints.

    None takes them all.
    """
    pace = Pace()
    for log in logs:
        _read_sitting(log, fingerprints, pace)
    return pace


def over_time(pace: Pace) -> list[Bucket]:
    """The work in buckets of one length; none where everything came in one moment."""
    if not pace.worked_s:
        return []
    length = pace.worked_s / min(BUCKETS, max(1, len(pace) // 5))
    count = round(pace.worked_s / length)
    rows, rejected, tokens = [0] * count, [0] * count, [0] * count
    for second, lost, output in zip(pace.seconds, pace.rejected, pace.output_tokens, strict=True):
        place = min(int(second / length), count - 1)
        rows[place] += 1
        rejected[place] += lost
        tokens[place] += output
    return [
        Bucket(place * length, (place + 1) * length, rows[place], rejected[place], tokens[place])
        for place in range(count)
    ]


def describe_pace(pace: Pace) -> dict[str, Any] | None:
    """The pace in figures; None where no log tells it."""
    if not len(pace):
        return None
    worked = pace.worked_s
    return {
        "sittings": pace.sittings,
        "seconds_worked": worked,
        "answers": len(pace),
        "rows_per_minute": len(pace) / worked * 60 if worked else None,
        "output_tokens_per_s": sum(pace.output_tokens) / worked if worked else None,
        "prompt_tokens": sum(pace.prompt_tokens),
        "output_tokens": sum(pace.output_tokens),
        "rejected_output_tokens": sum(
            tokens for tokens, lost in zip(pace.output_tokens, pace.rejected, strict=True) if lost
        ),
    }


def _read_sitting(log: Path, fingerprints: Collection[str] | None, pace: Pace) -> None:
    begun: float | None = None
    before = pace.worked_s
    minute, at = b"", 0.0
    for _, line in read_lines(log):
        stamp = _TIME.match(line)
        if stamp is None:
            continue
        if stamp[1] != minute:  # a second has many lines
            minute, at = stamp[1], datetime.fromisoformat(stamp[1].decode("ascii")).timestamp()
        now = at + int(stamp[2]) / 1000
        if begun is None:
            begin = _BEGIN.search(line)
            if begin is not None:
                asked = begin[1].decode("ascii", "replace")
                if fingerprints is not None and asked not in fingerprints:
                    return
                begun = now
                pace.sittings += 1
            continue
        found = _ROW.match(line, stamp.end())
        if found is None:
            continue
        tokens = _TOKENS.search(line, found.end())
        # A clock that is set back must not turn the order round.
        pace.seconds.append(max(before + now - begun, pace.worked_s))
        pace.rejected.append(found[1] != b"kept")
        pace.prompt_tokens.append(int(tokens[1]) if tokens else 0)
        pace.output_tokens.append(int(tokens[2]) if tokens else 0)
