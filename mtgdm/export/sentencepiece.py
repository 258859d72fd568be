"""A tokenizer of SentencePiece's kind as llama.cpp holds it: scores in place of merges, and a space in front or none.

llama.cpp joins the two neighbours whose token has the highest score; tokenizer.json lists pairs by rank. Both do the
same where all pairs that make one token stand together in the list, and each token that two others could make is made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from mtgdm.export.pretokenizers import steps

SPACE = "\u2581"
"""Stands for a space in the tokens."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_BYTES = 256
_LAST = -1e9
"""The score that SentencePiece gives the runs of spaces of Llama."""
_RUNS = 3
"""So many times the longest run is the longest that is tried."""
_ESCAPES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDS = {"type": "Prepend", "prepend": SPACE}

SpaceInFront = Literal["never", "always", "unless there", "at the start"]
"""Where a tokenizer puts a space: before each text between special tokens, those without one, or the first."""


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
    order = _order(about)
    if order is None:
        yield "its merges stand in an order that scores cannot tell"
        return
    made, added = {*order.made, *order.runs}, _added(about)
    unmade = (
        token
        for token in vocabulary
        if len(token) > 1 and token not in made and token not in added and not is_byte(token)
    )
    if two := next((token for token in unmade if _joins_two(token, vocabulary)), None):
        yield f"its merges never make the token {two}, which llama.cpp would make"


def scores(about: Mapping[str, Any], size: int) -> dict[str, float]:
    """The score of each token that is neither added nor a byte: the earlier it is made, the higher.

    Vocabularies that SentencePiece trained number their tokens in this very order; these get the scores that
    SentencePiece gave them. What stands elsewhere in the list comes after `size` others.
    """
    vocabulary, added, order = about["model"]["vocab"], _added(about), _order(about)
    assert order is not None
    normal = [token for token in vocabulary if token not in added and not is_byte(token)]
    first = min(map(vocabulary.__getitem__, normal), default=0)
    found = {token: float(first - vocabulary[token]) for token in normal}
    last = -1
    for place, token in enumerate(order.made):
        if vocabulary[token] < last:
            found.update({late: float(-size - number) for number, late in enumerate(order.made[place:], 1)})
            break
        last = vocabulary[token]
    for run in order.runs:
        found[run] = found[run[0]] = _LAST
    return found


@dataclass(frozen=True)
class _Order:
    """The tokens that merges make, one after another, and runs of one character that are made last, all alike."""

    made: list[str]
    runs: list[str]


def _order(about: Mapping[str, Any]) -> _Order | None:
    """In which order tokens are made; None where one is made at several places of the list.

    Runs of spaces are the exception: Llama's vocabulary gives them all one score, the lowest. Their merges may
    stand in any order that makes of a run what llama.cpp makes of it, which takes the pair furthest left.
    """
    added = _added(about)
    pairs = [tuple(one.split(" ") if isinstance(one, str) else one) for one in about["model"]["merges"]]
    pairs = [
        pair for pair in pairs if pair[0] + pair[1] not in added
    ]  # an added one is found before any merge
    runs = _runs_at_the_end(pairs)
    made = _one_by_one(pairs[: len(pairs) - len(runs)])
    if made is None:
        return None
    if runs and _alike(runs):
        return _Order(made, list(dict.fromkeys(left + right for left, right in runs)))
    last = _one_by_one(runs)
    return None if last is None else _Order([*made, *last], [])


def _runs_at_the_end(pairs: Sequence[tuple[str, ...]]) -> Sequence[tuple[str, ...]]:
    """The last merges, where they make runs of one character that no other token is made with."""
    end = len(pairs)
    while end and len({*pairs[end - 1][0], *pairs[end - 1][1]}) == 1:
        end -= 1
    runs = pairs[end:]
    made = {left + right for left, right in runs}
    return [] if len({run[0] for run in made}) != 1 or any({*pair} & made for pair in pairs[:end]) else runs


def _alike(runs: Sequence[tuple[str, ...]]) -> bool:
    """Whether the merges make of each run what the pair furthest left makes of it, as long as it may be."""
    ranks: dict[tuple[int, int], int] = {}
    for left, right in runs:
        ranks.setdefault((len(left), len(right)), len(ranks))
    lengths = {1} | {sum(pair) for pair in ranks}
    level = {(one, two): 0 for one in lengths for two in lengths if one + two in lengths}
    return all(_joined(count, ranks) == _joined(count, level) for count in range(2, _RUNS * max(lengths)))


def _joined(count: int, ranks: Mapping[tuple[int, int], int]) -> list[int]:
    """The lengths into which so many characters are joined, the lowest rank first and the leftmost of equals."""
    parts = [1] * count
    while found := [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts


def _one_by_one(pairs: Sequence[tuple[str, ...]]) -> list[str] | None:
    """What merges make; None where one token is made at several places of the list."""
    found: dict[str, None] = {}
    last = ""
    for left, right in pairs:
        token = left + right
        if token == last:
            continue
        if token in found:
            return None
        found[token] = None
        last = token
    return list(found)


def _added(about: Mapping[str, Any]) -> set[str]:
    return {one["content"] for one in about["added_tokens"]}


def _joins_two(token: str, vocabulary: Mapping[str, int]) -> bool:
    return any(token[:cut] in vocabulary and token[cut:] in vocabulary for cut in range(1, len(token)))
