"""A tokenizer of SentencePiece's kind as llama.cpp holds it: scores in place of merges, and a space in front or none.

llama.cpp joins the two neighbours whose token has the highest score; tokenizer.json lists pairs by rank. Both do the
same where all pairs that make one token stand together in the list, and each token that two others could make is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from mtgdm.export.pretokenizers import steps

SPACE = "\u2581"
"""Stands for a space in the tokens."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = 256
_ESCAPES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDS = {"type": "Prepend", "prepend": SPACE}

SpaceInFront = Literal["never", "always", "unless there", "at the start"]
"""Where a tokenizer puts a space: before each text between special tokens, before those without one, before the first."""


def is_of_this_kind(about: Mapping[str, Any]) -> bool:
    """Whether characters that are no token of their own are written as bytes."""
    return bool(about["model"].get("byte_fallback"))


def is_byte(token: str) -> bool:
    """Whether a token stands for one byte."""
    return _BYTE.fullmatch(token) is not None


def space_in_front(about: Mapping[str, Any]) -> SpaceInFront | None:
    """Where a space is put; None where a text is changed or cut in a way that llama.cpp does not know."""
    normalizer, pre = steps(about, "normalizer"), steps(about, "pre_tokenizer")
    if normalizer in ([_ESCAPES], [_PREPENDS, _ESCAPES]) and (not pre or _cuts_nothing(pre)):
        return "always" if _PREPENDS in normalizer else "never"
    if normalizer or [step["type"] for step in pre] != ["Metaspace"]:
        return None
    (metaspace,) = pre
    if metaspace.get("split", True) or metaspace.get("replacement") != SPACE:
        return None
    schemes: dict[Any, SpaceInFront] = {"always": "unless there", "first": "at the start", "never": "never"}
    return schemes.get(metaspace.get("prepend_scheme"))


def _cuts_nothing(pre: list[Mapping[str, Any]]) -> bool:
    """Gemma's tokenizers cut at spaces, of which the normalizer has left none."""
    return all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in pre)


def problems(about: Mapping[str, Any]) -> Iterator[str]:
    """Why llama.cpp would read other tokens."""
    vocabulary = about["model"]["vocab"]
    if sum(map(is_byte, vocabulary)) != _BYTES:
        yield "its vocabulary has not a token for each byte"
    if about["model"].get("ignore_merges"):
        yield "it takes words that are tokens whole, whatever its merges say, which llama.cpp does not"
    if space_in_front(about) is None:
        yield "it changes or cuts texts in a way that llama.cpp does not know of such tokenizers"
    added = _added(about)
    made = _made(about, added)
    if made is None:
        yield "its merges stand in an order that scores cannot tell"
        return
    unmade = (
        token for token in vocabulary if len(token) > 1 and token not in made and token not in added and not is_byte(token)
    )
    if two := next((token for token in unmade if _joins_two(token, vocabulary)), None):
        yield f"its merges never make the token {two}, which llama.cpp would make"


def scores(about: Mapping[str, Any], size: int) -> dict[str, float]:
    """The score of each token that is neither added nor a byte: the earlier it is made, the higher.

    Vocabularies that SentencePiece trained number their tokens in this very order; these get the scores that
    SentencePiece gave them. What stands elsewhere in the list (Llama's runs of spaces) comes after `size` others.
    """
    vocabulary, added = about["model"]["vocab"], _added(about)
    made = _made(about, added)
    assert made is not None
    normal = [token for token in vocabulary if token not in added and not is_byte(token)]
    first = min(map(vocabulary.__getitem__, normal), default=0)
    found = {token: float(first - vocabulary[token]) for token in normal}
    last = -1
    for place, token in enumerate(made):
        if vocabulary[token] < last:
            found.update({late: float(-size - number) for number, late in enumerate(list(made)[place:], 1)})
            break
        last = vocabulary[token]
    return found


def _added(about: Mapping[str, Any]) -> set[str]:
    return {one["content"] for one in about["added_tokens"]}


def _made(about: Mapping[str, Any], added: set[str]) -> dict[str, None] | None:
    """The tokens in the order in which merges make them; None where one is made at several places of the list."""
    found: dict[str, None] = {}
    last = ""
    for merge in about["model"]["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if token == last or token in added:
            continue  # an added one is found before any merge
        if token in found:
            return None
        found[token] = None
        last = token
    return found


def _joins_two(token: str, vocabulary: Mapping[str, int]) -> bool:
    return any(token[:cut] in vocabulary and token[cut:] in vocabulary for cut in range(1, len(token)))
