"""The way to a teacher's server: what is read as a reply, which connections are used again, which proxy is taken."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import httpx
import pytest

from mtgdm.errors import SettingError
from mtgdm.teachers.connections import Connections, Reply, connections_to, proxy_to
from mtgdm.teachers.seam import Retryable

PLAIN = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"


@dataclass
class Canned:
    """A server that says the same bytes to every request; what it hears is kept."""

    says: bytes = PLAIN
    closes: bool = False
    """Whether it closes the connection when it has spoken."""
    waits: Callable[[int], Awaitable[object]] = lambda number: asyncio.sleep(0)
    """What is waited for before request N is answered."""
    heard: list[bytes] = field(default_factory=list)
    connections: int = 0
    tls: ssl.SSLContext | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()

    @property
    def port(self) -> int:
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while not reader.at_eof():
                head = await reader.readuntil(b"\r\n\r\n")
                number = len(self.heard)
                self.heard.append(head)
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                self.heard[number] += await reader.readexactly(int(length or b"0"))
                await self.waits(number)
                writer.write(self.says)
                await writer.drain()
                if self.closes:
                    break
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()


def talk(
    server: Canned,
    speak: Callable[[Connections], Awaitable[None]],
    *,
    url: str = "http://127.0.0.1:{port}/base",
    headers: dict[str, str] | None = None,
) -> None:
    """Talk to a server over the connections that its address calls for."""

    async def run() -> None:
        async with server, AsyncExitStack() as ended:
            connections = connections_to(httpx.URL(url.format(port=server.port)), headers or {})
            ended.push_async_callback(connections.aclose)
            await speak(connections)

    asyncio.run(run())


def reply_to(says: bytes, *, closes: bool = False) -> Reply:
    """The reply that such bytes are."""
    replies: list[Reply] = []

    async def speak(connections: Connections) -> None:
        replies.append(await connections.send("POST", "/ask", b"{}"))

    talk(Canned(says, closes), speak)
    return replies[0]


# --- one request and its reply -------------------------------------------------------------------


def test_a_request_is_written_as_http_wants_it() -> None:
    server = Canned()

    async def speak(connections: Connections) -> None:
        await connections.send("POST", "/ask", b'{"a": 1}')
        await connections.send("GET", "/show")

    talk(server, speak, url="http://name:word@127.0.0.1:{port}/base/?key=1", headers={"X-Own": "yes"})

    post, get = (heard.decode("ascii").split("\r\n") for heard in server.heard)
    assert post[0] == "POST /base/ask?key=1 HTTP/1.1"
    assert post[1].startswith("Host: 127.0.0.1:")
    assert set(post[2:-2]) == {
        "Accept-Encoding: identity",
        "Authorization: Basic bmFtZTp3b3Jk",
        "X-Own: yes",
        "Content-Length: 8",
    }
    assert post[-1] == '{"a": 1}'
    assert get[0] == "GET /base/show?key=1 HTTP/1.1"
    assert not any(line.startswith("Content-Length") for line in get)


@pytest.mark.parametrize(
    ("says", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", b"hello"),
        (b"HTTP/1.1 200\r\ncontent-length:5\r\n\r\nhello", b"hello"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n",
            b"hello",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nExpires: 0\r\n\r\n",
            b"hello",
        ),
        (
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
            b"hello",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    ],
    ids=["length", "no reason", "chunks", "trailers", "100 first", "empty"],
)
def test_a_reply_is_read_whole_and_its_connection_used_again(says: bytes, body: bytes) -> None:
    server = Canned(says)

    async def speak(connections: Connections) -> None:
        for _ in range(3):
            reply = await connections.send("POST", "/ask", b"{}")
            assert (reply.status, reply.body) == (200, body)

    talk(server, speak)
    assert (len(server.heard), server.connections) == (3, 1)


@pytest.mark.parametrize(
    "says",
    [
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
    ],
    ids=["until it closes", "HTTP/1.0", "says close"],
)
def test_a_connection_that_the_server_closes_is_not_used_again(says: bytes) -> None:
    server = Canned(says, closes=True)

    async def speak(connections: Connections) -> None:
        for _ in range(2):
            assert (await connections.send("POST", "/ask", b"{}")).body == b"hello"

    talk(server, speak)
    assert server.connections == 2


def test_the_names_of_headers_are_read_in_any_case() -> None:
    reply = reply_to(b"HTTP/1.1 429 No\r\nRETRY-after:  7 \r\nContent-Length: 2\r\n\r\n{}")
    assert (reply.status, reply.headers["retry-after"], reply.json()) == (429, "7", {})


@pytest.mark.parametrize(
    ("says", "words"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello", "closed before the reply was whole"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhello", "closed before"),
        (b"", "closed before"),
        (b"HTTP/1.1 2", "closed before"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "not HTTP"),
        (b"HTTP/2 200\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n", "not HTTP"),
        (b"x" * (1 << 21), "not HTTP"),
    ],
    ids=[
        "half a body", "half a chunk", "nothing", "half a line", "SSH", "HTTP/2", "length", "chunk size",
        "endless head",
    ],
)  # fmt: skip
def test_a_reply_that_is_not_whole_can_be_asked_for_again(says: bytes, words: str) -> None:
    with pytest.raises(Retryable, match=words) as caught:
        reply_to(says, closes=True)
    assert not caught.value.lost


# --- connections ---------------------------------------------------------------------------------


def test_no_more_connections_are_opened_than_requests_were_in_flight() -> None:
    server = Canned(waits=lambda number: asyncio.sleep(0.01))

    async def speak(connections: Connections) -> None:
        for _ in range(3):
            await asyncio.gather(*(connections.send("POST", "/ask", b"{}") for _ in range(5)))

    talk(server, speak)
    assert (len(server.heard), server.connections) == (15, 5)


def test_bytes_after_a_reply_are_no_reply_to_the_next_request() -> None:
    server = Canned(says=PLAIN + PLAIN.replace(b"{}", b"[]"))

    async def speak(connections: Connections) -> None:
        for _ in range(2):
            assert (await connections.send("POST", "/ask", b"{}")).body == b"{}"

    talk(server, speak)
    assert server.connections == 2


def test_a_connection_that_was_closed_meanwhile_costs_no_request() -> None:
    server = Canned(closes=True)

    async def speak(connections: Connections) -> None:
        for _ in range(3):
            assert (await connections.send("POST", "/ask", b"{}")).status == 200
            await asyncio.sleep(0.05)  # without a word in the reply, the server closes

    talk(server, speak)
    assert server.connections == 3


def test_a_request_that_was_given_up_leaves_its_reply_to_nobody() -> None:
    server = Canned(waits=lambda number: asyncio.sleep(0.2 if number == 0 else 0))

    async def speak(connections: Connections) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await connections.send("POST", "/first", b"{}")
        await connections.send("POST", "/second", b"{}")

    talk(server, speak)
    assert server.connections == 2


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "https://127.0.0.1:{port}"])
def test_a_server_that_is_not_reached_is_lost(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "mtgdm.teachers.connections.CONNECT_TIMEOUT_S", 0.2
    )  # who speaks no TLS may be silent

    async def speak(connections: Connections) -> None:
        with pytest.raises(Retryable, match="no connection") as caught:
            await connections.send("GET", "/")
        assert caught.value.lost

    talk(Canned(), speak, url=url)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_server_is_asked_over_tls_where_its_certificate_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=teacher", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        ["openssl", "req", "-x509", *kind, *name, "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    server = Canned(tls=tls)

    async def refused(connections: Connections) -> None:
        with pytest.raises(Retryable, match="certificate") as caught:
            await connections.send("GET", "/")
        assert caught.value.lost

    async def taken(connections: Connections) -> None:
        for _ in range(2):
            assert (await connections.send("POST", "/ask", b"{}")).json() == {}

    talk(server, refused, url="https://127.0.0.1:{port}")
    assert server.heard == []
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    before = server.connections
    talk(server, taken, url="https://127.0.0.1:{port}")
    assert (len(server.heard), server.connections - before) == (2, 1)


@pytest.mark.parametrize("kind", ["missing", "no certificates"])
def test_certificates_that_cannot_be_read_are_named_by_their_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tmp_path / "cacert.pem"
    if kind == "no certificates":
        path.write_text("nothing\n", encoding="utf-8")
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    with pytest.raises(SettingError, match=re.escape(f"SSL_CERT_FILE names {path}")):
        connections_to(httpx.URL("https://127.0.0.1:9"), {})


# --- proxies -------------------------------------------------------------------------------------


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    def set_proxies(**names: str) -> None:
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return set_proxies


def test_a_request_goes_through_the_proxy_that_the_environment_names(proxies: Callable[..., None]) -> None:
    proxy = Canned(b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"from": "it"}')

    async def run() -> None:
        async with proxy:
            proxies(HTTP_PROXY=f"http://127.0.0.1:{proxy.port}")
            connections = connections_to(httpx.URL("http://teacher.invalid:11434"), {"X-Own": "yes"})
            reply = await connections.send("POST", "/api/chat", b'{"model": "m"}')
            await connections.aclose()
        assert reply.json() == {"from": "it"}

    asyncio.run(run())
    (heard,) = proxy.heard
    assert heard.startswith(b"POST http://teacher.invalid:11434/api/chat HTTP/1.1\r\n")
    assert b"x-own: yes\r\n" in heard.lower()
    assert heard.endswith(b'\r\n\r\n{"model": "m"}')


def test_a_proxy_that_lets_nobody_through_leaves_the_server_unreached(proxies: Callable[..., None]) -> None:
    proxy = Canned(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")

    async def run() -> None:
        async with proxy:
            proxies(ALL_PROXY=f"http://127.0.0.1:{proxy.port}")
            connections = connections_to(httpx.URL("https://teacher.invalid"), {})
            with pytest.raises(Retryable, match="407 Proxy Authentication Required") as caught:
                await connections.send("GET", "/v1/models")
            await connections.aclose()
        assert caught.value.lost

    asyncio.run(run())
    assert proxy.heard[0].startswith(b"CONNECT teacher.invalid:443 HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("url", "proxy"),
    [
        ("http://teacher.lan:8000", "http://proxy:3128"),
        ("https://teacher.lan", "http://all:3128"),
        ("http://gpu.inside.lan", None),
        ("http://localhost:11434", None),
        ("http://127.0.0.1:11434", None),
        ("http://127.8.8.8:11434", None),
        ("http://[::1]:11434", None),
    ],
)
def test_the_proxy_of_a_server(url: str, proxy: str | None, proxies: Callable[..., None]) -> None:
    proxies(HTTP_PROXY="proxy:3128", ALL_PROXY="http://all:3128", NO_PROXY="other.lan,.inside.lan")
    assert proxy_to(httpx.URL(url)) == proxy


def test_without_a_proxy_there_is_none(proxies: Callable[..., None]) -> None:
    assert proxy_to(httpx.URL("http://teacher.lan")) is None


def test_a_proxy_that_cannot_be_used_is_a_wrong_setting_that_shows_no_password(
    proxies: Callable[..., None],
) -> None:
    proxies(HTTP_PROXY="gopher://name:secret@proxy:70")
    with pytest.raises(SettingError, match=r"the proxy for teacher\.lan cannot be used") as caught:
        connections_to(httpx.URL("http://teacher.lan"), {})
    assert "secret" not in str(caught.value)
    assert "which HTTP_PROXY=gopher://proxy:70 names" in str(caught.value)
    assert "NO_PROXY=teacher.lan" in (caught.value.hint or "")
