"""The Ollama teacher, over Ollama's own API: its `/v1` ignores `num_ctx` and would cut prompts unseen."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, Unavailable
from mtgdm.teachers.server import ServerBackend, count, reply_object, schema_of, speaks_of_the_model

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Message

KEEP_ALIVE = "30m"
"""How long the model stays loaded after a request: loading a 32B model again costs minutes."""
_CUT_HINT = "update Ollama, or set --num-ctx by hand"


class Ollama(ServerBackend):
    """Asks `POST /api/chat`, with the whole context set by us and every silent cut switched off."""

    kind: ClassVar[str] = "Ollama"
    start_hint: ClassVar[str] = "start it with `ollama serve`, or name it with --url"
    paths: ClassVar[tuple[str, ...]] = ("/api/chat", "/api", "/v1")
    holds_to_schema = True

    _thinks = True
    """Whether `think: false` may be sent; a server that knows no such key for a model says so."""

    async def check(self) -> None:
        """Ask whether the server is there and has the model."""
        reply = await self._check("POST", "/api/show", {"model": self.model})
        if reply.status == 404 and speaks_of_the_model(reply):
            raise self._missing_model()
        # Anything else is left to the first question: a proxy may pass /api/chat alone.

    async def answer(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> Completion:
        """Ask once; a prompt that was cut, or an answer that broke off, is an error."""
        started = time.perf_counter()
        request = self._request(messages, contract, options)
        reply = await self._ask("/api/chat", request)
        if reply.status == 400 and "think" in request and "think" in reply.text:
            self._thinks = False
            return await self.answer(messages, contract, options)
        self._raise_for(reply)
        value = reply_object(reply)
        completion = Completion(
            _content(value),
            _reason(value),
            count(value, "prompt_eval_count"),
            count(value, "eval_count"),
            round(time.perf_counter() - started, 6),
        )
        # Servers too old for `truncate` and `shift` cut without a word.
        self._raise_where_cut(messages, completion, _CUT_HINT)
        self._raise_where_shifted(completion)
        return completion

    def _missing_model(self) -> Unavailable:
        return Unavailable(f"the model '{self.model}' is not pulled", hint=f"ollama pull {self.model}")

    def _request(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
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
            request["format"] = schema_of(contract)
        return request

    def _raise_where_shifted(self, completion: Completion) -> None:
        seen, written = completion.prompt_tokens, completion.output_tokens or 0
        if seen is not None and seen + written > self.settings.num_ctx > 0:
            raise Refused(
                f"prompt and answer took {seen} + {written} tokens, "
                f"more than the context of {self.settings.num_ctx}",
                hint=_CUT_HINT,
            )


def _content(value: dict[str, Any]) -> str:
    message = value.get("message")
    if not isinstance(message, dict) or not isinstance(message.get("content"), str):
        raise Retryable("the reply carries no message")
    if value.get("done") is not True:
        # Ollama gives up on a token repeated 30 times and then never says `done`.
        raise Retryable("the answer broke off (`done` is not true)", another_seed=True)
    content: str = message["content"]
    return content


def _reason(value: dict[str, Any]) -> str:
    reason = value.get("done_reason")
    return reason if isinstance(reason, str) and reason else "stop"
