"""As much of Go's text/template as a TEMPLATE of ours uses; `test_turns.py` compares it with Go itself where Go is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_ACTION = re.compile(r"\{\{ (.*?) \}\}", re.DOTALL)
_RANGE = "range $i, $_ := .Messages"
_LEAD = 'and (eq $i 0) (ne .Role "system")'
_FIRST_CONTENT = "(index $.Messages 0).Content"
_AFTER_SYSTEM = ' (eq (index $.Messages 0).Role "system")'

Part = str | tuple[str, list["Part"]]


def render(template: str, messages: list[dict[str, str]]) -> str:
    """The template over `.Messages`."""
    pieces = _ACTION.split(template)
    parts = [(number % 2 == 1, piece) for number, piece in enumerate(pieces)]
    text, rest = _block(parts, {"messages": messages})
    assert not rest, "an `end` too many"
    return text


def _block(parts: list[tuple[bool, str]], scope: dict[str, Any]) -> tuple[str, list[tuple[bool, str]]]:
    """The text up to this block's `end` or `else`, and what follows, that action included."""
    written = []
    while parts:
        (is_action, piece), after = parts[0], parts[1:]
        if not is_action:
            written.append(piece)
            parts = after
        elif piece == ".Content":
            written.append(scope["message"]["content"])
            parts = after
        elif piece == _FIRST_CONTENT:
            written.append(scope["messages"][0]["content"])
            parts = after
        elif piece == _RANGE:
            for number, message in enumerate(scope["messages"]):
                text, _ = _block(after, {**scope, "message": message, "number": number})
                written.append(text)
            parts = _behind(after)
        elif piece.startswith("if "):
            text, parts = _branches(piece, after, scope)
            written.append(text)
        else:
            assert piece == "end" or piece.startswith("else"), piece
            break
    return "".join(written), parts


def _branches(
    piece: str, parts: list[tuple[bool, str]], scope: dict[str, Any]
) -> tuple[str, list[tuple[bool, str]]]:
    chosen: str | None = None
    while True:
        text, rest = _block(parts, scope)
        if chosen is None and _holds(piece.removeprefix("else ").removeprefix("if "), scope):
            chosen = text
        (_, piece), parts = rest[0], rest[1:]
        if piece == "end":
            return chosen or "", parts


def _holds(condition: str, scope: dict[str, Any]) -> bool:
    role: str = scope["message"]["role"]
    if condition == _LEAD:
        return scope["number"] == 0 and role != "system"
    if condition.endswith(_AFTER_SYSTEM):
        places = {
            "and (eq $i 1)": 1,
            "and (eq (len (slice $.Messages $i)) 1)": len(scope["messages"]) - 1,
        }
        is_there = scope["number"] == places[condition.removesuffix(_AFTER_SYSTEM)]
        return is_there and scope["messages"][0]["role"] == "system"
    found = re.fullmatch(r'eq \.Role "(\w+)"', condition)
    assert found is not None, condition
    return role == found[1]


def _behind(parts: list[tuple[bool, str]]) -> list[tuple[bool, str]]:
    """What follows the `end` of the block that these parts begin in."""
    depth = 1
    for number, (is_action, piece) in enumerate(parts):
        if is_action and (piece.startswith(("if ", "range "))):
            depth += 1
        elif is_action and piece == "end":
            depth -= 1
            if depth == 0:
                return parts[number + 1 :]
    raise AssertionError("an `end` is missing")


def fields(messages: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Messages as Go's JSON reads them into Ollama's struct."""
    for one in messages:
        yield {"Role": one["role"], "Content": one["content"]}
