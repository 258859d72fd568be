"""A tokenizer.json as GGUF holds it: tokens, their kinds, merges or scores, and the name of the pre-tokenizer.

llama.cpp cuts a text by rules of its own, which it knows by name. So a tokenizer is recognised by what it
does - its patterns, its normaliser, its flags - and whatever llama.cpp would do otherwise is refused:
a file with the wrong rules loads without a word and reads other tokens than the student was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mtgdm.checkpoints import json_object
from mtgdm.export import pretokenizers, sentencepiece, surroundings
from mtgdm.export.pretokenizers import steps
from mtgdm.export.surroundings import Piece

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""Kinds of tokens: from merges, never written as text, added and written as text, a place without a token, a byte."""
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0
"""What the official converter gives tokens that no merge makes; nothing is decided by them."""
ROLES = ("bos", "eos", "pad", "unk", "sep", "mask")
_LOOK_SPECIAL = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
_SPECIAL_NAMES = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF says of its tokenizer."""

    model: Literal["gpt2", "llama"]
    """As GGUF calls byte-level BPE, and SentencePiece's kind."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    """Empty where scores tell what is joined first."""
    scores: list[float]
    space_in_front: bool | None
    """Whether llama.cpp puts a space before each text between special tokens; None for byte-level BPE."""
    strips_like_phi3: bool
    """Whether special tokens take the spaces behind them, which llama.cpp knows by the model's name."""
    adds_bos: bool
    """Whether the tokenizer itself puts the first token in front of a text."""
    normalizes: bool
    """Whether texts are brought to NFC first, which llama.cpp leaves to who calls it."""
    ids: dict[str, int]
    """`bos`, `eos`, `pad`, `unk`, `sep` and `mask`, as far as the tokenizer names them."""


def read(folder: Path, size: int, template: str | None = None) -> Vocabulary:
    """The tokenizer of a folder with `size` places, of which those behind the last token stay unused.

    Only for one that has no `problems`.
    """
    about = json_object(folder / "tokenizer.json")
    bytes_ = not sentencepiece.is_of_this_kind(about)
    rules = pretokenizers.rules_of(about) if bytes_ else None
    all_tokens = _all_tokens(about)
    tokens, types = _tokens(about, size, all_tokens)
    bos = _bos(about)
    ids = _special_ids(folder, all_tokens)
    return Vocabulary(
        model="gpt2" if bytes_ else "llama",
        pre=rules.name if rules else "default",
        tokens=tokens,
        types=types,
        merges=_merges(about) if bytes_ else [],
        scores=[] if bytes_ else _scores(about, size, all_tokens),
        space_in_front=None if bytes_ else _space_in_front(about, _chat(folder, about, template)),
        strips_like_phi3=surroundings.strips_like_phi3(about["added_tokens"]),
        adds_bos=bos is not None,
        normalizes=pretokenizers.normalizes(about),
        ids=ids if bos is None else {**ids, "bos": all_tokens[bos]},
    )


def problems(folder: Path, size: int, template: str | None = None) -> Iterator[str]:
    """Why llama.cpp would read other tokens than this tokenizer; nothing where it reads the same.

    `template` is the chat template in use, the folder's own by default.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        yield "there is no tokenizer.json"
        return
    about = json_object(path)
    model = about["model"]
    if model["type"] != "BPE":
        yield f"the tokenizer is no BPE but {model['type']}"
        return
    if sentencepiece.is_of_this_kind(about):
        yield from sentencepiece.problems(about)
    elif pretokenizers.is_byte_level(about):
        yield from _byte_level_problems(about)
    else:
        yield "the tokenizer is a BPE neither of bytes nor with bytes for unknown characters"
    for flag in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(flag):
            yield f"its BPE has a {flag.replace('_', ' ')}"
    yield from _beside_tokens(folder, about, template)
    largest = max(_all_tokens(about).values())
    if largest >= size:
        yield f"it makes token {largest:,}, and the model knows {size:,}"


def _byte_level_problems(about: Mapping[str, Any]) -> Iterator[str]:
    rules = pretokenizers.rules_of(about)
    if rules is None:
        yield "its pattern to cut a text into words is none that llama.cpp is known to share"
    elif bool(about["model"].get("ignore_merges")) != rules.ignore_merges:
        yield f"it uses its merges otherwise than llama.cpp does for tokenizers like {rules.name}"
    for change in pretokenizers.changes(about):
        yield f"it changes texts ({change}) in a way that llama.cpp does not"


def _beside_tokens(folder: Path, about: Mapping[str, Any], template: str | None) -> Iterator[str]:
    """What an added token does to the text around it and llama.cpp does not, as far as the template has it happen."""
    added = about["added_tokens"]
    if whole := next((one["content"] for one in added if one.get("single_word")), None):
        yield f"its token {whole} stands for whole words alone"
    strips = surroundings.strips(added) and not surroundings.strips_like_phi3(added)
    if not strips and not sentencepiece.is_of_this_kind(about):
        return
    chat = _chat(folder, about, template)
    if strips:
        taking = (one["content"] for one in added if one.get("lstrip") or one.get("rstrip"))
        if token := next(taking if chat is None else surroundings.stripped(chat), None):
            yield f"its token {token} takes the spaces around it, and the chat template writes some there"
    if not sentencepiece.is_of_this_kind(about):
        return
    if sentencepiece.space_in_front(about) is not None and _space_in_front(about, chat) is None:
        yield "it puts a space before some of the texts between special tokens, and llama.cpp before all or none"
    late = next((one["content"] for one in added if one.get("normalized")), None)
    if late is not None and sentencepiece.space_in_front(about) == "always":
        yield f"it looks for its token {late} after a space was put in front, and llama.cpp before"


def _chat(folder: Path, about: Mapping[str, Any], template: str | None) -> list[Piece] | None:
    """A chat in pieces; None where there is no template, or where nothing depends on it."""
    added = about["added_tokens"]
    scheme = sentencepiece.space_in_front(about) if sentencepiece.is_of_this_kind(about) else None
    if scheme not in ("unless there", "at the start") and not surroundings.strips(added):
        return None
    chat = surroundings.chat_of(folder, template)
    return None if chat is None else surroundings.pieces(chat, added)


def _space_in_front(about: Mapping[str, Any], chat: list[Piece] | None) -> bool | None:
    """What to tell llama.cpp; None where neither answer gives the tokens of the training."""
    scheme = sentencepiece.space_in_front(about)
    if scheme in ("always", "never", None):
        return scheme == "always" if scheme else None
    texts = surroundings.texts(chat or [])
    if scheme == "at the start":
        if not chat or chat[0].token is not None:
            return False
        return None if len(texts) > 1 or texts[0].startswith((" ", sentencepiece.SPACE)) else True
    led = [text.startswith((" ", sentencepiece.SPACE)) for text in texts]
    return None if any(led) and not all(led) else not any(led)


def _all_tokens(about: Mapping[str, Any]) -> dict[str, int]:
    return {**about["model"]["vocab"], **{one["content"]: one["id"] for one in about["added_tokens"]}}


def _tokens(
    about: Mapping[str, Any], size: int, all_tokens: Mapping[str, int]
) -> tuple[list[str], list[int]]:
    """The token at each place and its kind."""
    pieces = sentencepiece.is_of_this_kind(about)
    tokens = [f"[PAD{place}]" for place in range(size)]
    types = [UNUSED] * size
    for token, place in all_tokens.items():
        tokens[place] = token
        types[place] = BYTE if pieces and sentencepiece.is_byte(token) else NORMAL
    for one in about["added_tokens"]:
        content, place = one["content"], one["id"]
        types[place] = CONTROL if one["special"] or _looks_special(content) else USER_DEFINED
        if pieces and types[place] == USER_DEFINED:
            # llama.cpp looks for these in the text as it is, before spaces are replaced.
            tokens[place] = content.replace(sentencepiece.SPACE, " ")
    return tokens, types


def _looks_special(token: str) -> bool:
    """Whether llama.cpp's converter takes a token for one of control by its name; GPT and DeepSeek forget to say so."""
    return token in _SPECIAL_NAMES or any(
        token.startswith(first) and token.endswith(last) for first, last in _LOOK_SPECIAL
    )


def _merges(about: Mapping[str, Any]) -> list[str]:
    return [one if isinstance(one, str) else " ".join(one) for one in about["model"]["merges"]]


def _scores(about: Mapping[str, Any], size: int, all_tokens: Mapping[str, int]) -> list[float]:
    found = [_UNUSED_SCORE] * size
    normal = sentencepiece.scores(about, size)
    for token, place in all_tokens.items():
        found[place] = normal.get(token, 0.0 if sentencepiece.is_byte(token) else _ADDED_SCORE)
    return found


def _bos(about: Mapping[str, Any]) -> str | None:
    """The token that the post-processor puts in front of a text, where it is a single one as llama.cpp's is."""
    for step in steps(about, "post_processor"):
        single = step.get("single")
        if single and len(single) > 1 and "SpecialToken" in single[0] and "Sequence" in single[1]:
            return str(single[0]["SpecialToken"]["id"])
    return None


def _special_ids(folder: Path, all_tokens: Mapping[str, int]) -> dict[str, int]:
    path = folder / "tokenizer_config.json"
    config = json_object(path) if path.is_file() else {}
    found = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str) and content in all_tokens:
            found[role] = all_tokens[content]
    return found
