"""What servers say where they do not answer: their own words, and what kind of refusal these are."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtgdm.teachers.http import Reply

LONGEST_WORDS = 300
LOOKED_AT = 8192
"""So much of a page is looked at: a pattern over an endless one would take minutes."""
_TITLE = re.compile(r"<title[^>]{0,200}>([^<]{1,400})", re.IGNORECASE)
_TAG = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.IGNORECASE | re.DOTALL)

_FILTER = re.compile(
    r"content[_ -]?(?:filter|policy)|content management|data_inspection|inappropriate content|moderation|sensitive"
    r"|considered high risk|content exists risk|safety (?:filter|system|polic)|prohibited content|敏感|违规|不安全",
    re.IGNORECASE,
)
_CONTEXT = re.compile(
    r"context[_ -]?(?:length|window|size)|maximum context|max_model_len|maximum model length|too many tokens"
    r"|(?:prompt|input|request) is too long|exceeds? the (?:available |model's )?(?:maximum )?context|n_ctx|num_ctx"
    r"|max(?:_completion|_new|_output)?_tokens.{0,60}(?:too large|greater|exceed|at most|less than)",
    re.IGNORECASE,
)
_KEY = re.compile(
    r"no connected db|invalid[_ ](?:api[_ ]?key|proxy)|incorrect api key"
    r"|api[_ ]key (?:not valid|not found|is invalid|missing)"
    r"|authentication (?:error|failed)|no api[_ -]?key|invalid (?:token|authentication)",
    re.IGNORECASE,
)
_MODEL = re.compile(
    r"invalid model|model[_ ]not[_ ]found|not a valid model|unknown model|no such model"
    r"|model .{0,120}(?:does not|doesn't) exist|model .{0,120}not found|no endpoints found for",
    re.IGNORECASE,
)


def said(reply: Reply) -> str:
    """The server's own words for what is wrong: `{"error": "..."}`, `{"error": {"message": "..."}}`, or the body."""
    text = reply.text[:LOOKED_AT]
    if is_web_page(reply):
        title = _TITLE.search(text)
        text = title[1] if title else _TAG.sub(" ", text)
    else:
        with suppress(ValueError):
            text = _error_text(reply.json()) or text
    return _beginning(text.replace(reply.secret, "***") if reply.secret else text)


def named_keys(reply: Reply) -> set[str]:
    """The fields of a request that a refusal names by itself: OpenAI's `param`, FastAPI's `loc`."""
    try:
        value = reply.json()
    except ValueError:
        return set()
    found: set[str] = set()
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, dict):
        if isinstance(error.get("param"), str):
            found.add(error["param"])
        details = value.get("detail") if isinstance(value, dict) else None
    else:
        details = error
    for one in details if isinstance(details, list) else ():
        place = one.get("loc") if isinstance(one, dict) else None
        if isinstance(place, list):
            found.update(part for part in place if isinstance(part, str))
    return found


def speaks_of_filter(words: str) -> bool:
    """Whether a filter of its content refuses a question."""
    return _FILTER.search(words) is not None


def speaks_of_context(words: str) -> bool:
    """Whether a question does not fit into the context, with its answer."""
    return _CONTEXT.search(words) is not None


def speaks_of_key(words: str) -> bool:
    """Whether the key is the fault; proxies say so under status 400."""
    return _KEY.search(words) is not None


def speaks_of_model(words: str) -> bool:
    """Whether the model's name is the fault."""
    return _MODEL.search(words) is not None


def is_web_page(reply: Reply) -> bool:
    """Whether a proxy or a login page answers."""
    return "html" in reply.headers.get("content-type", "") or reply.body[:100].lstrip()[:1] == b"<"


def _error_text(value: Any) -> str:
    """The words inside `{"error": ...}`; Ollama hands on what llama-server said as JSON in a text."""
    if not isinstance(value, dict):
        return ""
    error = value.get("error") or value.get("detail") or value.get("message")
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        error = error["message"]
    if isinstance(error, str) and error.lstrip().startswith("{"):
        try:
            return _error_text(json.loads(error)) or error
        except (ValueError, RecursionError):
            return error
    return str(error) if error else ""


def _beginning(text: str) -> str:
    words = " ".join(text[:LOOKED_AT].split())
    return words if len(words) <= LONGEST_WORDS else f"{words[:LONGEST_WORDS]}…"
