"""The Ollama teacher, over Ollama's own API: its `/v1` ignores `num_ctx` and would cut prompts unseen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mtgdm.contracts import schema_of
from mtgdm.domain import as_sent
from mtgdm.teachers.finish import Finish
from mtgdm.teachers.repetition import repeats_at_end
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, Unavailable
from mtgdm.teachers.server import ServerBackend, count
from mtgdm.teachers.streams import AnswerReader
from mtgdm.teachers.words import said, speaks_of_model

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Message
    from mtgdm.teachers.seam import Watch

KEEP_ALIVE = "30m"
"""How long the model stays loaded after a request: loading a 32B model again costs minutes."""
CONTEXT_STEP = 256
"""Ollama rounds a context up to a multiple of this."""
REPEATED_TOKENS = 20
"""Ollama ends an answer after 30 equal tokens; some of these may be half a character."""


class Ollama(ServerBackend):
    """Asks `POST /api/chat`, with the whole context set by us and every silent cut switched off."""

    kind: ClassVar[str] = "Ollama"
    start_hint: ClassVar[str] = "start it with `ollama serve`, or name it with --url"
    paths: ClassVar[tuple[str, ...]] = ("/api/chat", "/api", "/v1")
    chat_path: ClassVar[str] = "/api/chat"
    schema_key: ClassVar[str] = "format"
    context_hint: ClassVar[str] = "set --num-ctx by hand, lower --max-tokens, or update Ollama"
    parallel_hint: ClassVar[str] = "start it with OLLAMA_NUM_PARALLEL={slots}"
    holds_to_schema = True

    async def check(self) -> None:
        """Ask whether the server is there and has the model."""
        reply = await self._check("POST", "/api/show", {"model": self.model})
        if reply.status == 404 and speaks_of_model(said(reply)):
            raise self._missing_model()
        # Anything else is left to the first question: a proxy may pass /api/chat alone.

    def _missing_model(self) -> Unavailable:
        return Unavailable(f"the model '{self.model}' is not pulled", hint=f"ollama pull {self.model}")

    def _request(
        self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
    ) -> dict[str, Any]:
        request: dict[str, Any] = {
            "model": self.model,
            "messages": as_sent(messages),
            "stream": self.settings.stream,
            "think": False,
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
        if contract is not None:
            request["format"] = schema_of(contract, bounded=self._adjustments.bounded)
        return request

    def _reader(self, options: Options) -> AnswerReader:
        return ChatReader(options.watch, options.max_tokens)

    def _ended(self, reader: AnswerReader) -> Completion:
        assert isinstance(reader, ChatReader)
        if not reader.messages:
            raise Retryable("the reply carries no message")
        text, last = reader.text, reader.last
        prompt_tokens, output_tokens = count(last, "prompt_eval_count"), count(last, "eval_count")
        if not reader.complete:
            # Ollama gives up on a token repeated 30 times and then never says `done`.
            if repeats_at_end(text, REPEATED_TOKENS):
                return Completion(text, Finish.REPETITION, prompt_tokens, output_tokens or reader.pieces, 0.0)
            raise Retryable("the answer broke off (`done` is not true)", another_seed=True)
        reason = last.get("done_reason")
        return Completion(
            text, reason if isinstance(reason, str) and reason else "stop", prompt_tokens, output_tokens, 0.0
        )

    def _check_counts(self, messages: Sequence[Message], completion: Completion) -> None:
        """Servers too old for `truncate` and `shift` cut without a word."""
        super()._check_counts(messages, completion)
        seen, written = completion.prompt_tokens, completion.output_tokens or 0
        # Ollama rounds the context up.
        context = -(-self.settings.num_ctx // CONTEXT_STEP) * CONTEXT_STEP
        if seen is not None and seen + written > context > 0:
            raise Refused(
                f"prompt and answer took {seen} + {written} tokens, more than the context of {context}",
                hint=self.context_hint,
                setting=True,
            )


class ChatReader(AnswerReader):
    """Reads the lines of a streamed chat, or a whole one."""

    def __init__(self, watch: Watch, max_tokens: int) -> None:
        super().__init__(watch, max_tokens)
        self.messages = 0
        self.last: dict[str, Any] = {}
        """The object that says `done`, or the one before it broke off."""

    def take(self, value: dict[str, Any]) -> None:
        """A line of a stream, or the whole."""
        message = value.get("message")
        if isinstance(message, dict):
            text = message.get("content")
            if isinstance(text, str):
                self.messages += 1
                if text:
                    self.add(text)
            if (thought := message.get("thinking")) and isinstance(thought, str):
                self.add_thought(thought)
        self.last = value
        if value.get("done") is True:
            self.complete = True
