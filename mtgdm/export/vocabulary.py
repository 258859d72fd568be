"""A tokenizer.json as GGUF holds it: tokens, their kinds, merges, and the name of the pre-tokenizer.

llama.cpp cuts a text by rules of its own, which it knows by name. So a tokenizer is recognised by what it
does - its Split pattern, its normaliser, its flags - and whatever llama.cpp would do otherwise is refused:
a file with the wrong rules loads without a word and reads other tokens than the student was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtgdm.checkpoints import json_object
from mtgdm.errors import UserError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Rules:
    """A way to cut a text that llama.cpp knows by `name`."""

    name: str
    pattern: str
    ignore_merges: bool
    """Whether a piece that is a token itself is taken whole, whatever the merges say."""


RULES = (
    Rules("qwen2", _WORDS + r"\p{N}" + _REST, ignore_merges=False),
    Rules("llama-bpe", _WORDS + r"\p{N}{1,3}" + _REST, ignore_merges=True),
)

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of tokens: from merges, never written as text, added and written as text, a place without a token."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    adds_bos: bool
    """Whether the tokenizer itself puts the first token in front of a text."""
    normalizes: bool
    """Whether texts are brought to NFC first, which llama.cpp leaves to who calls it."""
    ids: dict[str, int]
    """`bos`, `eos` and `pad`, as far as the tokenizer names them."""


def read(folder: Path, size: int) -> Vocabulary:
    """The tokenizer of a folder with `size` places, of which those behind the last token stay unused."""
    about = json_object(folder / "tokenizer.json")
    if found := [*problems(folder, size)]:
        raise UserError(f"the tokenizer cannot be written as GGUF: {found[0]}", where=folder)
    model, rules = about["model"], _rules(about)
    assert rules is not None
    vocabulary = {**model["vocab"], **{one["content"]: one["id"] for one in about["added_tokens"]}}
    tokens = [f"[PAD{place}]" for place in range(size)]
    types = [UNUSED] * size
    for token, place in vocabulary.items():
        tokens[place], types[place] = token, NORMAL
    for one in about["added_tokens"]:
        types[one["id"]] = CONTROL if one["special"] else USER_DEFINED
    return Vocabulary(
        pre=rules.name,
        tokens=tokens,
        types=types,
        merges=[one if isinstance(one, str) else " ".join(one) for one in model["merges"]],
        adds_bos=_first_special(about) is not None,
        normalizes=about.get("normalizer") is not None,
        ids=_special_ids(folder, vocabulary),
    )


def problems(folder: Path, size: int) -> Iterator[str]:
    """Why llama.cpp would read other tokens than this tokenizer; nothing where it reads the same."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        yield "there is no tokenizer.json"
        return
    about = json_object(path)
    model = about["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or not _is_byte_level(about):
        yield "the tokenizer is no byte-level BPE, as those of Qwen and Llama 3 are"
        return
    rules = _rules(about)
    if rules is None:
        yield "its pattern to cut a text into words is none that llama.cpp is known to share"
    elif bool(model.get("ignore_merges")) != rules.ignore_merges:
        yield f"it uses its merges otherwise than llama.cpp does for tokenizers like {rules.name}"
    if about.get("normalizer") not in (None, {"type": "NFC"}):
        yield f"it changes texts ({about['normalizer'].get('type')}) in a way that llama.cpp does not"
    for flag in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(flag):
            yield f"its BPE has a {flag.replace('_', ' ')}"
    for one in about["added_tokens"]:
        if one.get("lstrip") or one.get("rstrip") or one.get("single_word"):
            yield f"its token {one['content']} takes the spaces around it or whole words alone"
    largest = max([*model["vocab"].values(), *(one["id"] for one in about["added_tokens"])])
    if largest >= size:
        yield f"it makes token {largest:,}, and the model knows {size:,}"


def _steps(about: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The steps of a part of the tokenizer, one or many."""
    value = about.get(part) or {}
    inner = value.get({"pre_tokenizer": "pretokenizers", "post_processor": "processors"}[part])
    return list(inner) if inner is not None else [value] if value else []


def _is_byte_level(about: Mapping[str, Any]) -> bool:
    """Whether a Split and then ByteLevel, without a space of its own in front, cut the text."""
    kinds = [step["type"] for step in _steps(about, "pre_tokenizer")]
    if kinds != ["Split", "ByteLevel"]:
        return False
    split, bytes_ = _steps(about, "pre_tokenizer")
    return (
        split.get("behavior") == "Isolated"
        and not split.get("invert")
        and not bytes_.get("add_prefix_space")
        and not bytes_.get("use_regex")
    )


def _rules(about: Mapping[str, Any]) -> Rules | None:
    pattern = _steps(about, "pre_tokenizer")[0]["pattern"].get("Regex")
    return next((rules for rules in RULES if rules.pattern == pattern), None)


def _first_special(about: Mapping[str, Any]) -> str | None:
    """The token that the post-processor puts in front of a text."""
    for step in _steps(about, "post_processor"):
        single = step.get("single")
        if single and "SpecialToken" in single[0]:
            return str(single[0]["SpecialToken"]["id"])
    return None


def _special_ids(folder: Path, vocabulary: Mapping[str, int]) -> dict[str, int]:
    path = folder / "tokenizer_config.json"
    config = json_object(path) if path.is_file() else {}
    found = {}
    for role in ("bos", "eos", "pad"):
        token = config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in vocabulary:
            found[role] = vocabulary[content]
    return found
