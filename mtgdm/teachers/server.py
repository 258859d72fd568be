"""What teachers behind HTTP share: the server's address, and replies read whole or refused with a reason."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import httpx
from pydantic_core import to_json

from mtgdm.errors import SettingError
from mtgdm.rows import encode
from mtgdm.teachers.connections import Reply, connections_to
from mtgdm.teachers.seam import Backend, Completion, Refused, Retryable, Unavailable
from mtgdm.teachers.tokens import PromptCounts

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.teachers.seam import TeacherSettings

CHECK_TIMEOUT_S = 30.0
_PASSING = frozenset({408, 425, 429, 499})
_OVERLOADED = frozenset({429, 503, 529})
_FOR_EVERY_QUESTION = frozenset({401, 402, 403, 404, 405, 407})
_LONGEST_WORDS = 300
_TITLE = re.compile(r"<title[^>]*>([^<]+)", re.IGNORECASE)
_TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)


class ServerBackend(Backend):
    """A teacher asked over HTTP; its failures become Retryable, Refused or Unavailable here."""

    has_url: ClassVar[bool] = True
    kind: ClassVar[str]
    """What the server is called in messages."""
    start_hint: ClassVar[str]
    """How a server that does not answer is started or named."""
    paths: ClassVar[tuple[str, ...]]
    """Ends of an address that a user may copy along, and that are not the server's own."""

    def __init__(
        self, settings: TeacherSettings, domain: Domain, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(settings, domain)
        if not settings.model:
            raise SettingError(f"the teacher backend {settings.backend} needs a model", hint="--model NAME")
        self._url = httpx.URL(server_url(settings.url[0], self.paths))
        self._transport = transport
        self._counts = PromptCounts()

    async def __aenter__(self) -> Self:
        headers = {"Content-Type": "application/json", "Accept": "application/json"} | self._headers()
        self._connections = connections_to(self._url, headers, self._transport)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._connections.aclose()

    @property
    def place(self) -> str:
        """The address as it is asked, without a name and a password."""
        return str(self._url.copy_with(userinfo=b""))

    @property
    def _secret(self) -> str:
        """What no message may show; empty where there is nothing to hide."""
        return ""

    def _headers(self) -> dict[str, str]:
        """More headers of every request."""
        return {}

    @abstractmethod
    def _missing_model(self) -> Unavailable:
        """What to say where the server does not have the model."""

    async def _ask(self, path: str, body: dict[str, Any]) -> Reply:
        """One question; the loop above times it."""
        return await self._send("POST", path, _encoded(body))

    async def _check(self, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        """A first request: a server that is not there stops the run, one that is busy says so."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                reply = await self._send(method, path, _encoded(body) if body else None)
        except TimeoutError as error:
            raise Retryable(f"no answer within {CHECK_TIMEOUT_S:g} s") from error
        except Retryable as error:
            if not error.lost:
                raise
            # The rest of what can be wrong says no more than that nobody is there.
            told = isinstance(error.__cause__, ssl.SSLError | socket.gaierror | httpx.ProxyError)
            words = f": {error}" if told else ""
            raise Unavailable(
                f"no {self.kind} server answers at {self.place}{words}", hint=self.start_hint
            ) from error
        if reply.status in _OVERLOADED:
            self._raise_for(reply)
        return reply

    async def _send(self, method: str, path: str, body: bytes | None) -> Reply:
        return replace(await self._connections.send(method, path, body), secret=self._secret)

    def _raise_for(self, reply: Reply) -> None:
        """What an answer other than 200 means."""
        status = reply.status
        if status == 200:
            return
        text = said(reply)
        if status in _PASSING or status >= 500:
            raise Retryable(
                f"HTTP {status}: {text}",
                retry_after_s=_retry_after_s(reply),
                overloaded=status in _OVERLOADED,
            )
        if status == 404 and speaks_of_the_model(reply):
            raise self._missing_model()
        if 300 <= status < 400:
            target = reply.headers.get("location", "elsewhere")
            raise Unavailable(
                f"{self.place} sends questions on to {target}", hint="name the server itself with --url"
            )
        if status in _FOR_EVERY_QUESTION:
            self._raise_unavailable(status, text)
        raise Refused(f"HTTP {status}: {text}")

    def _raise_unavailable(self, status: int, text: str) -> NoReturn:
        raise Unavailable(
            f"{self.place} answers HTTP {status}: {text}",
            hint=f"is this the {self.kind} server? name it with --url",
        )

    def _raise_where_cut(self, messages: Sequence[Message], completion: Completion, hint: str) -> None:
        """A prompt that the server shortened without a word is given away by its count of tokens."""
        seen = completion.prompt_tokens
        if seen is not None and (least := self._counts.least(messages, seen)) is not None:
            raise Refused(f"the prompt was cut: the server saw {seen} tokens of at least {least}", hint=hint)


def server_url(given: str, paths: Sequence[str] = ()) -> str:
    """A server's address as a user may write it: `localhost:11434`, with a slash, with the path of an API."""
    text = given.strip()
    if "://" not in text:
        text = f"http://{text}"
    text = text.rstrip("/")
    for ending in paths:
        text = text.removesuffix(ending)
    try:
        url = httpx.URL(text)
        url.raw_host.decode("ascii").encode("idna")  # as sockets do: labels that are empty or too long
    except (httpx.InvalidURL, UnicodeError) as error:
        raise SettingError(
            f"'{given}' is no address of a server: {error}", hint="http://localhost:11434"
        ) from error
    no_port = url.port is not None and not 0 < url.port < 1 << 16
    if url.scheme not in ("http", "https") or not url.host or no_port:
        raise SettingError(f"'{given}' is no address of a server", hint="http://localhost:11434")
    return text


@cache
def schema_of(contract: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema that a server holds an answer to."""
    return contract.model_json_schema()


def reply_object(reply: Reply) -> dict[str, Any]:
    """The reply as an object; half a body, HTML or an error under status 200 can all pass."""
    try:
        value = reply.json()
    except ValueError as error:  # invalid UTF-8 is one too
        if _is_web_page(reply):
            raise Retryable(
                f"the reply is not JSON but a web page ({said(reply)}): a proxy or a login page answers"
            ) from error
        raise Retryable(f"the reply is not JSON but {said(reply)}") from error
    if not isinstance(value, dict):
        raise Retryable(f"the reply is no JSON object but {type(value).__name__}")
    if value.get("error"):
        raise Retryable(f"the server says: {said(reply)}")
    return value


def said(reply: Reply) -> str:
    """The server's own words for what is wrong: `{"error": "..."}`, `{"error": {"message": "..."}}`, or the body."""
    text = reply.text
    if _is_web_page(reply):
        title = _TITLE.search(text)
        text = title[1] if title else _TAG.sub(" ", text)
    else:
        with suppress(ValueError):
            text = _error_text(reply.json()) or text
    return _beginning(text.replace(reply.secret, "***") if reply.secret else text)


def speaks_of_the_model(reply: Reply) -> bool:
    """Whether a 404 is about the model rather than the path."""
    text = said(reply)
    return "model" in text and ("not found" in text or "not exist" in text)


def count(reply: dict[str, Any], key: str) -> int | None:
    """A count of the reply, which some servers leave out."""
    value = reply.get(key)
    return value if isinstance(value, int) else None


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return to_json(body)  # a third of the time of json.dumps
    except ValueError:  # a lone surrogate
        return encode(body)


def _error_text(value: Any) -> str:
    """The words inside `{"error": ...}`; Ollama hands on what llama-server said as JSON in a text."""
    error = value.get("error") or value.get("detail") if isinstance(value, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        error = error["message"]
    if isinstance(error, str) and error.lstrip().startswith("{"):
        try:
            return _error_text(json.loads(error)) or error
        except (ValueError, RecursionError):
            return error
    return str(error) if error else ""


def _is_web_page(reply: Reply) -> bool:
    return "html" in reply.headers.get("content-type", "") or reply.body[:100].lstrip()[:1] == b"<"


def _beginning(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST_WORDS else f"{words[:_LONGEST_WORDS]}…"


def _retry_after_s(reply: Reply) -> float | None:
    """Seconds of a Retry-After header, which may also be a date."""
    given = reply.headers.get("retry-after", "")
    try:
        return max(0.0, float(given))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(given)
    except (ValueError, OverflowError):
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())
