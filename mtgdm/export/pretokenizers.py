"""How a byte-level tokenizer cuts a text into words, and what llama.cpp calls that.

A tokenizer.json says it as a row of steps, and llama.cpp knows rows of patterns by name. So the steps are brought
into patterns too, and compared: the name of the model does not count, and a pattern that only looks alike is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_THREE_DIGITS = _WORDS + r"\p{N}{1,3}" + _REST
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What the step ByteLevel cuts by where it has no pattern of its own."""
_DIGIT = r"\p{N}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CODE_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    """Words that begin anew at a capital letter, as the tokenizers of Mistral Nemo and GPT-4o have them."""
    one = f"{_BEFORE}{_UPPER}*{_LOWER}+{ending}"
    other = f"{_BEFORE}{_UPPER}+{_LOWER}*{ending}"
    return f"{one}|{other}|{digits}{_CODE_REST}"


@dataclass(frozen=True)
class Rules:
    """A way to cut a text that llama.cpp knows by `name`."""

    name: str
    patterns: tuple[str, ...]
    """Applied one after another, each to the pieces that the one before left."""
    ignore_merges: bool = False
    """Whether a piece that is a token itself is taken whole, whatever the merges say."""


RULES = (
    Rules("qwen2", (_WORDS + _DIGIT + _REST,)),
    Rules("llama-bpe", (_THREE_DIGITS,), ignore_merges=True),
    Rules("dbrx", (_THREE_DIGITS,)),
    Rules("smollm", (_DIGIT, _GPT2)),
    Rules("gpt-2", (_GPT2,)),
    Rules("tekken", (_cased("", _DIGIT),), ignore_merges=True),
    Rules("gpt-4o", (_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),)),
    Rules(
        "deepseek-v3",
        (
            r"\p{N}{1,3}",
            "[一-龥\u3040-ゟ゠-ヿ]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
            "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
        ),
    ),
)
"""Several names of llama.cpp stand for one way (glm4 is llama-bpe, deepseek-r1-qwen is qwen2): one of them will do."""


def steps(about: Mapping[str, Any], part: str) -> list[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json, one or many."""
    value = about.get(part) or {}
    inner = value.get(
        {
            "pre_tokenizer": "pretokenizers",
            "post_processor": "processors",
            "normalizer": "normalizers",
        }[part]
    )
    return list(inner) if inner is not None else [value] if value else []


def is_byte_level(about: Mapping[str, Any]) -> bool:
    """Whether the bytes of a text are what the merges start from."""
    return any(step["type"] == "ByteLevel" for step in steps(about, "pre_tokenizer"))


def rules_of(about: Mapping[str, Any]) -> Rules | None:
    """The way in which a byte-level tokenizer cuts a text; None where llama.cpp is not known to share it.

    Where only the use of the merges is another, those rules are returned all the same: compare `ignore_merges`.
    """
    patterns = _patterns(about)
    ignoring = bool(about["model"].get("ignore_merges"))
    alike = [rules for rules in RULES if rules.patterns == patterns]
    return next((rules for rules in alike if rules.ignore_merges == ignoring), alike[0] if alike else None)


def _patterns(about: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The steps as patterns; None where one of them does more than to cut."""
    *cuts, last = steps(about, "pre_tokenizer")
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    found = [_pattern(step) for step in cuts] + ([_GPT2] if last.get("use_regex", True) else [])
    return None if None in found else tuple(pattern for pattern in found if pattern is not None)


def _pattern(step: Mapping[str, Any]) -> str | None:
    if step["type"] == "Digits" and step.get("individual_digits"):
        return _DIGIT
    if step["type"] != "Split" or "Regex" not in step["pattern"]:
        return None
    # Some files drop what is between the words; every character is in a word, so that is the same.
    way = (step.get("behavior"), bool(step.get("invert")))
    return str(step["pattern"]["Regex"]) if way in (("Isolated", False), ("Removed", True)) else None


def normalizes(about: Mapping[str, Any]) -> bool:
    """Whether a text is brought to NFC first."""
    return any(step["type"] == "NFC" for step in steps(about, "normalizer"))


def changes(about: Mapping[str, Any]) -> Iterator[str]:
    """What is done to a text before it is cut, other than NFC, which the caller of llama.cpp can do as well."""
    return (step["type"] for step in steps(about, "normalizer") if step["type"] != "NFC")
