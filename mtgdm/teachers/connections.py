"""HTTP to one server: a question is written, its reply read whole, over connections that stay open."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import urllib.request
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import h11
import httpx

from mtgdm.errors import SettingError
from mtgdm.teachers.seam import Retryable

CONNECT_TIMEOUT_S = 10.0
READ_BYTES = 1 << 16


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
    """Sockets of asyncio, HTTP/1.1 of h11: one connection for each request in flight, the one used last taken first.

    httpx and httpcore, which speak HTTP through h11 too, cost several times the CPU: objects for every header
    and URL, and a shared pool that is looked through at every request and every close.
    """

    def __init__(self, url: httpx.URL, headers: dict[str, str]) -> None:
        if url.userinfo:
            headers = {"Authorization": f"Basic {b64encode(url.userinfo).decode('ascii')}"} | headers
        lines = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"} | headers
        self._headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in lines.items()]
        self._url = url
        self._tls = httpx.create_ssl_context() if url.scheme == "https" else None
        self._idle: list[_Connection] = []
        # Making one costs a third of h11's share: requests of one length are alike, and never change.
        self._request = lru_cache(maxsize=2048)(self._new_request)

    async def send(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """One request over an idle connection, or a new one."""
        connection = await self._open()
        try:
            length = None if body is None else len(body)
            return await connection.send(self._request(method, path, length), body)
        except h11.RemoteProtocolError as error:
            if connection.closed:
                raise Retryable("the connection was closed before the reply was whole") from error
            raise Retryable(f"the reply is not HTTP: {error}") from error
        except OSError as error:
            raise Retryable(f"the connection was lost: {error}") from error
        finally:
            # What was cancelled halfway would answer the next question with the reply to this one.
            if connection.ready:
                self._idle.append(connection)
            else:
                connection.abort()

    async def aclose(self) -> None:
        """Close every idle connection."""
        while self._idle:
            self._idle.pop().abort()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    def _new_request(self, method: str, path: str, length: int | None) -> h11.Request:
        sized = [] if length is None else [(b"Content-Length", b"%d" % length)]
        target = _under(self._url, path).raw_path
        return h11.Request(method=method, target=target, headers=self._headers + sized)

    async def _open(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
            connection.abort()
        port = self._url.port or (443 if self._tls else 80)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                return _Connection(
                    *await asyncio.open_connection(self._url.raw_host.decode("ascii"), port, ssl=self._tls)
                )
        except TimeoutError as error:
            raise Retryable(f"no connection within {CONNECT_TIMEOUT_S:g} s", lost=True) from error
        except OSError as error:
            raise Retryable(f"no connection: {error}", lost=True) from error


class _Connection:
    """One connection, for one request at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(h11.CLIENT)
        self.ready = True
        """Whether it can carry another request: the last reply came whole, and the server holds the line."""

    @property
    def closed(self) -> bool:
        """Whether the other side has hung up."""
        return self._reader.at_eof() or self._reader.exception() is not None or self._writer.is_closing()

    async def send(self, request: h11.Request, body: bytes | None) -> Reply:
        """One request and its whole reply; OSError or h11's RemoteProtocolError where none comes."""
        self.ready = False
        parts = [request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()]
        self._writer.write(b"".join(self._http.send(part) or b"" for part in parts))
        head, chunks = None, []
        while not isinstance(event := await self._event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                chunks.append(event.data)
        assert head is not None  # h11 lets no message end that did not begin
        more, _ = self._http.trailing_data  # which the next request would get as its reply
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE and not more:
            self._http.start_next_cycle()
            self.ready = True
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        return Reply(head.status_code, headers, b"".join(chunks))

    async def _event(self) -> h11.Event:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._reader.read(READ_BYTES))
        assert isinstance(event, h11.Event)  # PAUSED comes only to those who go on without a new cycle
        return event

    def abort(self) -> None:
        """Close it at once."""
        self._writer.transport.abort()


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
