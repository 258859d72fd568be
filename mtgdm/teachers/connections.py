"""A transport for httpx that holds one plain connection for each request in flight."""

from __future__ import annotations

import ssl
from typing import NoReturn

import httpcore
import httpx

_FAILURES = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.UnsupportedProtocol,
)


class Connections(httpx.AsyncBaseTransport):
    """Connections without a pool around them, the one used last taken first.

    The shared pool of httpx looks through all its connections at every request and every close: 3 ms of
    CPU a row at 64 in flight, this a fifth of it. Bodies are read whole: no answer here is streamed.
    """

    def __init__(self) -> None:
        self._idle: dict[tuple[bytes, bytes, int], list[httpcore.AsyncHTTPConnection]] = {}
        self._tls: ssl.SSLContext | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request over an idle connection, or a new one, and read the whole response."""
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        origin = url.origin
        idle = self._idle.setdefault((origin.scheme, origin.host, origin.port), [])
        connection = await self._open(origin, idle)
        try:
            response = await connection.handle_async_request(
                httpcore.Request(
                    method=request.method,
                    url=url,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
            body = await response.aread()
            await response.aclose()
        except _FAILURES as error:
            _raise_as_httpx(error, request)
        finally:
            # A request cancelled before it was sent leaves an open connection that nobody else would close.
            if connection.is_idle() and not connection.is_closed():
                idle.append(connection)
            else:
                await connection.aclose()
        return httpx.Response(
            response.status,
            headers=response.headers,
            stream=httpx.ByteStream(body),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        """Close every idle connection."""
        for idle in self._idle.values():
            while idle:
                await idle.pop().aclose()

    async def _open(
        self, origin: httpcore.Origin, idle: list[httpcore.AsyncHTTPConnection]
    ) -> httpcore.AsyncHTTPConnection:
        while idle:
            connection = idle.pop()
            if connection.is_idle() and not connection.has_expired():
                return connection
            await connection.aclose()
        if origin.scheme == b"https" and self._tls is None:
            self._tls = httpx.create_ssl_context()
        return httpcore.AsyncHTTPConnection(origin, ssl_context=self._tls)


def _raise_as_httpx(error: Exception, request: httpx.Request) -> NoReturn:
    # Both libraries give the same names to the same failures.
    kind: type[httpx.RequestError] = getattr(httpx, type(error).__name__)
    raise kind(str(error), request=request) from error
