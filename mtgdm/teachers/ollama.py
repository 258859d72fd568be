"""The Ollama teacher, over Ollama's own API: its `/v1` ignores `num_ctx` and would cut prompts unseen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx

from mtgdm.errors import SettingError
from mtgdm.rows import encode
from mtgdm.teachers.connections import Connections
from mtgdm.teachers.seam import Backend, Completion, Options, Refused, Retryable, Unavailable
from mtgdm.teachers.tokens import prompt_at_least

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.teachers.seam import TeacherSettings

CONNECT_TIMEOUT_S = 10.0
CHECK_TIMEOUT_S = 30.0
KEEP_ALIVE = "30m"
"""How long the model stays loaded after a request: loading a 32B model again costs minutes."""
_PASSING = frozenset({408, 425, 429, 499, 500, 502, 503, 504})
_LONGEST_WORDS = 300


class Ollama(Backend):
    """Asks `POST /api/chat`, with the whole context set by us and every silent cut switched off."""

    def __init__(
        self, settings: TeacherSettings, domain: Domain, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(settings, domain)
        if not settings.model:
            raise SettingError(
                "the ollama teacher needs a model", hint="--model qwen2.5:32b-instruct-q4_K_M, for one"
            )
        self._url = server_url(settings.url)
        self._transport = transport
        self._thinks = True
        """Whether `think: false` may be sent; a server that knows no such key for a model says so."""

    async def __aenter__(self) -> Self:
        # The loop times each answer as a whole; here only a server that cannot be reached is noticed sooner.
        self._client = httpx.AsyncClient(
            base_url=self._url,
            transport=self._transport or Connections(),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            headers={"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def check(self) -> None:
        """Ask whether the server is there and has the model."""
        try:
            response = await self._client.post(
                "/api/show", content=encode({"model": self.model}), timeout=CHECK_TIMEOUT_S
            )
        except httpx.ConnectError as error:
            raise Unavailable(
                f"no Ollama server answers at {self._url}",
                hint="start it with `ollama serve`, or name it with --url",
            ) from error
        except httpx.TransportError as error:
            raise Retryable(_words(error)) from error
        if response.status_code == 404 and not _says_not_found(response):
            return  # a proxy may pass /api/chat alone: the first question will tell
        self._raise_for(response)

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Ask once; a prompt that was cut, or an answer that broke off, is an error."""
        started = time.monotonic()
        try:
            response = await self._client.post(
                "/api/chat", content=encode(self._request(messages, contract, options))
            )
        except httpx.TransportError as error:
            raise Retryable(_words(error)) from error
        if response.status_code == 400 and self._thinks and "think" in response.text:
            self._thinks = False
            return await self.answer(messages, contract, options)
        self._raise_for(response)
        reply = _object(response)
        seconds = round(time.monotonic() - started, 3)
        completion = Completion(
            _content(reply),
            _reason(reply),
            _count(reply, "prompt_eval_count"),
            _count(reply, "eval_count"),
            seconds,
        )
        self._raise_where_cut(messages, completion)
        return completion

    def _request(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "stream": False,
            "truncate": False,  # never drop messages to make the prompt fit
            "shift": False,  # never forget half of the context to go on
            "keep_alive": KEEP_ALIVE,
            "options": {
                "num_ctx": self.settings.num_ctx,
                "num_predict": options.max_tokens,
                "num_gpu": self.settings.ollama_num_gpu,
                "temperature": options.temperature,
                "top_p": options.top_p,
                "seed": options.seed,
            },
        }
        if self._thinks:
            request["think"] = False
        if contract is not None:
            request["format"] = _schema(contract)
        return request

    def _raise_for(self, response: httpx.Response) -> None:
        """What an answer other than 200 means; Ollama says why in `{"error": ...}`."""
        status = response.status_code
        if status == 200:
            return
        said = _said(response)
        if status in _PASSING or status >= 500:
            raise Retryable(f"HTTP {status}: {said}", retry_after_s=_retry_after_s(response))
        if status == 404 and _says_not_found(response):
            raise Unavailable(f"the model '{self.model}' is not pulled", hint=f"ollama pull {self.model}")
        if status in (401, 403, 404, 405) or 300 <= status < 400:
            raise Unavailable(
                f"{self._url} answers HTTP {status}: {said}",
                hint="is this an Ollama server? name it with --url",
            )
        raise Refused(f"HTTP {status}: {said}")

    def _raise_where_cut(self, messages: Sequence[Message], completion: Completion) -> None:
        """Servers too old for `truncate` and `shift` cut without a word; their counts give them away."""
        seen = completion.prompt_tokens
        if seen is None:
            return
        written = prompt_at_least(messages)
        if seen < written:
            raise Refused(
                f"the prompt was cut: the server saw {seen} tokens of at least {written}",
                hint="update Ollama, or set --num-ctx by hand",
            )
        if seen + (completion.output_tokens or 0) > self.settings.num_ctx > 0:
            raise Refused(
                f"prompt and answer took {seen} + {completion.output_tokens or 0} tokens, "
                f"more than the context of {self.settings.num_ctx}",
                hint="update Ollama, or set --num-ctx by hand",
            )


def server_url(given: str) -> str:
    """A server's address as a user may write it: `localhost:11434`, with a slash, with the path of an API."""
    text = given.strip()
    if "://" not in text:
        text = f"http://{text}"
    text = text.rstrip("/")
    for ending in ("/api/chat", "/api", "/v1"):
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
def _schema(contract: type[BaseModel]) -> dict[str, Any]:
    return contract.model_json_schema()


def _object(response: httpx.Response) -> dict[str, Any]:
    """The reply as an object; half a body, HTML or an error under status 200 can all pass."""
    try:
        reply = response.json()
    except ValueError as error:  # invalid UTF-8 is one too
        raise Retryable(f"the reply is not JSON but {_beginning(response.text)}") from error
    if not isinstance(reply, dict):
        raise Retryable(f"the reply is no JSON object but {type(reply).__name__}")
    if reply.get("error"):
        raise Retryable(f"the server says: {_beginning(str(reply['error']))}")
    return reply


def _content(reply: dict[str, Any]) -> str:
    message = reply.get("message")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise Retryable("the reply carries no message")
    if reply.get("done") is not True:
        # Ollama gives up on a token repeated 30 times and then never says `done`.
        raise Retryable("the answer broke off (`done` is not true)", another_seed=True)
    content: str = message["content"]
    return content


def _reason(reply: dict[str, Any]) -> str:
    reason = reply.get("done_reason")
    return reason if isinstance(reason, str) and reason else "stop"


def _count(reply: dict[str, Any], key: str) -> int | None:
    value = reply.get(key)  # a count of 0 is left out of the reply
    return value if isinstance(value, int) else None


def _says_not_found(response: httpx.Response) -> bool:
    """Whether a 404 speaks of the model rather than of the path."""
    said = _said(response)
    return "model" in said and "not found" in said


def _said(response: httpx.Response) -> str:
    try:
        reply = response.json()
    except ValueError:
        return _beginning(response.text)
    error = reply.get("error") if isinstance(reply, dict) else None
    return _beginning(error if isinstance(error, str) else response.text)


def _beginning(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= _LONGEST_WORDS else f"{words[:_LONGEST_WORDS]}…"


def _words(error: httpx.TransportError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; its form as a date is rare enough to leave to our own pauses."""
    try:
        return max(0.0, float(response.headers["Retry-After"]))
    except (KeyError, ValueError):
        return None
