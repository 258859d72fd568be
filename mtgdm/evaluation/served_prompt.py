"""The first prompt of a served student held against what its training made of the same chat."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from mtgdm.evaluation import rendering
from mtgdm.teachers.connections import CONNECT_TIMEOUT_S, proxy_to
from mtgdm.teachers.ollama import Ollama
from mtgdm.teachers.openai import OpenAI
from mtgdm.teachers.server import server_url

if TYPE_CHECKING:
    from mtgdm.domain import Message
    from mtgdm.student.chat import Chat

_TIMEOUT = httpx.Timeout(600.0, connect=CONNECT_TIMEOUT_S)
"""A server may load the model before it renders anything."""
_OF_OPENAI = ("/v1",)


def check(
    chat: Chat,
    messages: Sequence[Message],
    *,
    backend: str,
    url: str,
    model: str,
    api_key_env: str = "",
    normalise: bool = False,
    transport: httpx.BaseTransport | None = None,
) -> bool:
    """Whether the server shows its prompts; UserError where this one is not that of the training.

    A server that does not answer is none of this check's business: the questions will find it out.
    """
    if normalise:
        messages = [{**one, "content": unicodedata.normalize("NFC", one["content"])} for one in messages]
    paths = Ollama.paths if backend == "ollama" else (*OpenAI.paths, *_OF_OPENAI)
    root = server_url(url, paths)
    key = os.environ.get(api_key_env) if backend != "ollama" else None
    with httpx.Client(
        base_url=root,
        transport=transport,
        proxy=None if transport else proxy_to(httpx.URL(root)),
        trust_env=False,
        timeout=_TIMEOUT,
        headers={"Authorization": f"Bearer {key}"} if key else {},
    ) as client:

        def post(path: str, body: Mapping[str, Any]) -> httpx.Response:
            return client.post(path, json=dict(body))

        try:
            return _check(chat, messages, post, backend, model)
        except httpx.TransportError:
            return False


def _check(chat: Chat, messages: Sequence[Message], post: rendering.Post, backend: str, model: str) -> bool:
    if backend == "ollama":
        # As the evaluation asks: without thoughts, which a student that was not trained to think does not offer.
        if (rendered := rendering.by_ollama(post, model, messages, think=False)) is not None:
            rendering.check(chat, messages, rendered, f"{model} in Ollama")
        return rendered is not None
    if (rendered := rendering.by_llama_server(post, messages)) is not None:
        rendering.check(chat, messages, rendered, f"{model} behind llama.cpp's server")
        return True
    if (tokens := rendering.by_vllm(post, model, messages)) is not None:
        rendering.check_tokens(chat, messages, tokens, f"{model} behind vLLM")
    return tokens is not None
