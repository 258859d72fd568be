"""What servers and models put around an answer, taken off."""

from __future__ import annotations

import re

_FENCE = re.compile(r"```[ \t]*(?:json|JSON)?[ \t]*\r?\n(.*?)\r?\n?[ \t]*```", re.DOTALL)
_OPEN, _CLOSE = "<think>", "</think>"


def cleaned(text: str, *, is_json: bool) -> str:
    """An answer without the model's thoughts, and without a fence around the whole of a JSON answer."""
    text = without_thoughts(text).strip()
    if is_json and (fenced := _FENCE.fullmatch(text)):
        return fenced[1].strip()
    return text


def without_thoughts(text: str) -> str:
    """The text after a leading `<think>...</think>`; nothing where the thought does not end.

    Some chat templates open the thought themselves, so that only its end is in the text.
    """
    thought, closed, rest = text.partition(_CLOSE)
    starts_thinking = thought.lstrip().startswith(_OPEN)
    if closed and (starts_thinking or _OPEN not in thought):
        return rest
    return "" if starts_thinking else text
