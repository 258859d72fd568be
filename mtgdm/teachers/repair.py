"""How a question is asked again after an answer that cannot be used.

A small model answers a last turn that only speaks of a mistake by saying it again. So the last turn is
something that its own words cannot answer: for prose the whole question once more, with what was wrong at
its end; for JSON the correction, which is no JSON and therefore never taken for an answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtgdm.teachers.cleaning import markup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mtgdm.domain import Message

CORRECTION = (
    "This answer cannot be used: {problem}. Answer the question again, in full and in the language it asks "
    "for, with this corrected. Output nothing but the answer."
)
NOTE = "(An earlier answer could not be used: {problem}. Answer in full, without this mistake.)"

_FIXED = (
    "This answer cannot be used",
    "with this corrected. Output nothing",
    "An earlier answer could not be used",
)


def repair_turns(question: Sequence[Message], answer: str, problem: str, *, is_json: bool) -> list[Message]:
    """The messages of the repair turn.

    Prose and answers with markup of a chat template are not shown again: the one would be echoed, the other
    would end its own turn.
    """
    if is_json and answer and markup(answer) is None:
        return [
            *question,
            {"role": "assistant", "content": answer},
            {"role": "user", "content": CORRECTION.format(problem=problem)},
        ]
    last = question[-1]
    note = NOTE.format(problem=problem)
    return [*question[:-1], {**last, "content": f"{last['content']}\n\n{note}"}]


def repeats_repair(text: str) -> bool:
    """Whether an answer says our own words again."""
    return any(words in text for words in _FIXED)


def both_reasons(first: str, then: str) -> str:
    """Why two answers were not kept: in one clause where they failed alike, figures aside."""
    return then if _without_figures(first) == _without_figures(then) else f"first: {first}; then: {then}"


def _without_figures(reason: str) -> str:
    return "".join(character for character in reason if not character.isdigit())
