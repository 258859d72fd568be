"""What servers and models put around an answer, taken off where it is certain to be no part of it.

What stands in the middle of an answer stays: `markup` names it, and the answer is asked for again.
"""

from __future__ import annotations

import json
import re

from mtgdm.thoughts import split_thoughts, thought_tag

_CONTROL = r"""
    <[|｜][^\s<>|｜]{1,60}[|｜]>                        # <|im_end|>, <|eot_id|>, <｜end▁of▁sentence｜>
  | <\|[a-z_]{1,24}> | <[a-z_]{1,24}\|>                # Gemma 4: <|turn>, <turn|>
  | \[\|[^\s\[\]|]{1,40}\|\]                           # EXAONE: [|endofturn|]
  | </?s> | <(?:bos|eos|pad|sep|cls|mask)>
  | <(?:BOS|EOS|PAD|SEP|CLS|MASK|EOT|EOD)(?:_TOKEN)?>
  | <(?:start|end)_of_[a-z_]{1,16}>                    # Gemma, SmolVLM, GigaChat
  | <seed:[a-z_]{1,16}>
  | <(?:unused|reserved_|extra_id_|SPECIAL_|TOKENS_UNUSED_)\d{1,5}>
  | <(?:eoa|eoh|eod|eop|sop|gmask|fim_[a-z]{1,8}|file_sep|repo_name)>
  | </?tool_(?:call|response)>
  | \[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_RESULTS|TOOL_CALLS|ARGS)\]
  | \[(?:gMASK|sMASK|BOS|EOS|PAD|CLS|SEP|MASK|EOT)\]
  | <</?SYS>>
  | \[e~\[ | \]~!?b[\[\]]                              # MiniMax
"""
_LOST = r"<unk> | <UNK> | \[UNK\] | <0x[0-9A-F]{2}>"
"""What stands for a character that the vocabulary could not write: without it something is missing."""
_CONTROL_TOKEN = re.compile(f"{_CONTROL} | {_LOST}", re.VERBOSE)
_LEADING = re.compile(
    rf"(?:(?:{_CONTROL})\s*(?:(?:assistant|model)(?=\s*(?:\n|<|\[|\Z))\s*)?)+ | (?:assistant|model)\s*\n",
    re.VERBOSE,
)
_TRAILING = re.compile(
    rf"(?:\s*(?:{_CONTROL})(?:\s*(?:assistant|user|model)\b)?)+\s*\Z"
    # A server that drops control tokens leaves the role; one that cuts at them may leave their beginning.
    "| (?<=[。！？.!?\\n])(?:assistant|user|model)\\Z"
    r"| <\|[A-Za-z_]{0,30}\Z | </s\Z | <(?:start|end)_of_turn\Z",
    re.VERBOSE,
)
"""The end of the answer, and perhaps the beginning of a new turn in which nothing was said."""

_INVISIBLE = (
    "\ufeff\u200b\u200c\u200d\u200e\u200f\u2060\u00ad\x00"
    "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
"""Byte order marks, zero-width characters and marks of direction: at an end of a text they say nothing."""
_SPACE = " \t\r\n\f\v\x85\xa0\u3000"

_WHOLE_FENCE = re.compile(r"(?P<fence>`{3,}|~{3,})(?P<inside>.*?)\s*(?P=fence)[`~]*", re.DOTALL)
_FENCE_LINE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*(?P<info>[^\n]*)$", re.MULTILINE)
_TEXT_INFO = re.compile(
    r"(?:markdown|md|plaintext|plain|text|txt|json5?|jsonc?|html|output)\b[ \t]*", re.IGNORECASE
)
_INFO = re.compile(r"[\w.+#-]{0,20}")
_LEAD_IN = re.compile(
    r"[^\n`~]{1,80}[:：][ \t]*\n+(?P<fenced>(?:`{3,}|~{3,})[ \t]*(?:markdown|md|plaintext|text|txt)\b.*)",
    re.DOTALL | re.IGNORECASE,
)
_PROGRAMS = frozenset({
    "python", "py", "python3", "javascript", "js", "typescript", "ts", "jsx", "tsx", "java", "kotlin", "scala", "c",
    "cpp", "c++", "csharp", "cs", "c#", "go", "rust", "rs", "ruby", "php", "swift", "perl", "lua", "r", "julia",
    "haskell", "ocaml", "elixir", "erlang", "clojure", "dart", "sql", "bash", "sh", "shell", "zsh", "powershell",
    "console", "css", "scss", "xml", "yaml", "yml", "toml", "ini", "dockerfile", "makefile", "cmake", "diff",
    "latex", "tex", "mermaid", "vue", "graphql", "proto", "svg",
})  # fmt: skip
"""A fence that names one of these is the answer itself, which is a program."""


def cleaned(text: str, *, is_json: bool) -> str:
    """An answer without thoughts, control tokens at its ends, and what was put around the whole of it."""
    while True:
        before = text
        text = split_thoughts(_trimmed(text))[1]
        text = _without_end_tokens(text)
        text = _bare_object(text) if is_json else _unfenced(text)
        if text == before:
            return text


def markup(text: str) -> str | None:
    """What stands in an answer that only a chat template should write: a control token or a tag of thoughts.

    Its bare name: written out, it would end the turn that quotes it.
    """
    found = _CONTROL_TOKEN.search(text)
    written = found[0] if found else thought_tag(text)
    if written is None:
        return None
    return re.sub(r"[^\w:]+", " ", written).strip() or written


def _trimmed(text: str) -> str:
    return text.strip(_SPACE + _INVISIBLE)


def _without_end_tokens(text: str) -> str:
    if leading := _LEADING.match(text):
        text = text[leading.end() :]
    if text.endswith((">", "]", "[", "assistant", "user", "model", "</s", "_of_turn")) or "<|" in text[-32:]:
        text = _TRAILING.sub("", text)
    return _trimmed(text)


def _bare_object(text: str) -> str:
    """The one JSON object of a text, without the fence and the words around it; else the text of the fence."""
    if text.startswith("{") and text.endswith("}"):
        return text
    start = text.find("{")
    if start >= 0:
        try:
            _, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            return _unfenced(text)
        around = text[:start] + text[end:]
        if "{" not in around and "}" not in around:
            return text[start:end]
    return _unfenced(text)


_DECODER = json.JSONDecoder()


def _unfenced(text: str) -> str:
    """The inside of a fence around the whole of a text; of a fence whose other end is missing, too."""
    if "```" not in text and "~~~" not in text:
        return text
    if lead_in := _LEAD_IN.fullmatch(text):
        inside = _unfenced(lead_in["fenced"])
        return text if inside == lead_in["fenced"] else inside
    if whole := _WHOLE_FENCE.fullmatch(text):
        return _without_info(whole["inside"], text) if _nested(whole["inside"], whole["fence"]) else text
    marks = list(_FENCE_LINE.finditer(text))
    if len(marks) != 1 or text.count("```") + text.count("~~~") != 1:
        return text
    (mark,) = marks
    if mark.start() == 0:
        return _without_info(mark["info"] + text[mark.end() :], text)
    return text[: mark.start()].strip(_SPACE) if mark.end() == len(text) and not mark["info"] else text


def _without_info(inside: str, text: str) -> str:
    """What stands in a fence behind the word that says what it is; all of `text` where it is a program."""
    first, newline, rest = inside.partition("\n")
    first = first.strip(_SPACE)
    if newline and first.split(" ")[0].lower() in _PROGRAMS:
        return text
    if newline and _INFO.fullmatch(first):
        return rest.strip(_SPACE)
    return (_TEXT_INFO.sub("", first, count=1) + newline + rest).strip(_SPACE)


def _nested(inside: str, fence: str) -> bool:
    """Whether the fences inside another are whole ones; else the outer two are not one."""
    if fence not in inside:
        return True
    marks = list(_FENCE_LINE.finditer(inside.partition("\n")[2]))
    opens, closes = marks[::2], marks[1::2]
    return (
        bool(marks)
        and len(opens) == len(closes)
        and all(mark["info"].strip() for mark in opens)
        and not any(mark["info"].strip() for mark in closes)
    )
