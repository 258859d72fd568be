"""The request loop above every backend: in flight, retried, repaired, judged.

A row ends as kept or as rejected with a reason; one bad row never stops the others. What stops the run
is a teacher that cannot be asked: told so by the backend (Unavailable), or seen as the same failure row
after row. Rows that only failed because the teacher was gone are not written: they are asked again.

A row that waits before its next try holds no place among those in flight; another is asked meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from mtgdm.teachers.cleaning import cleaned
from mtgdm.teachers.endpoints import Endpoint, Endpoints, doubled
from mtgdm.teachers.judgement import Standard
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, Unavailable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from mtgdm.domain import FactCheck, Message
    from mtgdm.rows import Row
    from mtgdm.teachers.seam import Backend, TeacherSettings

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
"""Pauses double from the first to the longest: six retries wait out a server's restart of half a minute."""
LONGEST_RETRY_AFTER_S = 300.0
FIRST_RETRIES = 3
"""So often a failure is tried again before the teacher has answered anything, and a timeout once: a wrong
start is told soon."""
SAME_FAILURES = 5
"""So many rows in a row lost to the same failure, and the run stops instead of rejecting thousands."""
SAME_REFUSALS = 20
"""The same for a teacher that has answered and then refuses row after row: some prompts may really be refused."""
FIRST_REJECTED = 20
"""So many answers rejected and none kept, and the user is told before the night is over."""

CORRECTION = (
    "This answer cannot be used: {problem}. Answer the question again, in full and in the language it asks "
    "for, with this corrected. Output nothing but the answer."
)
SHORTER = "(The answer must be complete within {max_tokens} tokens: be brief.)"


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
    facts: FactCheck | None = None
    """What the kept answer says of its record."""
    reason: str | None = None
    failure: Failure | None = None
    lost: bool = False
    """Whether the teacher was not even reached, the last time it was tried."""
    hint: str | None = None


@dataclass
class _Asking:
    """What one row has seen so far."""

    row: Row
    options: Options
    contract: type[BaseModel] | None
    endpoint: Endpoint | None
    """The place among those in flight that the next question takes."""
    attempts: int = 0
    completion: Completion | None = None
    text: str = ""
    facts: FactCheck | None = None


class Loop:
    """Asks a teacher for the answer to each row, `settings.concurrency` at a time at most."""

    def __init__(
        self,
        backends: Sequence[Backend],
        settings: TeacherSettings,
        judge: Standard,
        *,
        answered_before: bool = False,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`backends`: one for each address. `answered_before`: this teacher has kept rows of an earlier run.

        `say` hears of every retry, `warn` of what the user should look at.
        """
        self._endpoints = Endpoints(backends, settings.concurrency)
        self._settings = settings
        self._judge = judge
        self._say = say
        self._warn = warn
        # Jitter keeps rows from knocking all at once; it shapes no answer.
        self._jitter = random.Random()
        self._answered_before = answered_before
        self._answers = 0
        self._kept = 0
        self._held: list[Outcome] = []
        self._again: deque[Row] = deque()
        self._asked_again: set[str] = set()
        self._workers = 0
        self._waiting = 0
        """Workers whose row waits for its next try."""

    @property
    def in_flight(self) -> int:
        """Questions that are being answered just now."""
        return self._endpoints.in_flight

    async def run(self, rows: Iterator[Row], record: Callable[[Outcome], None]) -> None:
        """Ask for every row; `record` gets each outcome as it comes, in no particular order."""
        self._rows, self._record = rows, record
        async with self._endpoints:
            await self._check()
            try:
                async with asyncio.TaskGroup() as self._group:
                    for _ in range(self._settings.concurrency):
                        self._hire()
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from failed
            self._give_up_held()

    async def _check(self) -> None:
        """Ask every endpoint whether it is there; Unavailable where none is."""
        failed: list[Unavailable] = []
        for endpoint in self._endpoints.all:
            try:
                await endpoint.backend.check()
            except (Retryable, Refused) as error:
                # The first questions will tell, with all their retries: a check may fail where they do not.
                self._say(f"the check of {endpoint.backend.place} failed, asking all the same: {error}")
            except Unavailable as error:
                failed.append(error)
                if len(failed) == len(self._endpoints.all):
                    raise
                self._set_aside(endpoint, str(error))

    def _hire(self) -> None:
        """One more worker where others wait for their next try: twice as many in all as may be in flight, or
        no more than those while nothing was answered and all may wait in vain."""
        concurrency = self._settings.concurrency
        most = 2 * concurrency if self._answers else concurrency
        if self._workers - self._waiting < concurrency and self._workers < most:
            self._workers += 1
            self._group.create_task(self._work())

    async def _work(self) -> None:
        while self._workers - self._waiting <= self._settings.concurrency:
            endpoint = await self._endpoints.take()
            row = self._again.popleft() if self._again else next(self._rows, None)
            if row is None:
                self._endpoints.give_back(endpoint)
                break
            outcome = await self._ask(row, endpoint)
            for proved in self._proved(outcome):
                self._record(proved)
            await asyncio.sleep(0)  # a backend that never waits must not keep Ctrl-C out
        self._workers -= 1

    # --- one row ---------------------------------------------------------------------------------

    async def _ask(self, row: Row, endpoint: Endpoint) -> Outcome:
        settings = self._settings
        asking = _Asking(
            row,
            Options(settings.temperature, settings.top_p, settings.seed, settings.max_tokens, row),
            self._judge.contract(row),
            endpoint,
        )
        try:
            problem = await self._answer(asking, row.prompt)
            repaired = problem is not None
            if problem is not None:
                self._say(f"{row.id} is asked again: {problem}")
                problem = await self._answer(asking, self._repair(asking, problem))
        except Refused as error:
            return self._lost(asking, str(error), Failure.REFUSED, hint=error.hint)
        except Retryable as error:
            return self._lost(asking, str(error), Failure.EXHAUSTED, lost=error.lost)
        if problem is not None:
            return self._lost(asking, problem, Failure.ANSWER)
        return Outcome(
            row, asking.completion, asking.text, asking.attempts, repaired=repaired, facts=asking.facts
        )

    async def _answer(self, asking: _Asking, messages: list[Message]) -> str | None:
        """Ask, and say what is wrong with the answer."""
        completion = await self._retried(asking, messages)
        if self._judge.takes_all:
            return None
        if completion.finish_reason == "length":
            return f"the answer was cut at {completion.output_tokens or asking.options.max_tokens} tokens"
        if completion.finish_reason != "stop":
            return f"the answer ended with '{completion.finish_reason}'"
        judgement = self._judge.judge(asking.row, asking.text)
        asking.facts = judgement.facts
        return judgement.problem

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
    def _lost(
        asking: _Asking, reason: str, failure: Failure, *, lost: bool = False, hint: str | None = None
    ) -> Outcome:
        return Outcome(
            asking.row,
            asking.completion,
            asking.text,
            asking.attempts,
            reason=reason,
            failure=failure,
            lost=lost,
            hint=hint,
        )

    # --- tried again -----------------------------------------------------------------------------

    async def _retried(self, asking: _Asking, messages: list[Message]) -> Completion:
        """The completion of one question, asked until it comes or the retries are used up."""
        tries = 0
        while True:
            endpoint = asking.endpoint or await self._endpoints.take(first=True)
            asking.endpoint = None
            started = time.monotonic()
            try:
                return await self._once(asking, messages, endpoint)
            except Retryable as failed:
                error = failed
            except Unavailable as unavailable:
                endpoint.useless = True
                if all(one.useless for one in self._endpoints.all):
                    raise
                error = Retryable(str(unavailable), lost=True)
            if error.lost and self._others(endpoint):
                self._set_aside(endpoint, str(error))
                continue
            if tries >= self._retries(error):
                raise error
            if error.another_seed:
                asking.options = replace(asking.options, seed=asking.options.seed + 1)
            pause_s = self._pause_s(tries, error.retry_after_s)
            tries += 1
            elapsed_s = time.monotonic() - started
            self._say(f"{asking.row.id}: {error} after {elapsed_s:.2f} s, try {tries + 1} in {pause_s:.1f} s")
            await self._wait(pause_s)

    def _retries(self, error: Retryable) -> int:
        if self._answers:
            return self._settings.retries
        timed_out = isinstance(error.__cause__, TimeoutError)
        return min(1 if timed_out else FIRST_RETRIES, self._settings.retries)

    async def _wait(self, pause_s: float) -> None:
        """Wait for the next try of a row, and let another worker do this one's work."""
        self._waiting += 1
        self._hire()
        try:
            await asyncio.sleep(pause_s)
        finally:
            self._waiting -= 1

    async def _once(self, asking: _Asking, messages: list[Message], endpoint: Endpoint) -> Completion:
        """One question over one endpoint, which learns from how it ends."""
        backend, limit = endpoint.backend, endpoint.limit
        decreases = limit.decreases
        busy = False
        asking.attempts += 1
        try:
            async with asyncio.timeout(self._settings.timeout_s if backend.timed else None):
                completion = await backend.answer(messages, asking.contract, asking.options)
        except TimeoutError as error:
            busy = True
            raise Retryable(f"no answer within {self._settings.timeout_s:g} s") from error
        except Retryable as error:
            busy = error.overloaded
            if not error.lost:
                endpoint.reached()
            raise
        except Refused:
            endpoint.reached()
            raise
        else:
            endpoint.reached()
        finally:
            limit.note(decreases, busy=busy)
            self._endpoints.give_back(endpoint)
        asking.completion = completion
        asking.text = cleaned(completion.text, is_json=asking.contract is not None)
        if not asking.text and completion.finish_reason != "length" and not self._judge.takes_all:
            raise Retryable("the answer is empty", another_seed=True)
        return completion

    def _others(self, endpoint: Endpoint) -> bool:
        """Whether another endpoint can be asked in the place of this one."""
        return any(other is not endpoint and not other.aside for other in self._endpoints.all)

    def _set_aside(self, endpoint: Endpoint, why: str) -> None:
        if endpoint.lost():
            (self._say if endpoint.told else self._warn)(
                f"{endpoint.backend.place} is left aside for a while: {why}"
            )
            endpoint.told = True

    def _pause_s(self, tries: int, retry_after_s: float | None) -> float:
        pause_s = doubled(FIRST_PAUSE_S, tries, LONGEST_PAUSE_S) * self._jitter.uniform(0.5, 1.0)
        return max(pause_s, min(LONGEST_RETRY_AFTER_S, retry_after_s or 0.0))

    # --- a teacher that is gone ------------------------------------------------------------------

    def _proved(self, outcome: Outcome) -> list[Outcome]:
        """The outcomes that may be written now.

        A lost row is held back until another one shows that the teacher is there: what is rejected is
        a row the teacher would not answer, never one it was not there to answer.
        """
        if outcome.failure in (None, Failure.ANSWER):
            return self._answered(outcome)
        ready = self._released() if self._held and _kind(self._held[0]) != _kind(outcome) else []
        self._held.append(outcome)
        known = outcome.failure is Failure.REFUSED and (self._answers or self._answered_before)
        if len(self._held) >= (SAME_REFUSALS if known else SAME_FAILURES):
            raise self._gone()
        return ready

    def _answered(self, outcome: Outcome) -> list[Outcome]:
        self._answers += 1
        self._kept += outcome.failure is None
        if self._answers == FIRST_REJECTED and not self._kept:
            self._warn(
                f"the first {FIRST_REJECTED} answers were all rejected, the last for: {outcome.reason}"
            )
        return [*self._released(), outcome]

    def _released(self) -> list[Outcome]:
        """What was held, now that the teacher is there; rows that it was not there for are asked again.

        Those that failed before its first answer too, for they were tried FIRST_RETRIES times only. Nothing
        is asked again twice: a question that takes its server down would do so until the end of the run.
        """
        held, self._held = self._held, []
        again = [
            one.row
            for one in held
            if one.failure is Failure.EXHAUSTED
            and (one.lost or self._answers <= 1)
            and one.row.id not in self._asked_again
        ]
        self._again.extend(again)
        self._asked_again.update(row.id for row in again)
        return [one for one in held if one.row not in again]

    def _give_up_held(self) -> None:
        """The end of a run that no answer followed: rows the teacher was not there for are not rejected."""
        failed = [one for one in self._held if one.failure is Failure.EXHAUSTED]
        if failed and (not self._answers or any(one.lost for one in failed)):
            raise self._gone()
        for outcome in self._held:
            self._record(outcome)

    def _gone(self) -> Unavailable:
        count, last = len(self._held), self._held[-1]
        failed = f"{count} rows failed in the same way" if count > 1 else "a row failed"
        when = "since the last answer" if self._answers or self._answered_before else "and none was answered"
        return Unavailable(
            f"{failed} {when}: {last.reason}",
            hint=last.hint or "mend the teacher and start again: what is finished is kept",
        )


def _kind(outcome: Outcome) -> str:
    """What makes two failures the same: figures in the words do not matter, nor how a lost server shows."""
    if outcome.failure is Failure.EXHAUSTED:
        return Failure.EXHAUSTED.value
    return re.sub(r"\d+", "0", outcome.reason or "")
