"""A student's thoughts told from its answer: only the answer is held against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mtgdm.thoughts import split_thoughts

if TYPE_CHECKING:
    from mtgdm.evaluation.student import Reply
    from mtgdm.rows import Row


def with_thoughts(row: Row) -> str:
    """All that a student of such rows may write for an answer, thoughts included."""
    beside = row.messages[-1].get("reasoning_content")
    return f"{beside}\n{row.answer}" if isinstance(beside, str) else row.answer or ""


def without_thoughts(row: Row) -> Row:
    """The row with the answer alone for its reference."""
    thoughts, answer = split_thoughts(row.answer or "")
    if not thoughts and answer == row.answer:
        return row
    return replace(row, messages=[*row.prompt, {"role": "assistant", "content": answer}])


def split(reply: Reply) -> Reply:
    """The reply with its thoughts apart from its text."""
    thoughts, answer = split_thoughts(reply.text)
    return replace(reply, text=answer, thoughts=thoughts)
