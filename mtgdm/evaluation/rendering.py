"""What a server makes of a chat before its model reads it, held against what the training made of it.

Servers choose a chat template by rules of their own. A student that is asked by another one than it was trained
with still answers, only worse, so the texts themselves are compared: Ollama and llama.cpp's server show what they
render, vLLM which tokens it comes to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from mtgdm.domain import as_sent
from mtgdm.errors import UserError

if TYPE_CHECKING:
    import httpx

    from mtgdm.domain import Message
    from mtgdm.student.chat import Chat

Post = Callable[[str, Mapping[str, Any]], "httpx.Response"]
"""A path of the server and the JSON to send there."""

_AROUND = 120
"""So many letters before and behind the first difference are shown."""


def by_ollama(post: Post, model: str, messages: Sequence[Message], think: bool | None = None) -> str | None:
    """The prompt that Ollama renders; None where it is too old to show it."""
    body = {
        "model": model,
        "messages": as_sent(messages),
        "stream": False,
        "_debug_render_only": True,
        "options": {"num_predict": 1},  # of one that does not know the key, and answers
    }
    reply = post("/api/chat", body if think is None else {**body, "think": think})
    found = _json(reply).get("_debug_info")
    text = found.get("rendered_template") if isinstance(found, dict) else None
    return text if isinstance(text, str) else None


def by_llama_server(post: Post, messages: Sequence[Message]) -> str | None:
    """The prompt that llama.cpp's server renders; None of another server."""
    text = _json(post("/apply-template", {"messages": as_sent(messages)})).get("prompt")
    return text if isinstance(text, str) else None


def by_vllm(post: Post, model: str, messages: Sequence[Message]) -> list[int] | None:
    """The tokens of the prompt that vLLM renders; None of another server."""
    body = {"model": model, "messages": as_sent(messages), "add_generation_prompt": True}
    tokens = _json(post("/tokenize", body)).get("tokens")
    return tokens if isinstance(tokens, list) and all(isinstance(one, int) for one in tokens) else None


def check(chat: Chat, messages: Sequence[Message], rendered: str, server: str, asked: str = "") -> None:
    """UserError where a server renders another prompt than the training did, with both texts.

    A server may add the BOS token by itself, so that its text begins without it. `asked` tells how it was asked.
    """
    trained = chat.prompt_text(messages)
    bos = chat.tokenizer.bos_token if isinstance(chat.tokenizer.bos_token, str) else ""
    if rendered not in (trained, trained.removeprefix(bos)):
        ours, theirs = _around_first_difference(trained, rendered)
        raise UserError(
            f"{server} asks the student otherwise than it was trained{asked}. Trained: {ours}. Asked: {theirs}",
            hint="its answers would not be its own: package it again and put it into the server anew",
        )


def check_tokens(chat: Chat, messages: Sequence[Message], tokens: Sequence[int], server: str) -> None:
    """The same of a server that shows the tokens of a prompt."""
    if list(tokens) != chat.prompt(messages):
        check(chat, messages, str(chat.tokenizer.decode(list(tokens))), server)


def _around_first_difference(one: str, other: str) -> tuple[str, str]:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    first, last = max(0, same - _AROUND), same + _AROUND
    return tuple(  # type: ignore[return-value]  # of two texts two are made
        json.dumps(
            ("…" if first else "") + text[first:last] + ("…" if len(text) > last else ""), ensure_ascii=False
        )
        for text in (one, other)
    )


def _json(reply: httpx.Response) -> dict[str, Any]:
    """The object that a server answered with, and an empty one where it answered with anything else."""
    with suppress(ValueError):
        value = reply.json()
        if reply.status_code == 200 and isinstance(value, dict):
            return value
    return {}
