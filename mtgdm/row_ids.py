"""Row ids by the million: twelve bytes an id, where a set of Python strings takes 130.

What is asked of many ids at once (which prompts are answered, in which order lines belong) is asked of
arrays. numpy takes 0.1 s and 16 MB, so this module is imported when rows are read, never at start.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

IdArray: TypeAlias = NDArray[np.bytes_]
"""Ids as they are kept: the 12 bytes that the 24 hex digits stand for."""
Places: TypeAlias = NDArray[np.integer[Any]]
Mask: TypeAlias = NDArray[np.bool_]

BLOCK_BYTES = 1 << 18
"""A mebibyte would take twice as long: the allocator gives so large a block back after every use."""
MERGED_AT = 1 << 14
"""So many new ids a set keeps as Python objects (2 MB) before it merges them into its array (20 ms a million)."""

_AT_ONCE = 1 << 16
_BYTES = 12
_KIND = np.dtype(f"S{_BYTES}")
_HEAD = b'{"id": "'
_HEX = np.full(256, 255, np.uint8)
_HEX[list(b"0123456789abcdef")] = range(16)


def key_of(identity: object) -> bytes | None:
    """The bytes of an id, or None for what is no id of ours."""
    if not isinstance(identity, str) or len(identity) != 2 * _BYTES:
        return None
    try:
        key = bytes.fromhex(identity)
    except ValueError:
        return None
    return key if key.hex() == identity else None  # `fromhex` takes capitals and spaces too


def as_ids(keys: bytes | bytearray) -> IdArray:
    """Keys one after another as an array, which shares the memory of a bytearray."""
    return np.frombuffer(keys, _KIND)


def hex_digits(ids: IdArray) -> Iterator[str]:
    """The ids of an array as they stand in rows."""
    for start in range(0, len(ids), 1000):
        digits = ids[start : start + 1000].tobytes().hex()
        for place in range(0, len(digits), 2 * _BYTES):
            yield digits[place : place + 2 * _BYTES]


class IdSet(Set[str]):
    """A set of ids that grows: a sorted array, and a small Python set of those that came since."""

    def __init__(self, keys: bytes | bytearray = b"") -> None:
        """The ids of these keys, in any order; one that stands there twice counts once."""
        ids = np.sort(as_ids(keys))
        again = np.flatnonzero(ids[1:] == ids[:-1])  # `np.unique` hashes, which takes eight times as long
        self._sorted = np.delete(ids, again) if len(again) else ids
        self._recent: set[bytes] = set()

    def add(self, identity: str) -> None:
        """Put an id in; ValueError where it is none."""
        key = key_of(identity)
        if key is None:
            raise ValueError(f"no row id: {identity!r}")
        if not self._holds(key):
            self._recent.add(key)
            if len(self._recent) >= MERGED_AT:
                self._merge()

    def __contains__(self, identity: object) -> bool:
        key = key_of(identity)
        return key is not None and self._holds(key)

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __iter__(self) -> Iterator[str]:
        return hex_digits(self.sorted())

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other)  # said here so that mypy lets it be compared with a `set`

    def sorted(self) -> IdArray:
        """The ids as a sorted array."""
        self._merge()
        return self._sorted

    def _holds(self, key: bytes) -> bool:
        return key in self._recent or _find(self._sorted, key) is not None

    def _merge(self) -> None:
        if self._recent:
            recent = np.sort(as_ids(b"".join(self._recent)))
            self._sorted = np.insert(self._sorted, self._sorted.searchsorted(recent), recent)
            self._recent.clear()


class IdList:
    """Ids in their order, with an index that says where each stands: its first place, if it has several."""

    def __init__(self, ids: IdArray) -> None:
        self.ids = ids
        self._order = np.argsort(ids, kind="stable").astype(np.int32)
        self._sorted = ids[self._order]

    @classmethod
    def of(cls, ids: Iterable[str]) -> IdList:
        """A list of ids as they stand in rows; one that is another tool's raises ValueError."""
        return cls(as_ids(b"".join(map(bytes.fromhex, ids))))

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[str]:
        return hex_digits(self.ids)

    def __contains__(self, identity: object) -> bool:
        return self.place(identity) is not None

    def place(self, identity: object) -> int | None:
        """Where one id stands."""
        key = key_of(identity)
        found = None if key is None else _find(self._sorted, key)
        return None if found is None else int(self._order[found])

    def places(self, ids: IdArray) -> Places:
        """Where each of these ids stands; -1 where it does not. Sorted ids are found ten times as fast."""
        places = np.full(len(ids), -1, np.int32)
        for start in range(0, len(ids) if len(self) else 0, _AT_ONCE):
            some = ids[start : start + _AT_ONCE]
            near = np.minimum(self._sorted.searchsorted(some), len(self) - 1)
            here = self._sorted[near] == some
            places[start : start + _AT_ONCE][here] = self._order[near[here]]
        return places

    def among(self, ids: IdSet) -> Mask:
        """Which of the list, in its order, are in a set."""
        places = self.places(ids.sorted())
        found = np.zeros(len(self), np.bool_)
        found[places[places >= 0]] = True
        return found

    def repeated(self) -> Mask:
        """Which of the list, in its order, stand further up already."""
        found = np.zeros(len(self), np.bool_)
        found[self._order[1:][self._sorted[1:] == self._sorted[:-1]]] = True
        return found


def lines_in_order(ids: IdArray, wanted: IdList) -> Places | None:
    """Which lines of a file to write, in the order of `wanted`; None where they stand so.

    `ids` are those of the lines. Of lines with the same id the last one is taken; those of other ids keep
    their order at the end.
    """
    places = wanted.places(ids)
    other = places < 0
    others = IdList(ids[other][::-1])
    places[other] = len(wanted) + len(others) - others.places(ids[other])
    if (places[1:] > places[:-1]).all():
        return None
    lines = np.argsort(places, kind="stable")
    last = np.append(places[lines[1:]] != places[lines[:-1]], True)
    found: Places = lines[last]
    return found


@dataclass
class Block:
    """Whole lines of a file, read at once."""

    data: bytes
    offset: int
    """Where in the file the data begins."""
    numbers: Places
    """The number of each line in the file."""
    spans: Places
    """Where in the data each line begins and ends, its newline left out; two columns."""
    ids: IdArray
    ours: Mask
    """Which lines begin and end as those we write; the ids of the others have to be found another way."""

    def __len__(self) -> int:
        return len(self.ids)

    def line(self, place: int) -> tuple[int, bytes]:
        """One line with its number."""
        start, end = self.spans[place]
        return int(self.numbers[place]), self.data[start:end]

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines with their numbers."""
        return map(self.line, range(len(self)))

    def filled(self) -> Block:
        """The block without the lines that hold nothing."""
        full = self.spans[:, 0] < self.spans[:, 1]
        numbers, spans, ids, ours = self.numbers[full], self.spans[full], self.ids[full], self.ours[full]
        return Block(self.data, self.offset, numbers, spans, ids, ours)


def read_blocks(file: BinaryIO) -> Iterator[Block]:
    """A file from its start in blocks of whole lines; one that is longer than a block is a block."""
    offset, number = 0, 1
    for data in _whole_lines(file):
        block = _block(data, offset, number)
        yield block
        offset += len(data)
        number += len(block)


def _whole_lines(file: BinaryIO) -> Iterator[bytes]:
    rest = b""
    while data := file.read(max(BLOCK_BYTES, len(rest))):
        cut = data.rfind(b"\n") + 1
        if cut:
            yield rest + data[:cut]
            rest = data[cut:]
        else:
            rest += data
    if rest:
        yield rest


def _block(data: bytes, offset: int, number: int) -> Block:
    """Find the lines and, in those of our form, the ids: `{"id": "`, 24 digits, a quote, and a `}` at the end."""
    text = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(text == ord("\n"))
    if not data.endswith(b"\n"):
        ends = np.append(ends, len(data))
    starts = np.append(0, ends[:-1] + 1)
    digits_end = len(_HEAD) + 2 * _BYTES
    begins = text.take(starts[:, None] + np.arange(digits_end + 1), mode="clip")
    halves = _HEX[begins[:, len(_HEAD) : digits_end]]
    ours = (
        (begins[:, : len(_HEAD)] == np.frombuffer(_HEAD, np.uint8)).all(axis=1)
        & (halves < 16).all(axis=1)
        & (begins[:, digits_end] == ord('"'))
        & (text[ends - 1] == ord("}"))
    )
    keys = halves[:, 0::2] << 4 | halves[:, 1::2]
    numbers = np.arange(number, number + len(ends))
    spans = np.column_stack([starts, ends])
    return Block(data, offset, numbers, spans, keys.view(_KIND).ravel(), ours)


def _find(ordered: IdArray, key: bytes) -> int | None:
    """The first place of a key in a sorted array."""
    found = int(ordered.searchsorted(np.bytes_(key)))
    return found if ordered[found : found + 1].tobytes() == key else None
