"""HTTP/1.1 as a client reads it: one connection for one request at a time, the body whole or piece by piece."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from mtgdm.teachers.seam import Retryable

LONGEST_HEAD = 1 << 16
LONGEST_BODY = 1 << 26
"""Of a reply that nobody said to be shorter: a proxy's list of a thousand models has a megabyte or two."""
LONGEST_ERROR = 1 << 16
"""So much of an error is read; a page of an endless one tells nothing more."""
LATE_END_S = 0.5
"""So long a server may take to end a reply whose last word has come."""

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5]\d\d)(?: [^\r\n\0]*)?")
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_SIZE = re.compile(rb"[0-9a-fA-F]{1,15}")


class NotHttp(Exception):
    """What came is not a reply of HTTP/1.1."""


class BodyReader(Protocol):
    """Takes the body of a reply as it comes."""

    most_bytes: int
    """How long a body may be that it does not take."""

    def begins(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether it takes this body; another is handed over whole."""
        ...

    def feed(self, data: bytes) -> bool:
        """More of the body; True where nothing more is wanted, and the connection is to be closed."""
        ...

    @property
    def complete(self) -> bool:
        """Whether the last word has come; the server may take a moment to end its reply."""
        ...


@dataclass(frozen=True)
class Reply:
    """What a server sent back; the names of the headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    secret: str = field(default="", repr=False)
    """What no message about this reply may show, though some servers repeat the key that they refuse."""

    @cached_property
    def text(self) -> str:
        """The body as text, whatever it is."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body's JSON; ValueError where it is none, invalid UTF-8 included."""
        try:
            return json.loads(self.body)  # a BOM is no error here
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


def most_bytes(status: int, reader: BodyReader | None) -> int:
    """How much of a body is read that is handed over whole."""
    if status != 200:
        return LONGEST_ERROR
    return LONGEST_BODY if reader is None else reader.most_bytes


def whole_reply(status: int, headers: Mapping[str, str], body: bytes, limit: int) -> Reply:
    """A reply whose body was read up to a limit: an error is cut there, an answer is none then."""
    if len(body) > limit and status == 200:
        raise Retryable(f"the reply is longer than {limit:,} bytes, and no answer is")
    return Reply(status, headers, body[:limit])


class _Sized:
    """A body of so many bytes."""

    def __init__(self, length: int) -> None:
        self._left = length

    def take(self, data: bytes) -> tuple[bytes, bytes | None]:
        """What of some bytes is body; and what comes behind its end, None where it has not ended."""
        body, rest = data[: self._left], data[self._left :]
        self._left -= len(body)
        return body, None if self._left else rest


class _UntilClosed:
    """A body that ends with the connection."""

    def take(self, data: bytes) -> tuple[bytes, bytes | None]:
        """All of it."""
        return data, None


class _Chunked:
    """A body in chunks, each behind its size."""

    def __init__(self) -> None:
        self._rest = b""
        self._left = 0
        """Bytes of the open chunk, with the line break behind it."""
        self._trailing = False

    def take(self, data: bytes) -> tuple[bytes, bytes | None]:
        """What of some bytes is body; and what comes behind its end."""
        if self._rest:
            data = self._rest + data
            self._rest = b""
        elif not self._left and not self._trailing:
            # Nearly always one token comes in one chunk, whole.
            size = _SIZE.match(data)
            if size is not None:
                place = size.end() + 2
                stop = place + int(size[0], 16)
                if (
                    stop + 2 == len(data)
                    and stop > place
                    and data[place - 2 : place] == data[stop:] == b"\r\n"
                ):
                    return data[place:stop], None
        place, end = 0, len(data)
        parts: list[bytes] = []
        while not self._trailing:
            if self._left:
                # The last two bytes of what is left are the line break.
                stop = place + self._left
                body_end = stop - 2
                if stop > end:
                    parts.append(data[place:body_end])
                    self._left = stop - end
                    return b"".join(parts), None
                if body_end > place:
                    parts.append(data[place:body_end])
                self._left = 0
                place = stop
                if data[place - 1] != 0x0A:
                    raise NotHttp("a chunk is longer than it says")
            line_end = data.find(b"\n", place)
            if line_end < 0:
                if end - place > 1024:
                    raise NotHttp("a chunk has no size")
                self._rest = data[place:]
                return b"".join(parts), None
            size = _SIZE.match(data, place, line_end)
            if size is None or data[size.end() : line_end].lstrip(b" \t\r")[:1] not in (b"", b";"):
                raise NotHttp(f"a chunk has the size {data[place:line_end][:20]!r}")
            place = line_end + 1
            length = int(size[0], 16)
            self._left = length + 2 if length else 0
            self._trailing = not length
        return b"".join(parts), self._trailers(data[place:])

    def _trailers(self, data: bytes) -> bytes | None:
        while True:
            line, ended, data_after = data.partition(b"\n")
            if not ended:
                if len(data) > LONGEST_HEAD:
                    raise NotHttp("its trailers do not end")
                self._rest = data
                return None
            data = data_after
            if not line.strip():
                return data


@dataclass(frozen=True)
class _Head:
    status: int
    headers: dict[str, str]
    keeps: bool
    """Whether the connection stays open after the reply."""

    @property
    def framing(self) -> _Sized | _Chunked | _UntilClosed:
        """How its body ends."""
        if self.status in (204, 304):
            return _Sized(0)
        encoding = self.headers.get("transfer-encoding")
        if encoding is not None:
            if encoding.lower() != "chunked":
                raise NotHttp(f"its body is encoded as {encoding[:40]!r}")
            return _Chunked()
        length = self.headers.get("content-length")
        if length is None:
            return _UntilClosed()
        lengths = {part.strip() for part in length.split(",")}
        if len(lengths) > 1 or not re.fullmatch(r"[0-9]{1,15}", length := lengths.pop()):
            raise NotHttp(f"its length is {length[:40]!r}")
        return _Sized(int(length))


def _head(data: bytes) -> _Head:
    first, *lines = (line.removesuffix(b"\r") for line in data.split(b"\n"))
    said = _STATUS.fullmatch(first)
    if said is None:
        raise NotHttp(f"it begins with {first[:40]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name):
            raise NotHttp(f"{line[:40]!r} is no header")
        key, text = name.decode("ascii").lower(), value.strip(b" \t").decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    keeps = said[1] == b"1" and "close" not in headers.get("connection", "").lower()
    return _Head(int(said[2]), headers, keeps)


class Connection(asyncio.Protocol):
    """One connection to a server.

    Bytes are taken apart where they arrive: to wake a task for each token of an answer would cost more than all
    the rest of it.
    """

    def __init__(self) -> None:
        self.ready = True
        """Whether it can carry another request: the last reply came whole, and the server holds the line."""
        self.closed = False
        """Whether the other side has hung up."""
        self._reply: asyncio.Future[Reply] | None = None
        self._ending: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    async def send(self, request: bytes, reader: BodyReader | None) -> Reply:
        """One request and its whole reply; OSError, NotHttp or Retryable where none comes."""
        self.ready = False
        self._reader = reader
        self._data = b""
        self._head: _Head | None = None
        self._body: bytearray = bytearray()
        self._reading: BodyReader | None = None
        self._reply = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._reply
        finally:
            self._reply = None
            if self._ending is not None:
                self._ending.cancel()
                self._ending = None

    def data_received(self, data: bytes) -> None:
        """More of a reply."""
        if self._reply is None or self._reply.done():
            self.ready, self.closed = False, True  # nothing was asked: whatever it is, it is no reply
            return
        try:
            self._take(data)
        except Exception as error:  # noqa: BLE001 - it is raised again in the task that waits for the reply
            self._reply.set_exception(error)

    def _take(self, data: bytes) -> None:
        if self._head is None:
            data = self._data + data
            end, width = _end_of_head(data)
            if end < 0:
                self._data = data
                if len(data) > LONGEST_HEAD:
                    raise NotHttp("its head does not end")
                if not b"HTTP/1.".startswith(data[:7]):
                    raise NotHttp(f"it begins with {data[:40]!r}")
                return
            head, data = _head(data[:end]), data[end + width :]
            if head.status < 200:
                self._data = b""
                if data:
                    self._take(data)
                return
            self._head, self._framing = head, head.framing
            reader = self._reader
            self._reading = (
                reader if reader is not None and reader.begins(head.status, head.headers) else None
            )
            self._limit = most_bytes(head.status, reader)
        body, rest = self._framing.take(data)
        if self._reading is not None:
            self._read(self._reading, body, rest)
            return
        self._body += body
        if rest is not None:
            self._end(keeps=self._head.keeps and not rest)
        elif len(self._body) > self._limit:
            self._end(keeps=False)

    def _read(self, reader: BodyReader, body: bytes, rest: bytes | None) -> None:
        assert self._head is not None
        enough = bool(body) and reader.feed(body)
        if rest is not None:
            self._end(keeps=self._head.keeps and not rest)
        elif enough:
            self._end(keeps=False)
        elif reader.complete and self._ending is None:
            self._ending = asyncio.get_running_loop().call_later(LATE_END_S, self._end_late)

    def _end_late(self) -> None:
        if self._reply is not None and not self._reply.done():
            self._end(keeps=False)

    def _end(self, *, keeps: bool) -> None:
        assert self._head is not None
        assert self._reply is not None
        self.ready = keeps
        head = self._head
        self._reply.set_result(whole_reply(head.status, head.headers, bytes(self._body), self._limit))

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed, by whichever side."""
        self.ready, self.closed = False, True
        if self._reply is None or self._reply.done():
            return
        head = self._head
        if head is not None and (
            isinstance(self._framing, _UntilClosed) or (self._reading is not None and self._reading.complete)
        ):
            self._end(keeps=False)
        elif isinstance(exc, OSError):
            self._reply.set_exception(exc)
        else:
            self._reply.set_exception(Retryable("the connection was closed before the reply was whole"))

    def abort(self) -> None:
        """Close it at once."""
        self.closed = True
        self._transport.abort()


def _end_of_head(data: bytes) -> tuple[int, int]:
    """Where a head ends, and how wide the blank line is; some servers end lines with a line feed alone."""
    end = data.find(b"\r\n\r\n")
    bare = data.find(b"\n\n", 0, end if end >= 0 else len(data))
    if bare >= 0:
        return bare, 2
    return end, 4
