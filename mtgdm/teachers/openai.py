"""The teacher on any OpenAI-compatible server: vLLM, SGLang, llama.cpp, LM Studio, `transformers serve`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from mtgdm.teachers.seam import Completion, Options, Retryable, Unavailable
from mtgdm.teachers.server import ServerBackend, count, reply_object, schema_of

if TYPE_CHECKING:
    import httpx
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.teachers.seam import TeacherSettings

_SCHEMA_WORDS = ("response_format", "json_schema", "guided", "grammar", "schema")


class OpenAI(ServerBackend):
    """Asks `POST /v1/chat/completions`, holding JSON answers to their schema where the server can."""

    kind: ClassVar[str] = "OpenAI-compatible"
    start_hint: ClassVar[str] = "start it, or name it with --url http://HOST:PORT/v1"
    paths: ClassVar[tuple[str, ...]] = ("/chat/completions",)

    def __init__(
        self, settings: TeacherSettings, domain: Domain, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(settings, domain, transport=transport)
        if "/" not in self._url.partition("://")[2]:
            self._url += "/v1"  # other paths (/api/v3, /v1beta/openai) are taken as they are given

    _takes_schemas = True
    """Whether `response_format` may be sent; a server that cannot hold to a schema says so."""

    async def check(self) -> None:
        """Ask whether the server is there and takes the key; not every server can list its models."""
        response = await self._ask("GET", "/models", check=True)
        if response.status_code in (401, 403):
            self._raise_for(response)

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Ask once; without schemas where the server refuses them, since answers are checked here anyway."""
        started = time.monotonic()
        request = self._request(messages, contract, options)
        response = await self._ask("POST", "/chat/completions", request)
        if "response_format" in request and _refuses_schemas(response):
            self._takes_schemas = False
            return await self.answer(messages, contract, options)
        self._raise_for(response)
        reply = reply_object(response)
        text, reason = _choice(reply)
        usage = reply.get("usage")
        counts: dict[str, Any] = usage if isinstance(usage, dict) else {}
        completion = Completion(
            text,
            reason,
            count(counts, "prompt_tokens"),
            count(counts, "completion_tokens"),
            round(time.monotonic() - started, 3),
        )
        self._raise_where_cut(
            messages, completion, "give the server a longer context (--max-model-len in vLLM)"
        )
        return completion

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.settings.api_key_env)
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _missing_model(self) -> Unavailable:
        return Unavailable(
            f"the server at {self._url} does not serve the model '{self.model}'",
            hint=f"{self._url}/models lists what it serves; name it with --model",
        )

    def _raise_unavailable(self, status: int, text: str) -> NoReturn:
        if status in (401, 403):
            name = self.settings.api_key_env
            state = "was refused" if os.environ.get(name) else "is not set"
            raise Unavailable(
                f"{self._url} answers HTTP {status}: {text}",
                hint=f"the key in the environment variable {name} {state}; api_key_env names another variable",
            )
        super()._raise_unavailable(status, text)

    def _request(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "stream": False,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
        }
        if contract is not None and self._takes_schemas:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": contract.__name__.lower(),
                    "schema": schema_of(contract),
                    "strict": True,
                },
            }
        return request


def _refuses_schemas(response: httpx.Response) -> bool:
    return response.status_code in (400, 422, 501) and any(word in response.text for word in _SCHEMA_WORDS)


def _choice(reply: dict[str, Any]) -> tuple[str, str]:
    choices = reply.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Retryable("the reply carries no message")
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or not reason:
        raise Retryable("the answer broke off (no `finish_reason`)", another_seed=True)
    content = message.get("content")
    return content if isinstance(content, str) else "", reason
