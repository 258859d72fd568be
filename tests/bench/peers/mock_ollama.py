"""`python mock_ollama.py ROWS LATENCY_S [TOKENS] [LOOPS]`: an Ollama that answers after a fixed time and costs little.

Where `stream` is true an answer comes in TOKENS (75) pieces, evenly over the latency. LOOPS is the share of answers
that go round and round until their limit of tokens, at the same pace a token. ROWS holds one
`{"answer": ..., "prompt_tokens": ...}` a line; a question that holds `[row N]` gets row N (modulo).
The port goes to standard output. `GET /span` says how many answers were given since it was last asked, the
seconds from the first question to the last answer, how many questions were open at once at most, and the tokens
written.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

MARK = b"[row "
GO_BUFFER = 2048


@dataclass
class Figures:
    """What is counted between two looks."""

    answers: int = 0
    open: int = 0
    most_open: int = 0
    tokens: int = 0
    first_s: float = 0.0
    last_s: float = 0.0

    def taken(self) -> dict[str, Any]:
        """The figures so far, which start anew."""
        found = {"answers": self.answers, "span_s": self.last_s - self.first_s, "most_open": self.most_open}
        found["tokens"] = self.tokens
        self.answers = self.most_open = self.tokens = 0
        self.first_s = self.last_s = 0.0
        return found


class Connection(asyncio.Protocol):
    """One connection: requests with a Content-Length, one after the other."""

    def __init__(self, replies: list[Answer], latency_s: float, loops: float, figures: Figures) -> None:
        self._replies = replies
        self._latency_s = latency_s
        self._loops = loops
        self._figures = figures
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, ended, rest = self._buffer.partition(b"\r\n\r\n")
        if not ended:
            return
        place = head.lower().find(b"content-length:")
        length = int(head[place + 15 :].split(b"\r\n", 1)[0]) if place >= 0 else 0
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        self._answer(head, rest[:length])

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"POST /api/chat "):
            figures = self._figures
            figures.first_s = figures.first_s or time.monotonic()
            figures.open += 1
            figures.most_open = max(figures.most_open, figures.open)
            place = body.rfind(MARK) + len(MARK)
            number = int(body[place : body.index(b"]", place)])
            reply = self._replies[number % len(self._replies)]
            if b'"stream":true' in body.replace(b" ", b""):
                lines: Sequence[bytes] = reply.lines
                if self._loops and random.Random(body).random() < self._loops:
                    place = body.rindex(b'"num_predict":') + 14
                    lines = looping(reply, int(body[place : body.index(b",", place)]))
                self._transport.write(STREAM_HEAD)
                self._stream(lines, 0, time.monotonic())
                return
            figures.tokens += len(reply.lines)
            asyncio.get_running_loop().call_later(self._latency_s, self._reply_to_chat, reply.whole)
        elif head.startswith(b"GET /span "):
            self._transport.write(reply_of(self._figures.taken()))
        else:
            self._transport.write(reply_of({"capabilities": ["completion"]}))

    def _stream(self, lines: Sequence[bytes], number: int, started: float) -> None:
        """Write the piece that is due, and wait for the next; the pace is held on the whole."""
        if self._transport.is_closing():
            self._end()
            return
        self._transport.write(lines[number])
        self._figures.tokens += 1
        if number + 1 == len(lines):
            self._end()
            return
        due = started + self._latency_s * (number + 1) / (len(self._replies[0].lines) - 1)
        asyncio.get_running_loop().call_later(
            due - time.monotonic(), self._stream, lines, number + 1, started
        )

    def _end(self) -> None:
        self._figures.open -= 1
        self._figures.answers += 1
        self._figures.last_s = time.monotonic()

    def _reply_to_chat(self, reply: bytes) -> None:
        self._end()
        self._transport.write(reply)


@dataclass(frozen=True)
class Answer:
    """A reply in one piece and in many; each line of a stream is a chunk of the body."""

    whole: bytes
    lines: tuple[bytes, ...]


STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nDate: Tue, 24 Nov 2026 08:00:00 GMT\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def line_of(content: str, **more: Any) -> bytes:
    message = {"role": "assistant", "content": content}
    value = {
        "model": "teacher",
        "created_at": "2026-11-23T14:30:00.000000000Z",
        "message": message,
        "done": False,
    }
    body = json.dumps(value | more, ensure_ascii=False).encode("utf-8") + b"\n"
    return b"%x\r\n%b\r\n" % (len(body), body)


def looping(answer: Answer, tokens: int) -> list[bytes]:
    """The first third of an answer, and then its end over and over."""
    third = len(answer.lines) // 3
    begun, again = answer.lines[:third], answer.lines[max(0, third - 12) : third]
    repeated = [again[place % len(again)] for place in range(max(0, tokens - third - 1))]
    return [*begun, *repeated, line_of("", done=True, done_reason="length", eval_count=tokens) + b"0\r\n\r\n"]


def reply_of(value: dict[str, Any]) -> bytes:
    """A whole reply; a long body goes in chunks, as Go's HTTP server sends what a handler did not measure."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: Tue, 24 Nov 2026 08:00:00 GMT\r\n"
    if len(body) < GO_BUFFER:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def chat_reply(row: dict[str, Any], tokens: int) -> Answer:
    answer = row["answer"]
    counts = {"prompt_eval_count": row["prompt_tokens"], "eval_count": tokens}
    last = {"done": True, "done_reason": "stop", "total_duration": 20_000_000, **counts}
    cuts = [len(answer) * number // (tokens - 1) for number in range(tokens)]
    pieces = [line_of(answer[start:end]) for start, end in pairwise(cuts)]
    whole = {"model": "teacher", "created_at": "2026-11-23T14:30:00.000000000Z"}
    message = {"role": "assistant", "content": answer}
    return Answer(
        reply_of({**whole, "message": message, **last}), (*pieces, line_of("", **last) + b"0\r\n\r\n")
    )


async def serve(rows: Path, latency_s: float, tokens: int = 75, loops: float = 0.0) -> None:
    """Listen on a free port until the process is ended."""
    lines = rows.read_text(encoding="utf-8").split("\n")
    replies = [chat_reply(json.loads(line), tokens) for line in lines if line]
    figures = Figures()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(replies, latency_s, loops, figures), "127.0.0.1", 0, backlog=512
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    _, rows_path, latency, *more = sys.argv
    asyncio.run(
        serve(
            Path(rows_path),
            float(latency),
            *(kind(one) for kind, one in zip((int, float), more, strict=False)),
        )
    )
