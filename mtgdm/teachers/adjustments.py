"""What a server was found not to take, and how it is asked since: told once, and remembered for its address.

Every field of a request has servers that refuse it: `seed` (Gemini, Mistral), `top_p` beside `temperature` (Claude),
`max_tokens` (OpenAI's reasoning models), `response_format` (many), `stream_options`, a system role (Gemma).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mtgdm.teachers.seam import Unavailable
from mtgdm.teachers.words import named_keys, said

if TYPE_CHECKING:
    from mtgdm.domain import Message
    from mtgdm.teachers.http import Reply

JsonObject = dict[str, Any]

_REFUSALS = frozenset({400, 404, 415, 422, 500, 501})
_UNSUPPORTED = re.compile(
    r"unsupported|not (?:be )?(?:supported|permitted|allowed|available|accepted|implemented|recogni[sz]ed|enabled)"
    r"|(?:does|do|is|are|can)(?:n't| ?not) (?:\w+ ){0,2}(?:support|allow|accept|take|use)|only support|extra_forbidden"
    r"|extra inputs|unknown|unrecogni[sz]ed|unexpected|unavailable|cannot find|cannot both|not both|deprecated"
    r"|invalid (?:field|parameter|argument|json payload)|additional propert|no longer|only the default",
    re.IGNORECASE,
)
_SCHEMA = re.compile(
    r"response_format|response format|json_schema|json schema|json_object|json object mode|json mode|guided|grammar"
    r"|schema|structured",
    re.IGNORECASE,
)
_SYSTEM = re.compile(
    r"system (?:role|message|prompt|instruction)|developer instruction|role ['\"`]?system|['\"`]system['\"`]"
    r"|roles? must alternate|only user and (?:assistant|model) roles",
    re.IGNORECASE,
)
_TOO_MUCH_SCHEMA = re.compile(
    r"grammar|max_?length|max_?items|minItems|compil|too (?:large|complex|deep|many)|repetition|keyword|constraint",
    re.IGNORECASE,
)
"""What of a schema is too much for servers that take schemas."""
_STREAM = re.compile(r"\bstream|streaming", re.IGNORECASE)
_ONLY = re.compile(r"\bonly\b|must be|required|non-streaming", re.IGNORECASE)
_LEFT_OUT = ("seed", "top_p", "temperature", "keep_alive", "think", "truncate", "shift")


class Adjustments:
    """How one server is asked."""

    def __init__(self, schema_key: str, tell: Callable[[str], None]) -> None:
        """`schema_key`: the field that holds an answer to a schema; `tell` hears how the server is asked."""
        self._schema_key = schema_key
        self._tell = tell
        self._made: dict[str, str] = {}
        """By the field, how the server is asked: `without seed`."""
        self._limit = "max_tokens"
        self._failed_with_schema: set[str] = set()
        """Ids of rows that a server failed when they came with a schema."""
        self._schema_works = False

    @property
    def made(self) -> list[str]:
        """How the server is asked otherwise than the settings say."""
        return list(self._made.values())

    @property
    def holds_to_schema(self) -> bool:
        """Whether it is still sent schemas."""
        return self._schema_key not in self._made

    @property
    def bounded(self) -> bool:
        """Whether schemas are sent with the largest sizes of texts and lists."""
        return "bounds" not in self._made

    def apply(self, request: JsonObject) -> JsonObject:
        """The request as this server takes it."""
        for field in self._made:
            if field == "stream":
                request["stream"] = not request["stream"]
                request.pop("stream_options", None)
            elif field == "system":
                request["messages"] = folded(request["messages"])
            elif field == "max_tokens":
                if (limit := request.pop("max_tokens", None)) is not None and self._limit:
                    request[self._limit] = limit
            elif field != "bounds":
                request.pop(field, None)
        return request

    def answered(self, request: JsonObject) -> None:
        """The server took this request."""
        if self._schema_key in request:
            self._schema_works = True

    def learn(self, request: JsonObject, reply: Reply) -> bool:
        """Whether the server takes this request in another form, which is sent from now on.

        Unavailable where it would lose what was asked for: a greedy answer cannot be had at another temperature.
        """
        if reply.status not in _REFUSALS:
            return False
        words = said(reply)
        named = named_keys(reply)
        unsupported = bool(_UNSUPPORTED.search(words))
        return (
            self._learn_stream(request, words, named, unsupported=unsupported)
            or self._learn_field(request, words, named, unsupported=unsupported)
            or self._learn_schema(request, words)
            or self._learn_system(request, words)
        )

    def suspects_schema(self, request: JsonObject, status: int, row: str) -> bool:
        """Whether the schema alone may make a server fail: it failed twice on a row, and answered none with one."""
        if self._schema_key not in request or status not in (500, 501) or self._schema_works:
            return False
        again = row in self._failed_with_schema
        self._failed_with_schema.add(row)
        return again

    def leave_out_schema(self, why: str) -> None:
        """Send no schema any more."""
        self._make(self._schema_key, "without a schema for JSON answers", why)

    def _learn_stream(self, request: JsonObject, words: str, named: set[str], *, unsupported: bool) -> bool:
        if "stream_options" in request and ("stream_options" in named or "stream_options" in words):
            return self._make("stream_options", "without stream_options", words)
        told = _STREAM.search(words) and (unsupported or _ONLY.search(words))
        if not told and "stream" not in named:
            return False
        if "stream" in self._made:
            # Another question found it out meanwhile; or the server takes neither.
            return bool(request["stream"] is not (self._made["stream"] == "as streams"))
        return self._make("stream", "without streaming" if request["stream"] else "as streams", words)

    def _learn_field(self, request: JsonObject, words: str, named: set[str], *, unsupported: bool) -> bool:
        refused = [
            key
            for key in _LEFT_OUT
            if key in request and (key in named or (unsupported and _names(words, key)))
        ]
        if "think" in request and "think" in words:  # it names no field: `"m" does not support thinking`
            refused = ["think"]
        if {"top_p", "temperature"} <= set(refused):
            refused.remove("temperature")  # they are refused together: one of them is enough
        if refused:
            key = refused[0]
            if key == "temperature" and request[key] == 0:
                raise Unavailable(f"the server takes no temperature of 0: {words}", hint="--temperature 1")
            return self._make(key, f"without {key}", words)
        limit = next((key for key in ("max_completion_tokens", "max_tokens") if key in request), None)
        if limit is None or not (unsupported and (limit in named or _names(words, limit))):
            return False
        if re.search(r"too (?:large|big|high|many)|greater|exceed|at most|less than", words):
            return False  # the value is refused, not the field
        if limit == "max_tokens" and not self._made.get("max_tokens"):
            self._limit = "max_completion_tokens"
            return self._make("max_tokens", "with max_completion_tokens for max_tokens", words)
        if limit == "max_completion_tokens":
            self._limit = ""
            self._made.pop("max_tokens")
            return self._make("max_tokens", "without a limit of tokens", words)
        return True

    def _learn_schema(self, request: JsonObject, words: str) -> bool:
        schema = request.get(self._schema_key)
        if schema is None or not _SCHEMA.search(words):
            return False
        if _has_bounds(schema) and _TOO_MUCH_SCHEMA.search(words):
            return self._make("bounds", "without bounds in the schema", words)
        self.leave_out_schema(words)
        return True

    def _learn_system(self, request: JsonObject, words: str) -> bool:
        if not any(message["role"] == "system" for message in request["messages"]) or not _SYSTEM.search(
            words
        ):
            return False
        return self._make("system", "with the system text in the first user turn", words)

    def _make(self, field: str, how: str, why: str) -> bool:
        if field not in self._made:
            self._made[field] = how
            self._tell(f"is asked {how}: {why}")
        return True


def folded(messages: list[Message]) -> list[Message]:
    """The same talk with the system text at the beginning of the first user turn."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    for place, message in enumerate(rest):
        if message["role"] == "user":
            content = "\n\n".join([*system, message["content"]])
            return [*rest[:place], {**message, "content": content}, *rest[place + 1 :]]
    return rest


def _has_bounds(schema: Any) -> bool:
    return any(f'"{bound}"' in json.dumps(schema) for bound in ("maxLength", "maxItems"))


def _names(words: str, key: str) -> bool:
    return re.search(rf"(?<![\w-]){key}(?![\w-])", words) is not None
