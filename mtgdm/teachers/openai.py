"""The teacher on any OpenAI-compatible server: vLLM, SGLang, llama.cpp, LM Studio, `transformers serve`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from mtgdm.errors import SettingError
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, Unavailable
from mtgdm.teachers.server import ServerBackend, count, reply_object, said, schema_of

if TYPE_CHECKING:
    import httpx
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.teachers.connections import Reply
    from mtgdm.teachers.seam import TeacherSettings

_SCHEMA_WORDS = ("response_format", "json_schema", "guided", "grammar", "schema")
_UNSUPPORTED_WORDS = ("unsupported", "not support", "not permitted", "extra_forbidden")
_UNSENT: dict[str, float] = {"temperature": 1.0, "top_p": 1.0}
"""What the API takes where the key is left out: to leave it out then changes nothing."""


class OpenAI(ServerBackend):
    """Asks `POST /v1/chat/completions`, holding JSON answers to their schema where the server can."""

    kind: ClassVar[str] = "OpenAI-compatible"
    start_hint: ClassVar[str] = "start it, or name it with --url http://HOST:PORT/v1"
    paths: ClassVar[tuple[str, ...]] = ("/chat/completions",)

    def __init__(
        self, settings: TeacherSettings, domain: Domain, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(settings, domain, transport=transport)
        if self._url.path == "/":
            self._url = self._url.copy_with(path="/v1")  # other paths (/api/v3) are taken as they are given
        self.holds_to_schema = True
        self._limit = "max_tokens"
        self._left_out: set[str] = set()
        """Keys that the server does not take."""

    async def check(self) -> None:
        """Ask whether the server is there and takes the key; not every server can list its models."""
        reply = await self._check("GET", "/models")
        if reply.status in (401, 403):
            self._raise_for(reply)

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Ask once, and once more for each part of the question that the server does not take."""
        started = time.perf_counter()
        request = self._request(messages, contract, options)
        reply = await self._ask("/chat/completions", request)
        if reply.status in (400, 422, 501) and self._does_without(request, reply):
            return await self.answer(messages, contract, options)
        self._raise_for(reply)
        value = reply_object(reply)
        text, reason = _choice(value)
        usage = value.get("usage")
        counts: dict[str, Any] = usage if isinstance(usage, dict) else {}
        completion = Completion(
            text,
            reason,
            count(counts, "prompt_tokens"),
            count(counts, "completion_tokens"),
            round(time.perf_counter() - started, 6),
        )
        self._raise_where_cut(
            messages, completion, "give the server a longer context (--max-model-len in vLLM)"
        )
        return completion

    @property
    def _secret(self) -> str:
        return os.environ.get(self.settings.api_key_env, "").strip()

    def _headers(self) -> dict[str, str]:
        key = self._secret
        if not (key.isascii() and key.isprintable()):
            raise SettingError(
                f"the key in the environment variable {self.settings.api_key_env} is no key: "
                "it holds characters that no header can"
            )
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _missing_model(self) -> Unavailable:
        return Unavailable(
            f"the server at {self.place} does not serve the model '{self.model}'",
            hint=f"{self.place}/models lists what it serves; name it with --model",
        )

    def _raise_for(self, reply: Reply) -> None:
        if reply.status == 429 and "insufficient_quota" in reply.text:
            self._raise_unavailable(reply.status, said(reply))  # waiting does not help
        super()._raise_for(reply)

    def _raise_unavailable(self, status: int, text: str) -> NoReturn:
        if status in (401, 403):
            name = self.settings.api_key_env
            state = "was refused" if self._secret else "is not set"
            raise Unavailable(
                f"{self.place} answers HTTP {status}: {text}",
                hint=f"the key in the environment variable {name} {state}; api_key_env names another variable",
            )
        super()._raise_unavailable(status, text)

    def _request(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "stream": False,
            self._limit: options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
        }
        for key in self._left_out:
            del request[key]
        if contract is not None and self.holds_to_schema:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": contract.__name__.lower(),
                    "schema": schema_of(contract),
                    "strict": True,
                },
            }
        return request

    def _does_without(self, request: dict[str, Any], reply: Reply) -> bool:
        """Whether the server takes this question in another form, which is sent from now on.

        Without schemas, since answers are checked above; without a seed; without a temperature or top_p
        that the server takes anyway. Other values would be lost without a word: Unavailable.
        """
        text = reply.text
        if "response_format" in request and any(word in text for word in _SCHEMA_WORDS):
            self.holds_to_schema = False
            return True
        if not any(word in text.lower() for word in _UNSUPPORTED_WORDS):
            return False
        for key in ("max_tokens", "temperature", "top_p", "seed"):
            if key not in request or not (f"'{key}'" in text or f'"{key}"' in text):
                continue
            if key == "max_tokens":
                self._limit = "max_completion_tokens"
            elif key in _UNSENT and request[key] != _UNSENT[key]:
                flag = key.replace("_", "-")
                raise Unavailable(
                    f"{self.place} takes no {key} of {request[key]:g}: {said(reply)}", hint=f"--{flag} 1"
                )
            else:
                self._left_out.add(key)
            return True
        return False


def _choice(value: dict[str, Any]) -> tuple[str, str]:
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise Retryable("the reply carries no message")
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or not reason:
        raise Retryable("the answer broke off (no `finish_reason`)", another_seed=True)
    text = _text(message.get("content"))
    if not text and isinstance(message.get("refusal"), str) and message["refusal"]:
        raise Refused(f"the model refuses: {message['refusal']}")
    return text, reason


def _text(content: Any) -> str:
    """The answer, which may come in parts; thoughts among them are no part of it."""
    if isinstance(content, list):
        parts = (
            part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"
        )
        return "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else ""
