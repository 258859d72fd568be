"""The seam between an evaluation and what it asks: a model in this process, in vLLM, or behind a server.

A student gets rows and hands back replies as they come; which rows, what is kept and how it is scored is
decided above it, once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtgdm.rows import Row
    from mtgdm.student.chat import Chat


@dataclass(frozen=True)
class Reply:
    """What a student wrote. Token counts are None where a server gives none.

    `latency_s` of a batch is shared by its rows, so that the latencies of a run add up to its time; of a
    server it is how long this one question took, among those in flight.
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    output_tokens: int | None
    latency_s: float
    batch_rows: int | None = None
    """How many rows were generated at once, whose time `latency_s` is a share of; None for a question of its own."""
    thoughts: str = ""
    """What it thought before the text, where that was told apart."""

    @property
    def runtime(self) -> dict[str, Any]:
        """The metrics that are not about the text."""
        tokens, seconds = self.output_tokens, self.latency_s
        return {
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": tokens,
            "latency_s": round(seconds, 6),
            "tokens_per_s": round(tokens / seconds, 3) if tokens is not None and seconds else None,
            "finish_reason": self.finish_reason,
            "batch_rows": self.batch_rows,
        }


RUNTIME = ("prompt_tokens", "output_tokens", "latency_s", "tokens_per_s", "finish_reason", "batch_rows")
"""The keys of `Reply.runtime`."""
Keep = Callable[["Row", Reply], None]
"""Called with each row that was answered, in any order."""
Refuse = Callable[["Row", str], None]
"""Called with each row that could not be asked, and why."""


class Student(ABC):
    """Who is evaluated, and the base it is compared with."""

    name: str
    """As rows and messages call it."""
    base_name: str | None
    """The base model, where there is one to compare with."""
    identity: dict[str, Any]
    """What tells its answers from those of another one."""
    base_identity: dict[str, Any]
    """The same of its base's answers."""
    max_new_tokens: int
    """Where an answer is cut."""
    may_think: bool = True
    """Whether thoughts before an answer are told from it: not of a student that was trained to write none."""
    witness: Row | None = None
    """A row that was answered before, where there is one: by it a student that is gone is told from one that fails."""

    @abstractmethod
    def ask(self, rows: Sequence[Row], keep: Keep, refuse: Refuse, *, base: bool = False) -> None:
        """Ask for every row; `base` asks the base model. The base is asked before the student."""

    def notes(self) -> list[str]:
        """What is going on just now, for the progress."""
        return []

    def remarks(self) -> Iterator[str]:
        """What the user should know of how it was asked, after it was."""
        return iter(())


def answer_limit(chat: Chat, references: Sequence[str]) -> int:
    """A quarter more than the longest reference, in steps of 32, so that a few new rows change nothing."""
    longest = max(len(chat.tokens(text)) for text in references)
    return -(-5 * (longest + 1) // (4 * 32)) * 32


def prompt_ids(chat: Chat, row: Row) -> list[int]:
    """The tokens of a row's prompt; BadRow where the template does not take it."""
    from mtgdm.student.chat import ChatProblem

    try:
        return chat.prompt(row.prompt)
    except ChatProblem as problem:
        raise row.bad(problem.message, hint=problem.hint) from problem
