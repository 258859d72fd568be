"""A student behind a server, asked through the teacher backends: the packaged student in Ollama, vLLM's server."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from mtgdm.errors import BadRow, SettingError, UserError
from mtgdm.evaluation.student import Keep, Refuse, Reply, Student
from mtgdm.plugins import named
from mtgdm.teachers.endpoints import backends
from mtgdm.teachers.judgement import Judgement
from mtgdm.teachers.loop import Loop
from mtgdm.teachers.seam import GROUP, Unavailable
from mtgdm.teachers.tokens import at_most, context_size, prompt_at_most

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain
    from mtgdm.rows import Row
    from mtgdm.teachers.loop import Outcome
    from mtgdm.teachers.seam import Backend, TeacherSettings


class AsItIs:
    """The standard of an evaluation: what a student says is what is judged, the cut and the empty included."""

    takes_all: ClassVar[bool] = True

    def __init__(self, domain: Domain, *, constrained: bool) -> None:
        self._domain = domain
        self._constrained = constrained

    def contract(self, row: Row) -> type[BaseModel] | None:
        """The contract of the row's type where answers are to be held to it."""
        return self._domain.contract(row.type) if self._constrained and row.type is not None else None

    def judge(self, row: Row, text: str) -> Judgement:
        """Nothing is wrong with any answer; what it is worth is measured elsewhere."""
        return Judgement(None)


class Served(Student):
    """Greedy, `settings.concurrency` questions in flight."""

    def __init__(
        self,
        settings: TeacherSettings,
        rows: Sequence[Row],
        domain: Domain,
        *,
        base_model: str | None = None,
        constrained: bool = False,
        normalise: bool = False,
        may_think: bool = True,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`say` hears of every retry, `warn` of what the user should look at.

        `normalise` sends texts in NFC, as the student's own tokenizer reads them: llama.cpp takes them as they are.
        """
        self._normalise = normalise
        self.may_think = may_think
        self._domain = domain
        self._standard = AsItIs(domain, constrained=constrained)
        self._constrained = constrained
        self._say, self._warn = say, warn
        longest = max(prompt_at_most(row.prompt) for row in rows)
        num_ctx = settings.num_ctx or context_size(longest, settings.max_tokens)
        self._settings = settings.model_copy(update={"num_ctx": num_ctx})
        self._backend: type[Backend] = named(GROUP, settings.backend, "teacher backend")
        with in_words_of("student"):
            first = self._backends(None)[0]
        if constrained and not first.holds_to_schema:
            raise SettingError(
                f"the backend {settings.backend} cannot hold an answer to a schema",
                hint="leave out --constrained, or ask a server: --backend ollama, --backend openai",
            )
        self.name = f"{settings.backend} {first.model}".strip()
        self.base_name = base_model
        self.identity = {"served": first.fingerprint, "constrained": constrained}
        self.base_identity = {}  # a server tells no more of it than its name
        self.max_new_tokens = settings.max_tokens
        self._unconstrained = False
        self._loop: Loop | None = None

    def ask(self, rows: Sequence[Row], keep: Keep, refuse: Refuse, *, base: bool = False) -> None:
        """Ask over the request loop of the teacher: retries, several addresses, fewer where the server is busy."""
        by_id = {row.id: row for row in rows}

        def record(outcome: Outcome) -> None:
            row = by_id.pop(outcome.row.id, None)
            if row is None:
                return  # the witness
            completion = outcome.completion
            if outcome.reason is not None or completion is None:
                refuse(row, outcome.reason or "no answer came")
                return
            reply = Reply(
                completion.text,
                completion.finish_reason,
                completion.prompt_tokens,
                completion.output_tokens,
                completion.seconds,
            )
            keep(row, reply)

        with in_words_of("student"):
            try:
                self._run(rows, record, base=base)
            except Unavailable:
                if self.witness is None:
                    raise
                # These rows alone may fail: a server that answers another one is there, and they are refused.
                self._run([self.witness, *by_id.values()], record, base=base)

    def _run(self, rows: Sequence[Row], record: Callable[[Outcome], None], *, base: bool) -> None:
        asked = self._backends(self.base_name if base else None)
        self._loop = loop = Loop(asked, self._settings, self._standard, say=self._say, warn=self._warn)
        asyncio.run(loop.run(map(self._as_sent, rows), record))
        self._unconstrained |= self._constrained and not all(one.holds_to_schema for one in asked)

    def notes(self) -> list[str]:
        """How many rows are in flight, and how much of their answers is written."""
        return [] if self._loop is None else self._loop.flight_notes()

    def remarks(self) -> Iterator[str]:
        """Whether the server took the schemas after all."""
        if self._unconstrained:
            yield "the server takes no schemas: the answers were not constrained"

    def _as_sent(self, row: Row) -> Row:
        if not self._normalise:
            return row
        messages = [
            {**message, "content": unicodedata.normalize("NFC", message["content"])}
            for message in row.messages
        ]
        return replace(row, messages=messages)

    def _backends(self, model: str | None) -> list[Backend]:
        settings = self._settings if model is None else self._settings.model_copy(update={"model": model})
        return backends(self._backend, settings, self._domain)


@contextmanager
def in_words_of(who: Literal["student", "judge"]) -> Iterator[None]:
    """Errors of a teacher backend in the words, and with the flags, of who is asked here."""
    try:
        yield
    except BadRow:
        raise  # of a file, which is the same whoever is asked
    except (UserError, SettingError) as error:
        message, hint = (
            error.message.replace("teacher", who),
            error.hint and error.hint.replace("teacher", who),
        )
        if who == "judge":
            message = f"the judge: {message}"
            hint = hint and re.sub(r"--(?=(?:model|url|backend)\b)", "--judge-", hint)
        if hint and hint.startswith(("--temperature", "--top-p")):
            hint = "it is asked for the likeliest tokens alone, so that a run can be repeated: take a server that can"
        raise type(error)(message, where=error.where, hint=hint) from error


def answer_limit(references: Sequence[str]) -> int:
    """A quarter more tokens than the longest reference may have, in steps of 32."""
    longest = max(map(at_most, references))
    return -(-5 * (longest + 1) // (4 * 32)) * 32
