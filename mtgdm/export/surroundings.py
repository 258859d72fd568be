"""What a chat template writes beside special tokens, where a tokenizer takes or puts spaces and llama.cpp does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

_CHAT = (
    {"role": "user", "content": "1"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "3"},
)
_KEEP_SPACES = ("<unk>", "<s>", "<|endoftext|>")
"""Those behind which llama.cpp takes no space in a model whose name says Phi-3, unlike all others."""


@dataclass(frozen=True)
class Piece:
    """An added token, or the text between two."""

    text: str
    token: Mapping[str, Any] | None = None


def chat_of(folder: Path, template: str | None) -> str | None:
    """A short chat as the template writes it, the folder's own where none is given; None where there is none."""
    from mtgdm.student.base import load_tokenizer

    tokenizer = load_tokenizer(str(folder), folder.name)
    if template is not None:
        tokenizer.chat_template = template
    if tokenizer.chat_template is None:
        return None
    try:
        return str(tokenizer.apply_chat_template([*_CHAT], tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return None


def pieces(chat: str, added: Sequence[Mapping[str, Any]]) -> list[Piece]:
    """A chat cut at the added tokens."""
    tokens = {one["content"]: one for one in added}
    longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
    parts = re.split(f"({'|'.join(longest_first)})", chat) if tokens else [chat]
    return [Piece(part, tokens.get(part)) for part in parts if part]


def strips(added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any token takes the spaces beside it."""
    return any(one.get("lstrip") or one.get("rstrip") for one in added)


def strips_like_phi3(added: Sequence[Mapping[str, Any]]) -> bool:
    """Whether just those tokens take the spaces behind them of which llama.cpp believes it for Phi-3."""
    names = {one["content"] for one in added}
    return {"</s>", *_KEEP_SPACES} <= names and all(
        bool(one.get("rstrip")) == (one["content"] not in _KEEP_SPACES) and not one.get("lstrip")
        for one in added
    )


def stripped(found: Sequence[Piece]) -> Iterator[str]:
    """The tokens beside which the chat has spaces that the tokenizer would take."""
    for place, piece in enumerate(found):
        if piece.token is None:
            continue
        before = found[place - 1].text if place else ""
        behind = found[place + 1].text if place + 1 < len(found) else ""
        if (piece.token.get("lstrip") and before[-1:].isspace()) or (
            piece.token.get("rstrip") and behind[:1].isspace()
        ):
            yield piece.text


def texts(found: Sequence[Piece]) -> list[str]:
    """The texts between the tokens, without the spaces that the token before takes."""
    kept = []
    for before, piece in zip([None, *found], found, strict=False):
        if piece.token is None:
            takes = before is not None and before.token is not None and before.token.get("rstrip")
            kept.append(piece.text.lstrip() if takes else piece.text)
    return [text for text in kept if text]
