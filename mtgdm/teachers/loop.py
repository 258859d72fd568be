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
from mtgdm.teachers.finish import Finish, finish
from mtgdm.teachers.judgement import Standard
from mtgdm.teachers.lengths import Lengths
from mtgdm.teachers.repair import both_reasons, repair_turns, repeats_repair
from mtgdm.teachers.seam import Completion, Options, Refused, Retryable, Unavailable
from mtgdm.teachers.watch import AnswerWatch

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
SAME_SETTING = 5
"""So many rows of a type lost to a setting, and none kept: the run stops, and tells which one to change."""
NEARLY = 0.9
"""An answer that was cut with so much of `max_tokens` written was cut by that setting."""
LONGEST_SHOWN = 4000
"""So much of an answer is shown to its teacher in the repair turn."""

ONLY_THOUGHTS = (
    "the model only thought "
    """(--extra-body '{"chat_template_kwargs": {"enable_thinking": false}}' stops that in many servers)"""
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
    setting: bool = False
    """Whether another setting, which the hint names, would have mended it."""


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
    stopped: str | None = None
    """Why the last answer was stopped while it was written."""


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
        self._lengths = Lengths(settings.max_tokens)
        self._of_setting: dict[str | None, list[Outcome]] = {}
        """By type, rows lost to a setting while none of the type was kept."""
        self._kept_types: set[str | None] = set()
        self._tokens = 0
        """Tokens of answers that are over."""
        self._watches: set[AnswerWatch] = set()
        """Of the answers that are awaited or written just now."""
        self._first_token_at: float | None = None
        self._told: set[str] = set()
        for endpoint in self._endpoints.all:
            endpoint.backend.tell = self._tell_once

    @property
    def in_flight(self) -> int:
        """Questions that are being answered just now."""
        return self._endpoints.in_flight

    @property
    def tokens(self) -> int:
        """Tokens that were written, those of answers that are not over included."""
        return self._tokens + sum(watch.pieces for watch in tuple(self._watches))

    def notes(self) -> list[str]:
        """How it goes just now, for the progress (of another thread): the speed, and what is in flight."""
        speed = []
        if self._first_token_at is not None and (tokens := self.tokens):
            elapsed_s = max(time.monotonic() - self._first_token_at, 1e-3)
            rate = tokens / elapsed_s
            speed = [f"{rate:,.0f} tokens/s" if rate >= 10 else f"{rate:.1f} tokens/s"]
        return [*speed, *self.flight_notes()]

    def flight_notes(self) -> list[str]:
        """How many rows are in flight, and how much of their answers is written."""
        if not self.in_flight:
            return []
        written = sum(watch.pieces for watch in tuple(self._watches))
        return [f"{self.in_flight} in flight" + (f" with {written:,} tokens so far" if written else "")]

    @property
    def answers_at_once(self) -> int | None:
        """How many answers the servers write at once, where that is fewer than they were asked for."""
        found = [endpoint.slots.found for endpoint in self._endpoints.all]
        return sum(one for one in found if one) if any(found) else None

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._warn(text)

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
        contract = self._judge.contract(row)
        limit = settings.max_tokens if self._judge.takes_all else self._lengths.limit(row.type, contract)
        options = Options(settings.temperature, settings.top_p, settings.seed, limit, row)
        asking = _Asking(row, options, contract, endpoint)
        first: str | None = None
        try:
            problem = await self._answer(asking, row.prompt)
            if problem is not None and self._cut_by_what_was_learned(asking):
                self._say(f"{row.id} is asked again with all of --max-tokens: {problem}")
                asking.options = replace(asking.options, max_tokens=settings.max_tokens)
                problem = await self._answer(asking, row.prompt)
            repaired = problem is not None
            if problem is not None:
                first = problem
                self._say(f"{row.id} is asked again: {problem}")
                problem = await self._answer(asking, self._repair(asking, problem))
                if problem is None and repeats_repair(asking.text):
                    problem = "the answer repeats what was said to be wrong with it"
        except Refused as error:
            return self._lost(asking, str(error), Failure.REFUSED, hint=error.hint, setting=error.setting)
        except Retryable as error:
            return self._lost(asking, str(error), Failure.EXHAUSTED, lost=error.lost)
        if problem is not None:
            return self._lost_answer(asking, problem if first is None else both_reasons(first, problem))
        return Outcome(
            row, asking.completion, asking.text, asking.attempts, repaired=repaired, facts=asking.facts
        )

    async def _answer(self, asking: _Asking, messages: list[Message]) -> str | None:
        """Ask, and say what is wrong with the answer."""
        completion = await self._retried(asking, messages)
        if self._judge.takes_all:
            return None
        if asking.stopped is not None:
            return asking.stopped
        match finish(completion.finish_reason):
            case Finish.LENGTH:
                return f"the answer was cut at {completion.output_tokens or asking.options.max_tokens} tokens"
            case Finish.REPETITION:
                return "the answer repeats itself without end, and the server gave it up"
            case Finish.NO_ANSWER:
                return f"the answer ended with '{completion.finish_reason}'"
            case Finish.UNKNOWN:
                # Whether it is whole is judged by the answer; a word of a server alone costs no row.
                self._tell_once(
                    f"the teacher ends answers with '{completion.finish_reason}', which is taken as 'stop'"
                )
        judgement = self._judge.judge(asking.row, asking.text)
        asking.facts = judgement.facts
        return judgement.problem

    def _cut_by_what_was_learned(self, asking: _Asking) -> bool:
        """Whether an answer was cut that the limit of the settings would not have cut."""
        completion = asking.completion
        return (
            completion is not None
            and asking.options.max_tokens < self._settings.max_tokens
            and finish(completion.finish_reason) is Finish.LENGTH
        )

    def _repair(self, asking: _Asking, problem: str) -> list[Message]:
        """The question once more: after its own answer and what is wrong with it, or asked to be brief."""
        question: list[Message] = asking.row.prompt
        ended = None if asking.completion is None else finish(asking.completion.finish_reason)
        if ended in (Finish.LENGTH, Finish.REPETITION):
            # Cut answers are often loops too, which showing them, or the same seed, would only start again.
            asking.options = replace(asking.options, seed=asking.options.seed + 1)
            brief = SHORTER.format(max_tokens=asking.options.max_tokens)
            last = question[-1]
            return [*question[:-1], {"role": last["role"], "content": f"{last['content']}\n\n{brief}"}]
        answer = asking.text[:LONGEST_SHOWN]
        return repair_turns(question, answer, problem, is_json=asking.contract is not None)

    def _lost_answer(self, asking: _Asking, problem: str) -> Outcome:
        """A row whose answer will not do; where `max_tokens` cut it, that setting is to blame."""
        completion, limit = asking.completion, self._settings.max_tokens
        cut = completion is not None and finish(completion.finish_reason) is Finish.LENGTH
        by_setting = cut and completion is not None and (completion.output_tokens or limit) >= NEARLY * limit
        hint = f"allow more with --max-tokens {2 * limit}" if by_setting else None
        return self._lost(asking, problem, Failure.ANSWER, hint=hint, setting=by_setting)

    @staticmethod
    def _lost(
        asking: _Asking,
        reason: str,
        failure: Failure,
        *,
        lost: bool = False,
        hint: str | None = None,
        setting: bool = False,
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
            setting=setting,
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
        watch = self._watch(asking, backend)
        endpoint.slots.asked(watch)
        self._watches.add(watch)
        try:
            async with asyncio.timeout(None) as clock:
                self._set_clock(clock, watch, timed=backend.timed)
                options = replace(asking.options, watch=watch)
                completion = await backend.answer(messages, asking.contract, options)
        except TimeoutError as error:
            busy = True
            raise Retryable(self._late(watch)) from error
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
            self._first_token_at = self._first_token_at or watch.asked_at
            self._tokens += (completion.output_tokens or watch.pieces) - watch.pieces
        finally:
            self._watches.discard(watch)
            self._tokens += watch.pieces
            limit.note(decreases, busy=busy)
            self._endpoints.give_back(endpoint)
            endpoint.slots.ended(watch)
        self._tell_slots(endpoint)
        return self._taken(asking, completion, watch)

    def _taken(self, asking: _Asking, completion: Completion, watch: AnswerWatch) -> Completion:
        """A completion in our words; Retryable or Refused where there is no answer to judge."""
        word = completion.finish_reason
        kind = finish(word)
        asking.stopped = None
        if kind is Finish.STOPPED and watch.problem is not None:
            asking.stopped, kind = watch.problem, watch.reason
        if kind not in (Finish.UNKNOWN, Finish.NO_ANSWER):
            completion = replace(completion, finish_reason=kind.value)
        asking.completion = completion
        asking.text = cleaned(completion.text, is_json=asking.contract is not None)
        if kind is Finish.FAILED:
            raise Retryable(f"the server ended the answer with '{word}'", another_seed=True)
        if self._judge.takes_all:
            return completion
        if kind is Finish.FILTERED:
            raise Refused("the server's content filter ended the answer")
        if not asking.text and kind not in (Finish.LENGTH, Finish.REPETITION) and asking.stopped is None:
            why = f": {ONLY_THOUGHTS}" if watch.thinks else ""
            raise Retryable(f"the answer is empty{why}", another_seed=True)
        return completion

    def _watch(self, asking: _Asking, backend: Backend) -> AnswerWatch:
        row = asking.row
        return AnswerWatch(
            max_tokens=asking.options.max_tokens,
            is_json=asking.contract is not None,
            script=None if row.type is None else backend.domain.script(row.type),
            stops=not self._judge.takes_all,
            began=self._began,
        )

    def _began(self) -> None:
        """The first token of an answer has come."""
        if self._first_token_at is None:
            self._first_token_at = time.monotonic()

    def _set_clock(self, clock: asyncio.Timeout, watch: AnswerWatch, *, timed: bool) -> None:
        if not timed:
            return
        settings, now = self._settings, asyncio.get_running_loop().time()
        deadline = now + settings.deadline_s if settings.deadline_s else None
        first = now + max(settings.first_token_timeout_s, settings.timeout_s)
        clock.reschedule(first if deadline is None else min(first, deadline))
        watch.keep_time(clock, settings.timeout_s, deadline)

    def _late(self, watch: AnswerWatch) -> str:
        """What did not come in time."""
        settings = self._settings
        first_s = max(settings.first_token_timeout_s, settings.timeout_s)
        if settings.deadline_s and watch.waited_s >= settings.deadline_s:
            return f"no whole answer within {settings.deadline_s:g} s"
        if watch.pieces == 0:
            return f"no answer within {first_s:g} s"
        return f"no token for {settings.timeout_s:g} s, after {watch.pieces:,}"

    def _tell_slots(self, endpoint: Endpoint) -> None:
        found = endpoint.slots.to_tell()
        if found is None:
            return
        backend, concurrency = endpoint.backend, self._settings.concurrency
        how = backend.parallel_hint.format(slots=concurrency)
        more = f"{how} (each takes the memory of one more context), or " if how else ""
        self._tell_once(
            f"{backend.place} writes {found} answer{'' if found == 1 else 's'} at a time, and {concurrency} are asked "
            f"for at once: {more}--concurrency {found} waits for no more than it writes"
        )

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
        if outcome.setting and outcome.row.type not in self._kept_types:
            self._answers += outcome.failure is Failure.ANSWER
            return self._held_for_a_setting(outcome)
        if outcome.failure in (None, Failure.ANSWER):
            return self._answered(outcome)
        ready = self._released() if self._held and _kind(self._held[0]) != _kind(outcome) else []
        self._held.append(outcome)
        known = outcome.failure is Failure.REFUSED and (self._answers or self._answered_before)
        if len(self._held) >= (SAME_REFUSALS if known else SAME_FAILURES):
            raise self._gone()
        return ready

    def _held_for_a_setting(self, outcome: Outcome) -> list[Outcome]:
        """Rows that another setting would have saved are not rejected while none of their type was kept."""
        held = self._of_setting.setdefault(outcome.row.type, [])
        held.append(outcome)
        count, of_type = len(held), f" of the type {outcome.row.type}" if outcome.row.type else ""
        if not self._kept:
            count, of_type = sum(map(len, self._of_setting.values())), ""
        if count < SAME_SETTING:
            return []
        raise Unavailable(
            f"the first {count} rows{of_type} failed for one setting: {outcome.reason}", hint=outcome.hint
        )

    def _answered(self, outcome: Outcome) -> list[Outcome]:
        self._answers += 1
        self._kept += outcome.failure is None
        released: list[Outcome] = []
        if outcome.failure is None and outcome.completion is not None:
            kind = outcome.row.type
            if not self._judge.takes_all:
                self._lengths.kept(kind, outcome.completion.output_tokens, outcome.completion.text)
            if kind not in self._kept_types:
                self._kept_types.add(kind)
                released = self._of_setting.pop(kind, [])
        if self._answers == FIRST_REJECTED and not self._kept:
            self._warn(
                f"the first {FIRST_REJECTED} answers were all rejected, the last for: {outcome.reason}"
            )
        return [*self._released(), *released, outcome]

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
        for outcome in (*self._held, *(one for held in self._of_setting.values() for one in held)):
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
