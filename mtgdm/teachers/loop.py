"""The request loop above every backend: in flight, retried, repaired, judged.

A row ends as kept or as rejected with a reason; one bad row never stops the others. What stops the run
is a teacher that cannot be asked: told so by the backend (Unavailable), or seen as the same failure row
after row. Rows that only failed because the teacher was gone are not written: they are asked again.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, TypeVar

from mtgdm.domain import answer_problem
from mtgdm.teachers.cleaning import cleaned
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, Unavailable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import Domain, Message
    from mtgdm.rows import Row
    from mtgdm.teachers.seam import Backend, TeacherSettings

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""Pauses double from the first to the longest: six retries wait out a server's restart of half a minute."""
LONGEST_RETRY_AFTER_S = 300.0
SAME_FAILURES = 5
"""So many rows in a row lost to the same failure, and the run stops instead of rejecting thousands."""

CORRECTION = (
    "This answer cannot be used: {problem}. Answer the question again, in full and in the language it asks "
    "for, with this corrected. Output nothing but the answer."
)
SHORTER = "(The answer must be complete within {max_tokens} tokens: be brief.)"

T = TypeVar("T")


class Failure(Enum):
    """Why a row has no answer to keep."""

    ANSWER = "the teacher answered, but not what was asked for"
    REFUSED = "the server does not take this question"
    EXHAUSTED = "a failure that can pass did not, however often it was tried"


@dataclass(frozen=True)
class Outcome:
    """How one row ended: kept where `reason` is None, else rejected."""

    row: Row
    completion: Completion | None
    """The last whole reply, or None where none came."""
    text: str
    """The answer without thoughts and fences."""
    attempts: int
    """Requests that were sent for this row."""
    repaired: bool = False
    """Whether the kept answer came from the repair turn."""
    reason: str | None = None
    failure: Failure | None = None
    hint: str | None = None


@dataclass
class _Asking:
    """What one row has seen so far."""

    row: Row
    options: Options
    contract: type[BaseModel] | None
    attempts: int = 0
    completion: Completion | None = None
    text: str = ""


class Loop:
    """Asks a backend for the answer to each row, `settings.concurrency` at a time."""

    def __init__(
        self,
        backend: Backend,
        domain: Domain,
        settings: TeacherSettings,
        *,
        answered_before: bool = False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`answered_before`: this teacher has kept rows of an earlier run. `say` hears of every retry."""
        self._backend = backend
        self._domain = domain
        self._settings = settings
        self._say = say
        # Jitter keeps workers from knocking all at once; it shapes no answer.
        self._jitter = random.Random()
        self._answered = answered_before
        self._held: list[Outcome] = []

    async def run(self, rows: Iterator[Row], record: Callable[[Outcome], None]) -> None:
        """Ask for every row; `record` gets each outcome as it comes, in no particular order."""
        async with self._backend:
            await self._check()
            workers = [
                asyncio.create_task(self._work(rows, record)) for _ in range(self._settings.concurrency)
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
            for outcome in self._held:
                record(outcome)

    async def _check(self) -> None:
        try:
            await self._backend.check()
        except (Retryable, Refused) as error:
            # The first questions will tell, with all their retries: a check may fail where they do not.
            self._say(f"the check failed, asking all the same: {error}")

    async def _work(self, rows: Iterator[Row], record: Callable[[Outcome], None]) -> None:
        for row in rows:
            outcome = await self._ask(row)
            for proved in self._proved(outcome):
                record(proved)
            await asyncio.sleep(0)  # a backend that never waits must not keep Ctrl-C out

    # --- one row ---------------------------------------------------------------------------------

    async def _ask(self, row: Row) -> Outcome:
        settings = self._settings
        asking = _Asking(
            row,
            Options(settings.temperature, settings.top_p, settings.seed, settings.max_tokens, row),
            self._domain.contract(row.type) if row.type is not None else None,
        )
        try:
            problem = await self._answer(asking, row.prompt)
            repaired = problem is not None
            if problem is not None:
                self._say(f"{row.id} is asked again: {problem}")
                problem = await self._answer(asking, self._repair(asking, problem))
        except Refused as error:
            return self._lost(asking, str(error), Failure.REFUSED, error.hint)
        except Retryable as error:
            return self._lost(asking, str(error), Failure.EXHAUSTED)
        if problem is not None:
            return self._lost(asking, problem, Failure.ANSWER)
        return Outcome(row, asking.completion, asking.text, asking.attempts, repaired=repaired)

    async def _answer(self, asking: _Asking, messages: list[Message]) -> str | None:
        """Ask, and say what is wrong with the answer."""

        async def once() -> Completion:
            asking.attempts += 1
            completion = await self._backend.answer(messages, asking.contract, asking.options)
            asking.completion = completion
            asking.text = cleaned(completion.text, is_json=asking.contract is not None)
            if not asking.text and completion.finish_reason != "length":
                raise Retryable("the answer is empty", another_seed=True)
            return completion

        def another_seed() -> None:
            asking.options = replace(asking.options, seed=asking.options.seed + 1)

        completion = await self._retried(once, asking.row.id, another_seed)
        if completion.finish_reason == "length":
            return f"the answer was cut at {completion.output_tokens or asking.options.max_tokens} tokens"
        if completion.finish_reason != "stop":
            return f"the answer ended with '{completion.finish_reason}'"
        return answer_problem(self._domain, asking.row.type, asking.text)

    def _repair(self, asking: _Asking, problem: str) -> list[Message]:
        """The question once more: after its own answer and what is wrong with it, or asked to be brief."""
        question: list[Message] = asking.row.prompt
        if asking.completion is not None and asking.completion.finish_reason == "length":
            # A cut answer is often a loop of repetitions, which showing it would only start again.
            brief = SHORTER.format(max_tokens=asking.options.max_tokens)
            last = question[-1]
            return [*question[:-1], {"role": last["role"], "content": f"{last['content']}\n\n{brief}"}]
        return [
            *question,
            {"role": "assistant", "content": asking.text},
            {"role": "user", "content": CORRECTION.format(problem=problem)},
        ]

    @staticmethod
    def _lost(asking: _Asking, reason: str, failure: Failure, hint: str | None = None) -> Outcome:
        return Outcome(
            asking.row,
            asking.completion,
            asking.text,
            asking.attempts,
            reason=reason,
            failure=failure,
            hint=hint,
        )

    # --- tried again -----------------------------------------------------------------------------

    async def _retried(
        self,
        once: Callable[[], Awaitable[T]],
        what: str,
        another_seed: Callable[[], None] = lambda: None,
    ) -> T:
        tries = 0
        while True:
            started = time.monotonic()
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    return await once()
            except TimeoutError:
                error = Retryable(f"no answer within {self._settings.timeout_s:g} s")
            except Retryable as failed:
                error = failed
            if tries >= self._settings.retries:
                raise error
            if error.another_seed:
                another_seed()
            pause_s = self._pause_s(tries, error.retry_after_s)
            tries += 1
            elapsed_s = time.monotonic() - started
            self._say(f"{what}: {error} after {elapsed_s:.2f} s, try {tries + 1} in {pause_s:.1f} s")
            await asyncio.sleep(pause_s)

    def _pause_s(self, tries: int, retry_after_s: float | None) -> float:
        pause_s = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**tries) * self._jitter.uniform(0.5, 1.0)
        return max(pause_s, min(LONGEST_RETRY_AFTER_S, retry_after_s or 0.0))

    # --- a teacher that is gone ------------------------------------------------------------------

    def _proved(self, outcome: Outcome) -> list[Outcome]:
        """The outcomes that may be written now.

        A lost row is held back until another one shows that the teacher is there: what is rejected is
        a row the teacher would not answer, never one it was not there to answer.
        """
        if outcome.failure in (None, Failure.ANSWER):
            self._answered = True
            ready, self._held = [*self._held, outcome], []
            return ready
        if outcome.failure is Failure.REFUSED and self._answered:
            return [outcome]
        if self._held and _kind(self._held[0]) != _kind(outcome):
            ready, self._held = self._held, [outcome]
            return ready
        self._held.append(outcome)
        if len(self._held) >= SAME_FAILURES:
            when = "since the last answer" if self._answered else "and none was answered"
            raise Unavailable(
                f"{len(self._held)} rows failed in the same way {when}: {outcome.reason}",
                hint=outcome.hint or "mend the teacher and start again: what is finished is kept",
            )
        return []


def _kind(outcome: Outcome) -> str:
    """What makes two failures the same: figures in the words do not matter, nor how a lost server shows."""
    if outcome.failure is Failure.EXHAUSTED:
        return Failure.EXHAUSTED.value
    return re.sub(r"\d+", "0", outcome.reason or "")
