"""Whether a text that is being written goes round and round.

What real answers hold has to pass: rulers and table lines of one sign, lists whose items differ in a number,
JSON whose objects have the same keys, a refrain after every stanza. `tests/test_teacher_watch.py` measures how far
these stay below the limits.
"""

from __future__ import annotations

import re

WINDOW = 6000
"""So much of the end of a text is looked at."""
SHORTEST = 96
"""Characters of repetition below which nothing is a loop."""
OF_SIGNS = 400
"""The same for units without a letter or a digit: rulers, leaders, empty cells, blank lines."""
_TIMES = ((8, 24), (16, 16), (64, 10), (256, 5), (1024, 4))
"""A unit of up to so many characters is a loop when it stands so many times in a row."""
_PROBE = 12
_CANDIDATES = 6

SENTENCES = 32
"""Sentences or lines at the end of a text that are looked at together."""
DIFFERENT = 6
"""So many different ones among them, or fewer, and the text goes round, in whatever order."""
SHORTEST_SENTENCE = 6
_ENDS = re.compile(r"[。！？!?\n;；]+")


def repeated_unit(text: str) -> str | None:
    """What the end of a text repeats so often that it is a loop; None where it does not."""
    if len(text) < SHORTEST:
        return None
    tail = text[-WINDOW:]
    end = len(tail)
    probe = tail[-_PROBE:]
    found = end - 1
    for _ in range(_CANDIDATES):
        found = tail.rfind(probe, 0, found)
        if found < 0:
            return None
        period = end - _PROBE - found
        needed = _needed(period, tail[-period:])
        if needed is None:
            return None
        if needed <= end and tail[-needed : end - period] == tail[period - needed :]:
            return tail[-period:]
        found += _PROBE - 1
    return None


def _needed(period: int, unit: str) -> int | None:
    """How many characters a repetition with this period has to have; None for one that is too long to tell."""
    times = next((times for longest, times in _TIMES if period <= longest), None)
    if times is None:
        return None
    least = SHORTEST if any(map(str.isalnum, unit)) else OF_SIGNS
    return max(least, times * period)


def repeated_sentence(text: str) -> str | None:
    """A sentence of those few that the end of a text says over and over; None where it does not."""
    sentences = [one.strip() for one in _ENDS.split(text[-WINDOW:])][-SENTENCES - 1 : -1]
    long = [one for one in sentences if len(one) >= SHORTEST_SENTENCE]
    if len(long) < SENTENCES * 3 // 4 or len(set(long)) > DIFFERENT:
        return None
    return max(set(long), key=long.count)


def repeats_at_end(text: str, times: int, longest: int = 24) -> bool:
    """Whether a text ends with one short unit, a token, that stands so many times in a row."""
    return any(
        len(text) >= times * period
        and text[-times * period : len(text) - period] == text[period - times * period :]
        for period in range(1, longest + 1)
    )
