"""The teacher on any OpenAI-compatible server: vLLM, SGLang, llama.cpp, LM Studio, `transformers serve`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from mtgdm.contracts import schema_of
from mtgdm.domain import as_sent
from mtgdm.errors import SettingError
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, Unavailable
from mtgdm.teachers.server import ServerBackend, count
from mtgdm.teachers.streams import AnswerReader
from mtgdm.teachers.words import said

if TYPE_CHECKING:
    import httpx
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.teachers.connections import Reply
    from mtgdm.teachers.seam import TeacherSettings, Watch


class OpenAI(ServerBackend):
    """Asks `POST /v1/chat/completions`, holding JSON answers to their schema where the server can."""

    kind: ClassVar[str] = "OpenAI-compatible"
    start_hint: ClassVar[str] = "start it, or name it with --url http://HOST:PORT/v1"
    paths: ClassVar[tuple[str, ...]] = ("/chat/completions",)
    chat_path: ClassVar[str] = "/chat/completions"
    schema_key: ClassVar[str] = "response_format"
    context_hint: ClassVar[str] = (
        "give the server a longer context (--max-model-len in vLLM, -c in llama.cpp), or lower --max-tokens"
    )
    parallel_hint: ClassVar[str] = "-np {slots} in llama.cpp, --max-num-seqs {slots} in vLLM"

    def __init__(
        self, settings: TeacherSettings, domain: Domain, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(settings, domain, transport=transport)
        if self._url.path == "/":
            self._url = self._url.copy_with(path="/v1")  # other paths (/api/v3) are taken as they are given
        self.holds_to_schema = True

    async def check(self) -> None:
        """Ask whether the server is there and takes the key; not every server can list its models."""
        reply = await self._check("GET", "/models")
        if reply.status in (401, 403):
            self._raise_for(reply)

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

    def _raise_unavailable(self, kind: int, text: str, status: int | None = None) -> NoReturn:
        if kind in (401, 403):
            name = self.settings.api_key_env
            state = "was refused" if self._secret else "is not set"
            raise Unavailable(
                f"{self.place} answers HTTP {status or kind}: {text}",
                hint=f"the key in the environment variable {name} {state}; api_key_env names another variable",
            )
        super()._raise_unavailable(kind, text, status)

    def _request(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": as_sent(messages),
            "stream": self.settings.stream,
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "seed": options.seed,
        }
        if self.settings.stream:
            request["stream_options"] = {"include_usage": True}
        if contract is not None:
            request["response_format"] = {
                "type": "json_schema",
                "json_schema": {
                    "name": contract.__name__.lower(),
                    "schema": schema_of(contract, bounded=self._adjustments.bounded),
                    "strict": True,
                },
            }
        return request

    def _reader(self, options: Options) -> AnswerReader:
        return ChatReader(options.watch, options.max_tokens)

    def _ended(self, reader: AnswerReader) -> Completion:
        assert isinstance(reader, ChatReader)
        if not reader.choices:
            raise Retryable("the reply carries no message")
        if not reader.reason and not (reader.complete and reader.parts):
            raise Retryable("the answer broke off (no `finish_reason`)", another_seed=True)
        text = reader.text
        if not text and reader.refusal:
            raise Refused(f"the model refuses: {reader.refusal}")
        usage = reader.usage
        return Completion(
            text,
            reader.reason or "stop",
            count(usage, "prompt_tokens"),
            count(usage, "completion_tokens"),
            0.0,
        )


class ChatReader(AnswerReader):
    """Reads chunks of a streamed chat, or a whole one."""

    def __init__(self, watch: Watch, max_tokens: int) -> None:
        super().__init__(watch, max_tokens)
        self.reason = ""
        self.refusal = ""
        self.usage: dict[str, Any] = {}
        self.choices = 0

    def take(self, value: dict[str, Any]) -> None:
        """A chunk with a `delta`, a whole chat with a `message`, or the usage alone."""
        usage = value.get("usage")
        if isinstance(usage, dict):
            self.usage = usage
        choices = value.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return
        message = choice.get("delta")
        if not isinstance(message, dict):
            message = choice.get("message")
        if isinstance(message, dict):
            self.choices += 1
            self._take_message(message)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.reason = reason

    def _take_message(self, message: dict[str, Any]) -> None:
        text, thought = message.get("content"), None
        if isinstance(text, list):
            thought, text = _parts(text, "thinking"), _parts(text, "text")
        if isinstance(text, str) and text:
            self.add(text)
        thought = thought or message.get("reasoning_content") or message.get("reasoning")
        if isinstance(thought, str) and thought:
            self.add_thought(thought)
        refusal = message.get("refusal")
        if isinstance(refusal, str):
            self.refusal += refusal


def _parts(content: list[Any], kind: str) -> str:
    """The parts of one kind that an answer comes in; thoughts among them are no part of it."""
    found = (part.get(kind) for part in content if isinstance(part, dict) and part.get("type") == kind)
    return "".join(part for part in found if isinstance(part, str))
