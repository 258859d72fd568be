"""What teachers behind HTTP share: the server's address, and replies read whole or refused with a reason."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import httpx
from pydantic_core import to_json

from mtgdm.errors import SettingError
from mtgdm.rows import encode
from mtgdm.teachers.adjustments import Adjustments
from mtgdm.teachers.connections import BodyReader, Reply, connections_to
from mtgdm.teachers.finish import Finish
from mtgdm.teachers.seam import Backend, Completion, Refused, Retryable, Unavailable
from mtgdm.teachers.tokens import PromptCounts, prompt_at_least
from mtgdm.teachers.words import (
    is_web_page,
    said,
    speaks_of_context,
    speaks_of_filter,
    speaks_of_key,
    speaks_of_model,
)

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.teachers.seam import Options, TeacherSettings
    from mtgdm.teachers.streams import AnswerReader

CHECK_TIMEOUT_S = 30.0
_PASSING = frozenset({408, 425, 429, 499})
_OVERLOADED = frozenset({429, 503, 529})
_FOR_EVERY_QUESTION = frozenset({401, 402, 403, 404, 405, 407})
LARGEST_COUNT = 1 << 31
UNCACHED_BELOW = 128
UNCACHED_SHARE = 0.1
"""A count of so few tokens, and of so small a share of the least that a prompt has, is no cut prompt: no context is
that short. Servers that count only what they had not cached say such."""


class ServerBackend(Backend):
    """A teacher asked over HTTP; its failures become Retryable, Refused or Unavailable here."""

    has_url: ClassVar[bool] = True
    kind: ClassVar[str]
    """What the server is called in messages."""
    start_hint: ClassVar[str]
    """How a server that does not answer is started or named."""
    paths: ClassVar[tuple[str, ...]]
    """Ends of an address that a user may copy along, and that are not the server's own."""
    chat_path: ClassVar[str]
    """Where questions go."""
    schema_key: ClassVar[str]
    """The field of a request that holds an answer to a schema."""
    context_hint: ClassVar[str]
    """What makes room for a question that does not fit into the context."""

    def __init__(
        self, settings: TeacherSettings, domain: Domain, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(settings, domain)
        if not settings.model:
            raise SettingError(f"the teacher backend {settings.backend} needs a model", hint="--model NAME")
        self._url = httpx.URL(server_url(settings.url[0], self.paths))
        self._transport = transport
        self._counts = PromptCounts()
        self._counts_uncached = False
        self._adjustments = Adjustments(self.schema_key, lambda text: self.tell(f"{self.place} {text}"))

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

    @property
    def adjustments(self) -> list[str]:
        """How this server is asked otherwise than the settings say."""
        return self._adjustments.made

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Ask once, and once more for each part of the question that the server does not take."""
        started = time.perf_counter()
        adjustments = self._adjustments
        unconstrained = ""
        while True:
            request = adjustments.apply(
                merged(self._request(messages, contract, options), self.settings.extra_body)
            )
            if unconstrained:
                request.pop(self.schema_key, None)
            reader = self._reader(options)
            reply = self._read(await self._send("POST", self.chat_path, _encoded(request), reader), reader)
            if reply.status == 200:
                break
            if adjustments.learn(request, reply):
                continue
            if not unconstrained and adjustments.suspects_schema(request, reply.status, options.row.id):
                unconstrained = f"HTTP {reply.status}: {said(reply)}"
                continue
            self._raise_for(reply)
        if unconstrained:
            adjustments.leave_out_schema(unconstrained)
        adjustments.answered(request)
        self.holds_to_schema = adjustments.holds_to_schema
        completion = self._completion(reader, round(time.perf_counter() - started, 6))
        if adjustments.made:
            completion = replace(completion, adjusted=", ".join(adjustments.made))
        self._check_counts(messages, completion)
        return completion

    @abstractmethod
    def _request(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> dict[str, Any]:
        """One question as this kind of server takes it."""

    @abstractmethod
    def _reader(self, options: Options) -> AnswerReader:
        """What reads its reply."""

    @abstractmethod
    def _ended(self, reader: AnswerReader) -> Completion:
        """What a reply that was read to its end holds, without its seconds; Retryable where it broke off."""

    def _read(self, reply: Reply, reader: AnswerReader) -> Reply:
        """Read what the connection did not hand over piece by piece; a failed stream becomes its error."""
        if reply.status != 200:
            return reply
        if not reply.body:
            reader.finish()
        else:
            reader.whole = True
            if not reader.read_lines(reply):
                reader.take(reply_object(reply))
            reader.watch.alive()
        failed = reader.failed
        if failed is None:
            return reply
        failed = replace(failed, secret=self._secret)
        if reader.pieces == 0 and failed.status != 200:
            return failed
        raise Retryable(f"the server says: {said(failed)}")

    def _completion(self, reader: AnswerReader, seconds: float) -> Completion:
        if reader.stopped and reader.whole:  # it is lost all the same, and its tokens were counted
            return replace(self._ended(reader), finish_reason=Finish.STOPPED, seconds=seconds)
        if reader.stopped:
            return Completion(reader.text, Finish.STOPPED, None, reader.pieces, seconds)
        if reader.overlong:
            return Completion(reader.text, Finish.LENGTH, None, reader.pieces, seconds)
        return replace(self._ended(reader), seconds=seconds)

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

    async def _send(
        self, method: str, path: str, body: bytes | None, reader: BodyReader | None = None
    ) -> Reply:
        """One request; the loop above times it."""
        reply = await self._connections.send(method, path, body, reader)
        secret = self._secret
        return replace(reply, secret=secret) if secret else reply

    def _raise_for(self, reply: Reply) -> None:
        """What a status other than 200 means."""
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
        if status in (400, 404, 422) and speaks_of_model(text):
            raise self._missing_model()
        if status in (400, 403, 422) and speaks_of_filter(text):
            raise Refused(f"the server's content filter refuses it: HTTP {status}: {text}")
        if status in (400, 413, 422) and speaks_of_context(text):
            raise Refused(f"HTTP {status}: {text}", hint=self.context_hint, setting=True)
        if status == 400 and speaks_of_key(text):
            self._raise_unavailable(401, text, status)
        if 300 <= status < 400:
            target = reply.headers.get("location", "elsewhere")
            raise Unavailable(
                f"{self.place} sends questions on to {target}", hint="name the server itself with --url"
            )
        if status in _FOR_EVERY_QUESTION:
            self._raise_unavailable(status, text)
        raise Refused(f"HTTP {status}: {text}")

    def _raise_unavailable(self, kind: int, text: str, status: int | None = None) -> NoReturn:
        """`kind`: the status that says what is wrong; a proxy may have said so under another."""
        raise Unavailable(
            f"{self.place} answers HTTP {status or kind}: {text}",
            hint=f"is this the {self.kind} server? name it with --url",
        )

    def _check_counts(self, messages: Sequence[Message], completion: Completion) -> None:
        """A prompt that the server shortened without a word is given away by its count of tokens."""
        seen = completion.prompt_tokens
        if seen is None or self._counts_uncached:
            return
        least = self._counts.least(messages, seen)
        if least is None:
            return
        if seen < UNCACHED_BELOW and seen < UNCACHED_SHARE * prompt_at_least(messages):
            self._counts_uncached = True
            self.tell(
                f"{self.place} counts {seen} tokens of a prompt with at least {least}, so only what it had not cached: "
                "whether it cuts prompts cannot be told by its counts"
            )
            return
        raise Refused(
            f"the prompt was cut: the server saw {seen} tokens of at least {least}",
            hint=self.context_hint,
            setting=True,
        )


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


def reply_object(reply: Reply) -> dict[str, Any]:
    """The reply as an object; half a body, HTML or an error under status 200 can all pass."""
    try:
        value = reply.json()
    except ValueError as error:  # invalid UTF-8 is one too
        if is_web_page(reply):
            raise Retryable(
                f"the reply is not JSON but a web page ({said(reply)}): a proxy or a login page answers"
            ) from error
        raise Retryable(f"the reply is not JSON but {said(reply)}") from error
    if not isinstance(value, dict):
        raise Retryable(f"the reply is no JSON object but {type(value).__name__}")
    if value.get("error"):
        raise Retryable(f"the server says: {said(reply)}")
    return value


def count(reply: Mapping[str, Any], key: str) -> int | None:
    """A count of the reply; some servers leave it out, or say 0 or -1 for it."""
    value = reply.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < LARGEST_COUNT:
        return value
    return None


def merged(request: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A request with more keys, objects inside it merged; what is given by hand goes before what is ours."""
    for key, value in more.items():
        ours = request.get(key)
        request[key] = (
            merged(dict(ours), value) if isinstance(ours, dict) and isinstance(value, dict) else value
        )
    return request


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return to_json(body)  # a third of the time of json.dumps
    except ValueError:  # a lone surrogate
        return encode(body)


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
