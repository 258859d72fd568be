"""`python mock_ollama.py ROWS LATENCY_S`: an Ollama that answers after a fixed time and costs next to nothing.

ROWS holds one `{"answer": ..., "prompt_tokens": ...}` a line; a question that holds `[row N]` gets row N (modulo).
The port goes to standard output. `GET /span` says how many answers were given since it was last asked, the
seconds from the first question to the last answer, and how many questions were open at once at most.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from dataclasses import dataclass
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
    first_s: float = 0.0
    last_s: float = 0.0

    def taken(self) -> dict[str, Any]:
        """The figures so far, which start anew."""
        found = {"answers": self.answers, "span_s": self.last_s - self.first_s, "most_open": self.most_open}
        self.answers = self.most_open = 0
        self.first_s = self.last_s = 0.0
        return found


class Connection(asyncio.Protocol):
    """One connection: requests with a Content-Length, one after the other."""

    def __init__(self, replies: list[bytes], latency_s: float, figures: Figures) -> None:
        self._replies = replies
        self._latency_s = latency_s
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
            asyncio.get_running_loop().call_later(self._latency_s, self._reply_to_chat, reply)
        elif head.startswith(b"GET /span "):
            self._transport.write(reply_of(self._figures.taken()))
        else:
            self._transport.write(reply_of({"capabilities": ["completion"]}))

    def _reply_to_chat(self, reply: bytes) -> None:
        self._figures.open -= 1
        self._figures.answers += 1
        self._figures.last_s = time.monotonic()
        self._transport.write(reply)


def reply_of(value: dict[str, Any]) -> bytes:
    """A whole reply; a long body goes in chunks, as Go's HTTP server sends what a handler did not measure."""
    body = json.dumps(value, ensure_ascii=False).encode("utf-8")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nDate: Tue, 24 Nov 2026 08:00:00 GMT\r\n"
    if len(body) < GO_BUFFER:
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    return head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def chat_reply(row: dict[str, Any]) -> bytes:
    return reply_of(
        {
            "model": "teacher",
            "created_at": "2026-11-23T14:30:00.000000000Z",
            "message": {"role": "assistant", "content": row["answer"]},
            "done": True,
            "done_reason": "stop",
            "total_duration": 20_000_000,
            "prompt_eval_count": row["prompt_tokens"],
            "eval_count": int(len(row["answer"]) * 0.7) + 1,
        }
    )


async def serve(rows: Path, latency_s: float) -> None:
    """Listen on a free port until the process is ended."""
    replies = [chat_reply(json.loads(line)) for line in rows.read_text(encoding="utf-8").split("\n") if line]
    figures = Figures()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: Connection(replies, latency_s, figures), "127.0.0.1", 0, backlog=512
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1]), float(sys.argv[2])))
