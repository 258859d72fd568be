"""Replies taken apart as they come: server-sent events, JSON lines, or one JSON body."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic_core import from_json

from mtgdm.teachers.http import Reply
from mtgdm.teachers.seam import Retryable, Watch

SLACK_BYTES = 1 << 20
"""So long a reply may be beside its tokens."""
BYTES_PER_TOKEN = 2048
"""What a token may take in a reply: as a line of a stream, with its log-probabilities; most take 150 to 400."""


class AnswerReader(ABC):
    """Reads the reply to one question: `take` gets each JSON object of a stream, or the one of a whole reply."""

    def __init__(self, watch: Watch, max_tokens: int) -> None:
        self.watch = watch
        self.most_bytes = SLACK_BYTES + BYTES_PER_TOKEN * max_tokens
        self.parts: list[str] = []
        """The answer so far."""
        self.pieces = 0
        """Pieces of it and of the thoughts, each a token or a few."""
        self.complete = False
        """Whether the server said that the answer is over."""
        self.whole = False
        """Whether it came in one piece."""
        self.stopped = False
        """Whether the watch wanted no more of it."""
        self.overlong = False
        """Whether the server wrote more than the tokens that it was asked for can be."""
        self.failed: Reply | None = None
        """An error in the middle of a stream, as the reply that it would have been."""
        self._over = False
        """Whether nothing more of it is wanted."""
        self._bytes = 0
        self._rest = b""
        self._event: list[bytes] = []
        self._is_sse = False

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self.parts)

    @abstractmethod
    def take(self, value: dict[str, Any]) -> None:
        """One object: a piece of the answer, or the whole."""

    def add(self, text: str) -> None:
        """A piece of the answer."""
        self.parts.append(text)
        self.pieces += 1
        if self.watch.heard(text):
            self.stopped = self._over = True

    def add_thought(self, text: str) -> None:
        """A piece of the thoughts, which are no part of the answer."""
        self.pieces += 1
        if self.watch.thought(text):
            self.stopped = self._over = True

    # --- a stream --------------------------------------------------------------------------------

    def begins(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether this is a stream, which is read as it comes."""
        kind = headers.get("content-type", "")
        self._status, self._headers = status, headers
        self._is_sse = "event-stream" in kind
        return status == 200 and (
            self._is_sse or any(word in kind for word in ("ndjson", "jsonl", "json-seq"))
        )

    def feed(self, data: bytes) -> bool:
        """More of a stream; True where nothing more is wanted."""
        self._bytes += len(data)
        *lines, self._rest = (self._rest + data if self._rest else data).split(b"\n")
        before = self.pieces
        for value in self._values(lines) if self._is_sse else map(self._parsed, filter(bytes.strip, lines)):
            self._take(value)
            if self._over:
                break
        if self.pieces > before:
            self.watch.alive()
        if self._bytes > self.most_bytes:
            self.overlong = self._over = True
        return self._over

    def _values(self, lines: list[bytes]) -> Iterator[Any]:
        """The objects of server-sent events; of the last one perhaps the beginning alone has come."""
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data = line[5:]
                if data.strip() == b"[DONE]":
                    self.complete = True
                elif not self._event and data.endswith(b"}"):
                    # Nearly every event is one line; where it is not, the lines are parsed together.
                    try:
                        yield from_json(data)
                    except ValueError:
                        self._event.append(data)
                else:
                    self._event.append(data)
            elif not line and self._event:
                event, self._event = b"\n".join(self._event), []
                if not event.isspace():
                    yield self._parsed(event)

    def _parsed(self, data: bytes) -> Any:
        try:
            return from_json(data)
        except ValueError:  # a lone surrogate, which json takes
            try:
                return json.loads(data)
            except (ValueError, RecursionError):
                beginning = " ".join(data[:300].decode("utf-8", "replace").split())
                raise Retryable(f"the reply is not JSON but {beginning}") from None

    def _take(self, value: Any) -> None:
        if not isinstance(value, dict):
            raise Retryable(f"the reply is no JSON object but {type(value).__name__}")
        if error := value.get("error"):
            self._over = True
            self.failed = replace(
                Reply(self._status, self._headers, json.dumps(value).encode("utf-8")),
                status=_status_of(error),
            )
            return
        self.take(value)

    def finish(self) -> None:
        """The stream has ended: read what has no line end."""
        if self._over:
            return
        rest, self._rest = self._rest, b""
        for value in (
            self._values([rest, b""]) if self._is_sse else map(self._parsed, filter(bytes.strip, [rest]))
        ):
            self._take(value)

    # --- one body --------------------------------------------------------------------------------

    def read_lines(self, reply: Reply) -> bool:
        """Read a body that is a stream after all, though its type does not say so; False where it is none."""
        beginning = reply.body.lstrip()[:6]
        self._status, self._headers = reply.status, reply.headers
        self._is_sse = beginning.startswith((b"data:", b"event:", b":"))
        lines = reply.body.split(b"\n")
        if not self._is_sse and not (len(lines) > 1 and lines[0].rstrip().endswith(b"}")):
            return False
        for value in (
            self._values([*lines, b""]) if self._is_sse else map(self._parsed, filter(bytes.strip, lines))
        ):
            self._take(value)
        return True


def _status_of(error: Any) -> int:
    """The status that an error would have had, had the stream not begun."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and 400 <= code < 600 else 200
