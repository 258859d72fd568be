"""What teachers behind HTTP share: the server's address, and replies read whole or refused with a reason."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import httpx

from mtgdm.errors import SettingError
from mtgdm.rows import encode
from mtgdm.teachers.connections import Connections
from mtgdm.teachers.seam import Backend, Completion, Refused, Retryable, Unavailable
from mtgdm.teachers.tokens import prompt_at_least

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.teachers.seam import TeacherSettings

CONNECT_TIMEOUT_S = 10.0
CHECK_TIMEOUT_S = 30.0
_PASSING = frozenset({408, 425, 429, 499, 500, 502, 503, 504})
_OVERLOADED = frozenset({429, 503})
_LONGEST_WORDS = 300


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
        self._url = server_url(settings.url[0], self.paths)
        self._transport = transport

    async def __aenter__(self) -> Self:
        # The loop times each answer as a whole; here only a server that cannot be reached is noticed sooner.
        self._client = httpx.AsyncClient(
            base_url=self._url,
            transport=self._transport or Connections(),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            headers={"Content-Type": "application/json"} | self._headers(),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    def _headers(self) -> dict[str, str]:
        """More headers of every request."""
        return {}

    @abstractmethod
    def _missing_model(self) -> Unavailable:
        """What to say where the server does not have the model."""

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, check: bool = False
    ) -> httpx.Response:
        """One request; a server that is not there stops a check at once and is tried again later on."""
        try:
            return await self._client.request(
                method,
                path,
                content=None if body is None else encode(body),
                timeout=CHECK_TIMEOUT_S if check else httpx.USE_CLIENT_DEFAULT,
            )
        except httpx.TransportError as error:
            if check and isinstance(error, httpx.ConnectError):
                raise Unavailable(
                    f"no {self.kind} server answers at {self._url}", hint=self.start_hint
                ) from error
            words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise Retryable(
                words, lost=isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            ) from error

    def _raise_for(self, response: httpx.Response) -> None:
        """What an answer other than 200 means."""
        status = response.status_code
        if status == 200:
            return
        text = said(response)
        if status in _PASSING or status >= 500:
            raise Retryable(
                f"HTTP {status}: {text}",
                retry_after_s=_retry_after_s(response),
                overloaded=status in _OVERLOADED,
            )
        if status == 404 and speaks_of_the_model(response):
            raise self._missing_model()
        if status in (401, 403, 404, 405) or 300 <= status < 400:
            self._raise_unavailable(status, text)
        raise Refused(f"HTTP {status}: {text}")

    def _raise_unavailable(self, status: int, text: str) -> NoReturn:
        raise Unavailable(
            f"{self._url} answers HTTP {status}: {text}",
            hint=f"is this the {self.kind} server? name it with --url",
        )

    def _raise_where_cut(self, messages: Sequence[Message], completion: Completion, hint: str) -> None:
        """A prompt that the server shortened without a word is given away by its count of tokens."""
        seen = completion.prompt_tokens
        written = prompt_at_least(messages)
        if seen is not None and seen < written:
            raise Refused(
                f"the prompt was cut: the server saw {seen} tokens of at least {written}", hint=hint
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
    except httpx.InvalidURL as error:
        raise SettingError(
            f"'{given}' is no address of a server: {error}", hint="http://localhost:11434"
        ) from error
    if url.scheme not in ("http", "https") or not url.host:
        raise SettingError(f"'{given}' is no address of a server", hint="http://localhost:11434")
    return text


@cache
def schema_of(contract: type[BaseModel]) -> dict[str, Any]:
    """The JSON Schema that a server holds an answer to."""
    return contract.model_json_schema()


def reply_object(response: httpx.Response) -> dict[str, Any]:
    """The reply as an object; half a body, HTML or an error under status 200 can all pass."""
    try:
        reply = response.json()
    except ValueError as error:  # invalid UTF-8 is one too
        raise Retryable(f"the reply is not JSON but {_beginning(response.text)}") from error
    if not isinstance(reply, dict):
        raise Retryable(f"the reply is no JSON object but {type(reply).__name__}")
    if reply.get("error"):
        raise Retryable(f"the server says: {_beginning(_error_text(reply['error']))}")
    return reply


def said(response: httpx.Response) -> str:
    """The server's own words for what is wrong: `{"error": "..."}`, `{"error": {"message": "..."}}`, or the body."""
    try:
        reply = response.json()
    except ValueError:
        return _beginning(response.text)
    error = reply.get("error") or reply.get("detail") if isinstance(reply, dict) else None
    return _beginning(_error_text(error) if error else response.text)


def speaks_of_the_model(response: httpx.Response) -> bool:
    """Whether a 404 is about the model rather than the path."""
    text = said(response)
    return "model" in text and ("not found" in text or "not exist" in text)


def count(reply: dict[str, Any], key: str) -> int | None:
    """A count of the reply, which some servers leave out."""
    value = reply.get(key)
    return value if isinstance(value, int) else None


def _error_text(error: Any) -> str:
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        return str(error["message"])
    return str(error)


def _beginning(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST_WORDS else f"{words[:_LONGEST_WORDS]}…"


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; its form as a date is rare enough to leave to our own pauses."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
