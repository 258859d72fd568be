"""What a model thought before its answer, told apart from the answer.

Reasoning models write their thoughts into the same text wherever their server does not take them off:
between tags of many names, on a channel, or as plain words of a known form. Only thoughts that stand
before the answer are certain; a tag in the middle of a text stays, and is found by `thought_tag`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = (
    r"(?:[\w:.-]{0,24}(?:think|thought|reason|reflect|scratchpad|monologue)[\w:.-]{0,24}"
    r"|analysis|rationale|cot|chain[_-]of[_-]thoughts?|思考|思考过程|推理|推理过程|思维链|反思)"
)
_SURE_NAME = r"(?:(?:\w{1,8}:)?think(?:ing)?|thoughts?|reasoning|思考(?:过程)?)"
"""A closing tag without an opening one ends a thought only under these names."""


@dataclass(frozen=True)
class _Form:
    """How one family of models marks its thoughts."""

    opening: re.Pattern[str]
    closing: str
    """A pattern; `{name}` is what the group `name` of the opening matched."""
    lone_closing: re.Pattern[str] | None = None
    """What ends a thought that the prompt had opened, so that only its end is in the text."""
    open_end: bool = True
    """Whether an opening that is never closed makes all that follows a thought."""


def _form(opening: str, closing: str, lone_closing: str | None = None, *, open_end: bool = True) -> _Form:
    # A tag inside a code span is spoken of, not used.
    lone = re.compile(rf"(?<!`)(?:{lone_closing})(?!`)", re.IGNORECASE) if lone_closing else None
    return _Form(re.compile(opening, re.IGNORECASE), closing, lone, open_end)


_FORMS = (
    # <think>, <thinking>, <thought>, <reasoning>, <reflection>, <seed:think>, <mm:think>, ...
    _form(rf"<(?P<name>{_NAME})(?:\s[^<>]{{0,200}})?(?<!/)>", r"</{name}\s*>", rf"</{_SURE_NAME}\s*>"),
    _form(rf"<{_NAME}\s*/>", ""),
    _form(rf"&lt;(?P<name>{_SURE_NAME})&gt;", r"&lt;/{name}&gt;", rf"&lt;/{_SURE_NAME}&gt;"),
    _form(r"<details\s[^<>]{0,200}type=[\"']?reasoning[^<>]{0,200}>", r"</details\s*>"),
    # Magistral
    _form(r"\[(?P<name>think(?:ing)?)\]", r"\[/{name}\]", r"\[/think(?:ing)?\]"),
    # Kimi
    _form(r"◁\s*think\s*▷", r"◁\s*/\s*think\s*▷", r"◁\s*/\s*think\s*▷"),
    # Sky-T1, Cohere, Apertus, Solar
    _form(
        rf"<\|(?:begin|start)_?(?:of_?)?(?P<name>{_SURE_NAME})\|>",
        r"<\|end_?(?:of_?)?{name}\|>",
        rf"<\|end_?(?:of_?)?{_SURE_NAME}\|>",
    ),
    _form(r"<\|START_THINKING\|>", r"<\|END_THINKING\|>", r"<\|END_THINKING\|>"),
    _form(r"<\|inner_prefix\|>", r"<\|inner_suffix\|>", r"<\|inner_suffix\|>"),
    _form(
        rf"<\|(?P<name>{_SURE_NAME})(?:_start|_begin)?\|>",
        r"<\|(?:/{name}|end_?(?:of_)?{name}|{name}_end)\|>"
        r"|<\|end\|>\s*(?:<\|(?:begin|start)\|>\s*assistant\s*)?<\|content\|>",
        rf"<\|(?:/{_SURE_NAME}|{_SURE_NAME}_end)\|>",
    ),
    # Gemma 4, and Gemma 3 trained to think
    _form(r"<\|channel>\s*(?:thought|thinking|analysis)\b", r"<channel\|>", r"<channel\|>"),
    _form(r"<unused94>(?:\s*thought\b)?", r"<unused95>", r"<unused95>"),
    # Granite 3, and the terminal of Ollama
    _form(r"Here(?: i|')s my (?:thought|thinking) process:", r"Here(?: i|')s my response:", open_end=False),
    _form(r"Thinking\.\.\.[ \t]*\n", r"\n[ \t]*\.\.\.done thinking\.", open_end=False),
)
"""Every form of a thought that stands before an answer."""

_TOKEN = re.compile(
    r"(?:<\|?[\w:.-]{1,40}\|?>|<[|｜][^\s<>|｜]{1,40}[|｜]>)(?:\s*(?:assistant|model)\b)?", re.IGNORECASE
)
"""What may open a turn before the thought: `<s>`, `<|im_start|>assistant`, `<start_of_turn>model`."""

_HARMONY = re.compile(
    r"(?:<\|start\|>[^<]{0,80})?(?:<\|channel\|>\s*(?P<channel>\w*)[^<]{0,80})?(?:<\|constrain\|>[^<]{0,40})?<\|message\|>"
)
_HARMONY_END = re.compile(r"(?:\s*<\|(?:end|return|call)\|>)+\s*$")
_HARMONY_PLAIN = re.compile(
    r"(?:assistant)?\s?(?:analysis|commentary)(?P<thoughts>.*)assistant\s?final(?P<answer>.*)", re.DOTALL
)
_HARMONY_PLAIN_FINAL = re.compile(r"assistantfinal")
_HARMONY_PLAIN_OPEN = re.compile(r"(?:assistant)?analysis(?=[A-Z\"'“‘\u3400-\u9fff])")
_HARMONY_JSON = re.compile(r"\s*(?:<\|constrain\|>)?\s*json(?=\s*[{\[])")

_ANSWER = re.compile(
    r"(?P<open><(?P<tag>answer|final_answer|final|response|output)>"
    r"|<\|begin_of_(?P<of>solution|answer|response)\|>|<\|START_(?P<upper>RESPONSE|TEXT)\|>|<\|content\|>)",
    re.IGNORECASE,
)
_LONE_TAG = re.compile(
    rf"</?{_SURE_NAME}\s*/?>|\[/?THINK(?:ING)?\]|◁\s*/?\s*think\s*▷|<\|channel>|<channel\|>", re.IGNORECASE
)
_CODE = re.compile(r"(`{1,3})(?:(?!\1).)+?\1", re.DOTALL)
_FIRST = frozenset("<[◁&actTH")
_MARKS = ("</", "[/", "▷", "|>", "<unused95>", "&lt;/")


def split_thoughts(text: str) -> tuple[str, str]:
    """The thoughts of a text without their tags, "" where there are none, and the answer.

    An answer is "" where a thought was opened and never closed. A text without thoughts comes back as it is.
    """
    start = text.lstrip()
    if start[:1] not in _FIRST and not any(mark in text for mark in _MARKS):
        return "", text
    thoughts: list[str] = []
    rest: str | None = start
    found = False
    while rest is not None:
        split = _first_thought(rest, found=found)
        if split is None:
            break
        found = True
        thoughts.append(split[0].strip())
        rest = split[1].lstrip()
        if not rest:
            break
    answer = _unwrapped(rest or "", certain=found)
    if answer is None:
        return ("\n\n".join(filter(None, thoughts)), (rest or "").strip()) if found else ("", text)
    return "\n\n".join(filter(None, thoughts)), answer


def thought_tag(text: str) -> str | None:
    """A tag of a thought somewhere in an answer, outside code spans, where nothing says what it belongs to."""
    if _LONE_TAG.search(text) is None:
        return None
    found = _LONE_TAG.search(_CODE.sub("", text))
    return found[0] if found else None


def _first_thought(text: str, *, found: bool) -> tuple[str, str] | None:
    """The thought that a text begins with, and all that follows; None where it begins with none."""
    if split := _harmony(text):
        return split
    place = 0
    while True:
        for form in _FORMS:
            if opened := form.opening.match(text, place):
                split = _block(form, opened, text)
                if split is not None:
                    return split
        token = _TOKEN.match(text, place)
        if token is None or token.end() == place:
            break
        place = token.end()
        place += len(text[place:]) - len(text[place:].lstrip())
    return _lone_closing(text, found=found)


def _block(form: _Form, opened: re.Match[str], text: str) -> tuple[str, str] | None:
    """A thought from its opening to the closing that belongs to it, or to the last where none does."""
    if not form.closing:
        return "", text[opened.end() :]
    name = re.escape(opened.groupdict().get("name") or "")
    closing = re.compile(form.closing.replace("{name}", name), re.IGNORECASE)
    ends = list(closing.finditer(text, opened.end()))
    if not ends and form.lone_closing is not None:  # <think> ... </thinking>
        ends = list(form.lone_closing.finditer(text, opened.end()))
    if not ends:
        return (text[opened.end() :], "") if form.open_end else None
    starts = [one.start() for one in form.opening.finditer(text, opened.end()) if one[0] == opened[0]]
    end = next(
        (
            end
            for number, end in enumerate(ends, start=1)
            if sum(start < end.start() for start in starts) < number
        ),
        ends[-1],
    )
    return text[opened.end() : end.start()], text[end.end() :]


def _lone_closing(text: str, *, found: bool) -> tuple[str, str] | None:
    """The thought that the prompt opened: all before the first closing, where nothing opens one there."""
    for form in _FORMS:
        if form.lone_closing is None or (end := form.lone_closing.search(text)) is None:
            continue
        thought, rest = text[: end.start()], text[end.end() :]
        if form.opening.search(thought) is None and (rest.strip() or not found):
            return thought, rest
    return None


def _harmony(text: str) -> tuple[str, str] | None:
    """The channels of gpt-oss, with their special tokens or after a server has dropped those."""
    if "<|message|>" in text:
        return _harmony_messages(text)
    if plain := _HARMONY_PLAIN.fullmatch(text):
        return plain["thoughts"], _HARMONY_JSON.sub("", plain["answer"], count=1)
    if final := _HARMONY_PLAIN_FINAL.match(text):
        return "", _HARMONY_JSON.sub("", text[final.end() :], count=1)
    if opened := _HARMONY_PLAIN_OPEN.match(text):
        return text[opened.end() :], ""
    return None


def _harmony_messages(text: str) -> tuple[str, str] | None:
    headers = list(_HARMONY.finditer(text))
    channels = [header["channel"] or "final" for header in headers]
    if not headers or (headers[0].start() > 0 and channels[-1] != "final"):
        return None
    starts = [header.start() for header in headers[1:]] + [len(text)]
    messages = [
        _HARMONY_END.sub("", text[header.end() : start])
        for header, start in zip(headers, starts, strict=True)
    ]
    answer = messages.pop() if channels[-1] == "final" else ""
    return "\n\n".join(filter(None, (text[: headers[0].start()].strip(), *messages))), answer


def _unwrapped(text: str, *, certain: bool) -> str | None:
    """The inside of `<answer>...</answer>` around all of a text; a closing is needed unless a thought came before."""
    opened = _ANSWER.match(text)
    if opened is None:
        return None
    if opened["tag"]:
        closing = f"</{opened['tag']}>"
    elif opened["of"]:
        closing = f"<|end_of_{opened['of']}|>"
    elif opened["upper"]:
        closing = f"<|END_{opened['upper']}|>"
    else:
        closing = "<|end|>"
    inside = text[opened.end() :].rstrip()
    closed = inside.lower().endswith(closing.lower())
    if not (closed or certain):
        return None
    inside = inside[: -len(closing)] if closed else inside
    return None if opened["open"] in inside else inside.strip()
