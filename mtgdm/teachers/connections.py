"""HTTP to one server: a question is written, its reply read whole, over connections that stay open."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import ssl
import urllib.request
from abc import ABC, abstractmethod
from base64 import b64encode
from functools import cache
from pathlib import Path

import httpx

from mtgdm.errors import SettingError
from mtgdm.manifest import without_password
from mtgdm.teachers.http import BodyReader, Connection, NotHttp, Reply, most_bytes, whole_reply
from mtgdm.teachers.seam import Retryable

__all__ = ["BodyReader", "Connections", "Direct", "Reply", "ThroughHttpx", "connections_to", "proxy_to"]

CONNECT_TIMEOUT_S = 10.0


class Connections(ABC):
    """A way to a server, used by several tasks at once."""

    @abstractmethod
    async def send(
        self, method: str, path: str, body: bytes | None = None, reader: BodyReader | None = None
    ) -> Reply:
        """One request, without a limit of time; Retryable where no whole reply comes.

        `path` goes behind the path of the server's address. A `reader` that takes the body gets it piece by piece,
        and the Reply then has none.
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


def _said_of_proxy(url: httpx.URL) -> str:
    """The variable of the environment that names the proxy of a server, and its value without a password."""
    names = (f"{kind}_proxy" for kind in (url.scheme, "all"))
    for name in (spelled for one in names for spelled in (one, one.upper())):
        if value := os.environ.get(name):
            return f"{name}={without_password(value)}"
    return "the system's settings"


def tls_context() -> ssl.SSLContext:
    """What certificates are checked with; SettingError where the environment names some that cannot be read."""
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        named = os.environ.get(variable)
        if named and not Path(named).exists():
            raise SettingError(
                f"the environment variable {variable} names {named}, which is not there",
                hint=f"unset {variable}, or name a PEM file of certificates",
            )
    try:
        return httpx.create_ssl_context()
    except (OSError, ssl.SSLError) as error:
        given = next((one for one in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(one)), None)
        if given is None:
            raise
        raise SettingError(
            f"the environment variable {given} names {os.environ[given]}, which holds no certificates: {error}",
            hint=f"unset {given}, or name a PEM file of certificates",
        ) from error


def _is_this_machine(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _under(url: httpx.URL, path: str) -> httpx.URL:
    return url.copy_with(path=url.path.rstrip("/") + path)


class Direct(Connections):
    """Sockets of asyncio and our own HTTP/1.1: a connection for each request in flight, the one used last first.

    httpx, httpcore and h11 cost several times the CPU: objects for every header, URL and piece of a body, which
    a streamed answer has one of for each token, and a shared pool that is looked through at every request.
    """

    def __init__(self, url: httpx.URL, headers: dict[str, str]) -> None:
        if url.userinfo:
            headers = {"Authorization": f"Basic {b64encode(url.userinfo).decode('ascii')}"} | headers
        lines = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"} | headers
        if any(character in "\r\n\0" for value in lines.values() for character in value):
            raise SettingError("a header of the requests holds a line break")
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("ascii")
        self._url = url
        self._tls = tls_context() if url.scheme == "https" else None
        self._idle: list[Connection] = []
        self._target = cache(lambda path: _under(url, path).raw_path)

    async def send(
        self, method: str, path: str, body: bytes | None = None, reader: BodyReader | None = None
    ) -> Reply:
        """One request over an idle connection, or a new one."""
        connection = await self._open()
        try:
            return await connection.send(self._request(method, path, body), reader)
        except NotHttp as error:
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

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        target: bytes = self._target(path)
        length = b"" if body is None else b"Content-Length: %d\r\n" % len(body)
        head = b"%b %b HTTP/1.1\r\n%b%b\r\n" % (method.encode("ascii"), target, self._headers, length)
        return head if body is None else head + body

    async def _open(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
            connection.abort()
        port = self._url.port or (443 if self._tls else 80)
        host = self._url.raw_host.decode("ascii")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, made = await asyncio.get_running_loop().create_connection(
                    Connection, host, port, ssl=self._tls
                )
                return made
        except TimeoutError as error:
            raise Retryable(f"no connection within {CONNECT_TIMEOUT_S:g} s", lost=True) from error
        except OSError as error:
            raise Retryable(f"no connection: {error}", lost=True) from error


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
                verify=tls_context() if url.scheme == "https" and transport is None else True,
                timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
                limits=httpx.Limits(max_connections=None),
            )
        except (ValueError, ImportError, httpx.InvalidURL) as error:
            raise SettingError(
                f"the proxy for {url.host} cannot be used, which {_said_of_proxy(url)} names: {error}",
                hint=f"name one as http://HOST:PORT; NO_PROXY={url.host} goes without",
            ) from error

    async def send(
        self, method: str, path: str, body: bytes | None = None, reader: BodyReader | None = None
    ) -> Reply:
        """One request through httpx."""
        try:
            async with self._client.stream(method, _under(self._url, path), content=body) as response:
                headers = {name.lower(): value for name, value in response.headers.items()}
                return await _read(response, headers, reader)
        except httpx.RequestError as error:
            lost = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
            raise Retryable(f"{type(error).__name__}: {error}".rstrip(": "), lost=lost) from error

    async def aclose(self) -> None:
        """Close the client."""
        await self._client.aclose()


async def _read(response: httpx.Response, headers: dict[str, str], reader: BodyReader | None) -> Reply:
    status = response.status_code
    if reader is not None and reader.begins(status, headers):
        async for data in response.aiter_bytes():
            if reader.feed(data):
                break
        return Reply(status, headers, b"")
    limit = most_bytes(status, reader)
    body = bytearray()
    async for data in response.aiter_bytes():
        body += data
        if len(body) > limit:
            break
    return whole_reply(status, headers, bytes(body), limit)
