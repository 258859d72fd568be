"""HTTP to one server: a question is written, its reply read whole, over connections that stay open."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import urllib.request
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx

from mtgdm.errors import SettingError
from mtgdm.teachers.seam import Retryable

CONNECT_TIMEOUT_S = 10.0
_READ_AHEAD = 1 << 20
"""Bytes that are taken from a socket before they are asked for, and the longest head of a reply."""


@dataclass(frozen=True)
class Reply:
    """What a server sent back; the names of the headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @cached_property
    def text(self) -> str:
        """The body as text, whatever it is."""
        return self.body.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body's JSON; ValueError where it is none, invalid UTF-8 included."""
        try:
            return json.loads(self.body)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error


class Connections(ABC):
    """A way to a server, used by several tasks at once."""

    @abstractmethod
    async def send(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """One request, without a limit of time; Retryable where no whole reply comes.

        `path` goes behind the path of the server's address.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close what is open."""


def connections_to(
    url: httpx.URL, headers: dict[str, str], transport: httpx.AsyncBaseTransport | None = None
) -> Connections:
    """The plain way to a server; over httpx where a proxy stands in between, or a test's transport."""
    proxy = None if transport else proxy_to(url)
    if transport or proxy:
        return ThroughHttpx(url, headers, proxy=proxy, transport=transport)
    return Direct(url, headers)


def proxy_to(url: httpx.URL) -> str | None:
    """The proxy that the environment (or the system of Windows and macOS) names for a server, if any."""
    if _is_this_machine(url.host) or urllib.request.proxy_bypass(url.netloc.decode("ascii")):
        return None
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _under(url: httpx.URL, path: str) -> httpx.URL:
    return url.copy_with(path=url.path.rstrip("/") + path)


class Direct(Connections):
    """HTTP/1.1 over asyncio's streams: one connection for each request in flight, the one used last taken first.

    A shared httpx client costs ten times the CPU: objects for every header and URL, and a pool that is
    looked through at every request and every close.
    """

    def __init__(self, url: httpx.URL, headers: dict[str, str]) -> None:
        if url.userinfo:
            headers = {"Authorization": f"Basic {b64encode(url.userinfo).decode('ascii')}"} | headers
        lines = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"} | headers
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("ascii")
        self._heads: dict[tuple[str, str], bytes] = {}
        self._url = url
        self._tls = httpx.create_ssl_context() if url.scheme == "https" else None
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """One request over an idle connection, or a new one."""
        reader, writer = await self._open()
        usable = False
        try:
            writer.write(self._request(method, path, body))
            reply, usable = await _read(reader)
        except EOFError as error:
            raise Retryable("the connection was closed before the reply was whole") from error
        except OSError as error:
            raise Retryable(f"the connection was lost: {error}") from error
        except (ValueError, asyncio.LimitOverrunError) as error:
            raise Retryable(f"the reply is not HTTP: {error}") from error
        finally:
            # What was cancelled halfway would answer the next question with the reply to this one.
            if usable:
                self._idle.append((reader, writer))
            else:
                writer.transport.abort()
        return reply

    async def aclose(self) -> None:
        """Close every idle connection."""
        for _, writer in self._idle:
            writer.transport.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        head = self._heads.get((method, path))
        if head is None:
            target = _under(self._url, path).raw_path.decode("ascii")
            head = f"{method} {target} HTTP/1.1\r\n".encode("ascii") + self._fields
            self._heads[method, path] = head
        return head + b"\r\n" if body is None else b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer = self._idle.pop()
            if not (reader.at_eof() or reader.exception() or writer.is_closing()):
                return reader, writer
            writer.transport.abort()
        port = self._url.port or (443 if self._tls else 80)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return await asyncio.open_connection(
                    self._url.raw_host.decode("ascii"), port, ssl=self._tls, limit=_READ_AHEAD
                )
        except TimeoutError as error:
            raise Retryable(f"no connection within {CONNECT_TIMEOUT_S:g} s", lost=True) from error
        except OSError as error:
            raise Retryable(f"no connection: {error}", lost=True) from error


async def _read(reader: asyncio.StreamReader) -> tuple[Reply, bool]:
    """A reply, and whether its connection can carry another request; ValueError where it is not HTTP/1."""
    status = 100
    while status < 200:  # 100 Continue and its like come before the reply
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.removesuffix("\r\n\r\n").split("\r\n")
        version, code = line.split(" ", 2)[:2]
        if version not in ("HTTP/1.1", "HTTP/1.0"):
            raise ValueError(line[:80])
        status = int(code)
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    usable = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    if status in (204, 304):
        body = b""
    elif "chunked" in headers.get("transfer-encoding", "").lower():
        body = await _chunks(reader)
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    else:
        body, usable = await reader.read(), False
    return Reply(status, headers, body), usable


async def _chunks(reader: asyncio.StreamReader) -> bytes:
    chunks = []
    while size := int((await reader.readuntil(b"\n")).partition(b";")[0], 16):
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    while (await reader.readuntil(b"\n")).strip():
        pass  # trailers say nothing here
    return b"".join(chunks)


class ThroughHttpx(Connections):
    """The same over httpx, which knows the ways through proxies, and whose transports tests may fake."""

    def __init__(
        self,
        url: httpx.URL,
        headers: dict[str, str],
        *,
        proxy: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url
        try:
            self._client = httpx.AsyncClient(
                headers=headers,
                proxy=proxy,
                transport=transport,
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
                limits=httpx.Limits(max_connections=None),
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise SettingError(
                f"the proxy for {url.host} cannot be used: {error}",
                hint=f"it comes from the environment (HTTP_PROXY and the like); NO_PROXY={url.host} goes without",
            ) from error

    async def send(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """One request through httpx."""
        try:
            response = await self._client.request(method, _under(self._url, path), content=body)
        except httpx.RequestError as error:
            lost = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
            raise Retryable(f"{type(error).__name__}: {error}".rstrip(": "), lost=lost) from error
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Reply(response.status_code, headers, response.content)

    async def aclose(self) -> None:
        """Close the client."""
        await self._client.aclose()
