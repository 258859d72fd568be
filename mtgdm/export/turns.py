"""A chat template taken apart: what it writes before and after the text of each role, where that is all it does.

The template of a base does more than a student was trained for: it offers tools, switches thinking, writes dates.
Engines look at what it offers and ask accordingly. And Ollama's own templates are written in Go's language, which
cannot run Jinja. But a template that sets a fixed text around each turn, as most do in the end, can be written anew
in either language with nothing left to decide. What is fixed is found by rendering conversations of marked texts,
and believed only after it rendered others to the same characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, takewhile
from typing import Literal

from mtgdm.domain import Message
from mtgdm.errors import UserError
from mtgdm.student.template import RENDER_ERRORS

Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether an answer is asked for, to the text that the training template makes of them."""
SystemPlace = Literal["a turn", "the first question", "the last question"]

_ROLES = ("system", "user", "assistant")
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
_WHITE = ("\n \n a\nb \n ", " a\n", "\na ", "\n\nb")
"""Texts that tell how white space at their ends is treated."""

_ABOUT = (
    "{# The chat template of a student distilled with mtgdm. It writes, to the character, what the training wrote, and "
    "leaves nothing to the server that renders it: no switch, no date, no functions to call. The texts around each "
    "turn are fixed; where a conversation brings no system text, what stands before its first turn is what the "
    "training put there. #}"
)
"""Ollama takes a template within 100 edits of one it knows for that one: so many letters of our own keep it away."""


class NotOfTurns(UserError):
    """The template does more than to set a fixed text around each turn."""


@dataclass(frozen=True)
class Treatment:
    """What a template does to the white space around a text."""

    jinja: str
    of: Callable[[str], str]


_AS_IT_IS = Treatment("", lambda text: text)
_TREATMENTS = (
    _AS_IT_IS,
    Treatment(" | trim", str.strip),
    Treatment(".rstrip()", str.rstrip),
    Treatment(".lstrip()", str.lstrip),
    Treatment(".lstrip('\\n')", lambda text: text.lstrip("\n")),
    Treatment(".rstrip('\\n')", lambda text: text.rstrip("\n")),
    Treatment(".strip('\\n')", lambda text: text.strip("\n")),
)


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
    system: SystemPlace = "a turn"
    """Where a system text stands; inside a question it stands behind that one's `before`."""
    treatments: dict[str, Treatment] = field(default_factory=lambda: dict.fromkeys(_ROLES, _AS_IT_IS))
    """What happens to the white space around the texts of each role."""

    @property
    def trims(self) -> bool:
        """Whether white space around some text is taken away."""
        return any(one is not _AS_IT_IS for one in self.treatments.values())

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a conversation, with the beginning of the answer."""
        has_system = messages[0]["role"] == "system"
        written = [self.start, "" if has_system else self.without_system]
        last = len(messages) - 1
        inside = {"a turn": None, "the first question": 1, "the last question": last}[self.system]
        for place, message in enumerate(messages):
            role, text = message["role"], self._text(message)
            if role == "system" and self.system != "a turn":
                continue
            led = self._text(messages[0]) + self.after["system"] if has_system and place == inside else ""
            written += [self.before[role], led, text, self.after[role]]
        return "".join([*written, self.ask])

    def _text(self, message: Message) -> str:
        return self.treatments[message["role"]].of(message["content"])

    def go(self, *, start: bool) -> str:
        """The same in the language of Ollama's TEMPLATE, which cannot trim; `start` where no server adds the BOS."""
        first = '{{ if and (eq $i 0) (ne .Role "system") }}' + self.without_system + "{{ end }}"
        cases = "{{ else ".join(
            f'if eq .Role "{role}" }}}}{self.before[role]}{self._go_system(role)}{{{{ .Content }}}}{self.after[role]}'
            for role in self._written_roles
        )
        return (
            (self.start if start else "")
            + "{{ range $i, $_ := .Messages }}"
            + (first if self.without_system else "")
            + "{{ "
            + cases
            + "{{ end }}{{ end }}"
            + self.ask
        )

    def _go_system(self, role: str) -> str:
        if self.system == "a turn" or role != "user":
            return ""
        where = "eq $i 1" if self.system == "the first question" else "eq (len (slice $.Messages $i)) 1"
        return (
            f'{{{{ if and ({where}) (eq (index $.Messages 0).Role "system") }}}}'
            f"{{{{ (index $.Messages 0).Content }}}}{self.after['system']}{{{{ end }}}}"
        )

    def jinja(self) -> str:
        """The same as a chat template of the kind that models carry, with nothing in it to be switched."""
        cases = "".join(
            f"{{% {'elif' if number else 'if'} m['role'] == '{role}' %}}{self._jinja_turn(role)}"
            for number, role in enumerate(self._written_roles)
        )
        lead = (
            f"{{% if loop.first and m['role'] != 'system' %}}{_written(self.without_system)}{{% endif %}}"
            if self.without_system
            else ""
        )
        return (
            _ABOUT
            + (_written(self.start) if self.start else "")
            + f"{{% for m in messages %}}{lead}{cases}{{% endif %}}{{% endfor %}}"
            + (f"{{% if add_generation_prompt %}}{_written(self.ask)}{{% endif %}}" if self.ask else "")
        )

    def _jinja_turn(self, role: str) -> str:
        text = f"(m['content']{self.treatments[role].jinja})"
        behind = f"{{{{ {text} + {_quoted(self.after[role])} }}}}"
        if self.system == "a turn" or role != "user":
            return f"{{{{ {_quoted(self.before[role])} + {text} + {_quoted(self.after[role])} }}}}"
        where = "loop.index0 == 1" if self.system == "the first question" else "loop.last"
        system = f"(messages[0]['content']{self.treatments['system'].jinja})"
        return (
            f"{_written(self.before[role])}{{% if {where} and messages[0]['role'] == 'system' %}}"
            f"{{{{ {system} + {_quoted(self.after['system'])} }}}}{{% endif %}}{behind}"
        )

    @property
    def _written_roles(self) -> tuple[str, ...]:
        return _ROLES if self.system == "a turn" else _ROLES[1:]


def turns_of(render: Render, *, bos: str = "", prompts: Iterable[Sequence[Message]] = ()) -> Turns:
    """What a template sets around each turn; NotOfTurns, with the reason, where that is not all it does.

    `prompts` are conversations that it must render alike too, beside those tried of themselves.
    """
    try:
        plain = _found(render, bos)
        turns = replace(plain, treatments={role: _treatment(render, plain, role) for role in _ROLES})
        fixed = (*turns.before.values(), *turns.after.values(), turns.ask, turns.start, turns.without_system)
        if any("{{" in part for part in fixed):
            raise NotOfTurns("its fixed text holds braces, which Go's templates would take for their own")
        if all(
            turns.render(messages) == render(messages, True) for messages in [*_conversations(), *prompts]
        ):
            return turns
    except RENDER_ERRORS as error:
        raise NotOfTurns(f"it refuses a chat that others take ({error})") from error
    raise NotOfTurns("it does more than to set a fixed text around each turn")


def _found(render: Render, bos: str) -> Turns:
    """The parts, from conversations of marked texts."""
    system, user, answer, second = _MARKS
    opening = _messages("system", system, "user", user)
    whole = _messages("user", user, "assistant", answer, "user", second)
    first, joint, asked = _between(render(opening, True), system, user)
    alone, to_answer, to_second, _ = _between(render(whole, True), user, answer, second)
    start = bos if first.startswith(bos) and alone.startswith(bos) else ""
    first, alone = first.removeprefix(start), alone.removeprefix(start)
    after_user = _end_of_turn(render(_messages("user", user), False), user, asked, to_answer)
    after_user = _common_start(asked, to_answer) if after_user is None else after_user
    after_answer = _end_of_turn(
        render(_messages("user", user, "assistant", answer), False), answer, to_second, to_second
    )
    if after_answer is None or not alone.endswith(to_second[len(after_answer) :]):
        after_answer = to_second[: len(to_second) - len(_common_end(to_second, alone))]
    before_user = to_second[len(after_answer) :]
    place = _place_of_system(render, first, joint, before_user)
    return Turns(
        before={
            "system": first if place == "a turn" else "",
            "user": before_user,
            "assistant": to_answer[len(after_user) :],
        },
        after={
            "system": _without_end(joint, before_user) if place == "a turn" else joint,
            "user": after_user,
            "assistant": after_answer,
        },
        ask=asked[len(after_user) :],
        start=start,
        without_system=_without_end(alone, before_user),
        system=place,
    )


def _end_of_turn(text: str, mark: str, *followed: str) -> str | None:
    """What is written behind the text of a last turn, where that is also what stands there before another turn."""
    end = text.partition(mark)[2]
    return end if end and all(one.startswith(end) for one in followed) else None


def _common_start(one: str, other: str) -> str:
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _common_end(one: str, other: str) -> str:
    return _common_start(one[::-1], other[::-1])[::-1]


def _place_of_system(render: Render, first: str, joint: str, before_user: str) -> SystemPlace:
    system, user, answer, second = _MARKS
    text = render(_messages("system", system, "user", user, "assistant", answer, "user", second), True)
    if text.find(system) > text.find(answer):
        _between(text, user, answer, system, second)
        return "the last question"
    _between(text, system, user, answer, second)
    return "the first question" if first == before_user and not joint.endswith(before_user) else "a turn"


def _treatment(render: Render, plain: Turns, role: str) -> Treatment:
    """What happens to white space around the texts of a role, from texts with much of it."""
    for one in _TREATMENTS:
        turns = replace(plain, treatments={**plain.treatments, role: one})
        chats = [
            _messages(
                *(part for name in (*_ROLES, "user") for part in (name, white if name == role else "x"))
            )
            for white in _WHITE
        ]
        if all(turns.render(chat) == render(chat, True) for chat in chats):
            return one
    raise NotOfTurns(f"it changes the texts of the role {role}")


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


def _without_end(text: str, ending: str) -> str:
    if not text.endswith(ending):
        raise NotOfTurns("what it writes around a turn hangs on the turns beside it")
    return text[: len(text) - len(ending)]


def _written(text: str) -> str:
    return f"{{{{ {_quoted(text)} }}}}"


def _quoted(text: str) -> str:
    """A text as an expression of Jinja.

    Tags of thoughts are written in two pieces: engines that find a whole one in a template take the student for
    one that thinks, and Ollama then asks it to.
    """
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "'" + re.sub(r"<(?=/?think)", "<' + '", escaped) + "'"
