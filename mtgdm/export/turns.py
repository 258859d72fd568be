"""A chat template taken apart: what it writes before and after the text of each role, where that is all it does.

Ollama's own templates are written in Go's language, which cannot run a Jinja template; but one that sets a
fixed text around each turn, as ChatML and Llama-3 do, can be written anew in any. What is fixed is found by
rendering conversations of marked texts, and believed only after it rendered others to the same characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mtgdm.domain import Message
from mtgdm.errors import UserError

Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether an answer is asked for, to the text that the training template makes of them."""

_ROLES = ("system", "user", "assistant")
_CLOCK = "strftime_now"
_MARKS = ("mtgdm-system-mark", "mtgdm-user-mark", "mtgdm-answer-mark", "mtgdm-second-mark")
_TEXTS = (
    "You answer from the record. 你是讲解员。",
    "资料：\n名称：西湖\n\n写一句介绍。",
    '{"name": "西湖", "tips": []}',
    "And {{ .Content }} {% raw %} \\n 'x' \"y\"?",
    "\n  kept as it is \n",
    "好",
)
"""Texts that a template may treat in ways of its own: lines, JSON, marks of template languages, white space."""


class NotOfTurns(UserError):
    """The template does more than to set a fixed text around each turn."""


@dataclass(frozen=True)
class Turns:
    """What stands around the texts of a conversation that ends with the user's turn."""

    before: dict[str, str]
    """Before the text of each role."""
    after: dict[str, str]
    """Behind it."""
    ask: str
    """At the end, where the answer begins."""
    start: str = ""
    """At the very beginning: the BOS token, or nothing."""
    without_system: str = ""
    """In place of a system turn where the conversation begins with none."""
    trims: bool = False
    """Whether white space around a text is taken away."""

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, with the beginning of the answer."""
        lead = "" if messages[0]["role"] == "system" else self.without_system
        turns = [
            self.before[one["role"]]
            + (one["content"].strip() if self.trims else one["content"])
            + self.after[one["role"]]
            for one in messages
        ]
        return "".join([self.start, lead, *turns, self.ask])

    def go(self, *, start: bool) -> str:
        """The same in the language of Ollama's TEMPLATE, `start` where the server adds no BOS by itself."""
        lead = '{{ if and (eq $i 0) (ne .Role "system") }}' + self.without_system + "{{ end }}"
        cases = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            for role in _ROLES
        )
        return (
            (self.start if start else "")
            + "{{ range $i, $_ := .Messages }}"
            + (lead if self.without_system else "")
            + "{{ "
            + cases
            + "{{ end }}{{ end }}"
            + self.ask
        )

    def jinja(self) -> str:
        """The same as a chat template of the kind that models carry."""
        text = "content | trim" if self.trims else "content"
        cases = "".join(
            f"{{% {'elif' if number else 'if'} m['role'] == '{role}' %}}"
            f"{{{{ {_quoted(self.before[role])} + m.{text} + {_quoted(self.after[role])} }}}}"
            for number, role in enumerate(_ROLES)
        )
        lead = (
            f"{{% if loop.first and m['role'] != 'system' %}}{{{{ {_quoted(self.without_system)} }}}}{{% endif %}}"
            if self.without_system
            else ""
        )
        return (
            (f"{{{{ {_quoted(self.start)} }}}}" if self.start else "")
            + f"{{% for m in messages %}}{lead}{cases}{{% endif %}}{{% endfor %}}"
            + f"{{% if add_generation_prompt %}}{{{{ {_quoted(self.ask)} }}}}{{% endif %}}"
        )


def turns_of(
    template: str, render: Render, *, bos: str = "", prompts: Iterable[Sequence[Message]] = ()
) -> Turns:
    """What a template sets around each turn; NotOfTurns, with the reason, where that is not all it does.

    `prompts` are conversations that it must render alike too, beside those tried of themselves.
    """
    if _CLOCK in template:
        raise NotOfTurns("it writes the date of the day")
    plain = _found(render, bos)
    fixed = (*plain.before.values(), *plain.after.values(), plain.ask, plain.start, plain.without_system)
    if any("{{" in part for part in fixed):
        raise NotOfTurns("its fixed text holds braces, which Go's templates would take for their own")
    trimmed = replace(plain, trims=True)
    tried = [*_conversations(), *prompts]
    for turns in (plain, trimmed):
        if all(turns.render(messages) == render(messages, True) for messages in tried):
            return turns
    raise NotOfTurns("it does more than to set a fixed text around each turn")


def _found(render: Render, bos: str) -> Turns:
    """The parts, from conversations of marked texts; what is behind a turn shows where none follows it."""
    system, user, answer, second = _MARKS
    opening = _messages("system", system, "user", user)
    whole = [*opening, *_messages("assistant", answer)]
    first, behind_system, after_user = _between(render(opening, False), system, user)
    after_answer = _between(render(whole, False), system, user, answer)[-1]
    asked = _between(render([*whole, *_messages("user", second)], True), system, user, answer, second)
    alone = _between(render(_messages("user", user), True), user)[0]
    before_user = _without_start(asked[3], after_answer)
    start = bos if first.startswith(bos) else ""
    return Turns(
        before={
            "system": _without_start(first, start),
            "user": before_user,
            "assistant": _without_start(asked[2], after_user),
        },
        after={
            "system": _without_end(behind_system, before_user),
            "user": after_user,
            "assistant": after_answer,
        },
        ask=_without_start(asked[-1], after_user),
        start=start,
        without_system=_without_end(_without_start(alone, start), before_user),
    )


def _conversations() -> list[list[Message]]:
    a, b, c, d, white, short = _TEXTS
    turns = [("system", a), ("user", b), ("assistant", c), ("user", d), ("assistant", white), ("user", short)]
    found = [
        turns[:2],
        turns[1:2],
        turns[:4],
        turns[1:4],
        turns,
        turns[1:],
        [("system", white), ("user", white)],
    ]
    return [[{"role": role, "content": text} for role, text in one] for one in found]


def _messages(*parts: str) -> list[Message]:
    return [{"role": role, "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]


def _between(text: str, *marks: str) -> list[str]:
    """The text cut at each mark, which must stand in it once and in this order."""
    places = [text.find(mark) for mark in marks]
    if any(text.count(mark) != 1 for mark in marks) or any(one > other for one, other in pairwise(places)):
        raise NotOfTurns("it leaves out, repeats or moves the text of a turn")
    parts, place = [], 0
    for mark, found in zip(marks, places, strict=True):
        parts.append(text[place:found])
        place = found + len(mark)
    return [*parts, text[place:]]


def _without_start(text: str, beginning: str) -> str:
    if not text.startswith(beginning):
        raise NotOfTurns("what it writes around a turn hangs on the turns beside it")
    return text[len(beginning) :]


def _without_end(text: str, ending: str) -> str:
    if not text.endswith(ending):
        raise NotOfTurns("what it writes around a turn hangs on the turns beside it")
    return text[: len(text) - len(ending)]


def _quoted(text: str) -> str:
    """A text as a string of Jinja."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
