"""Where the next question goes, and how many may be in flight.

There is one endpoint for each address (a teacher in this process is one too). Each has a limit of its own,
which shrinks while its server says that it has too much to do; the least loaded is asked next; one that
is not reached is left aside for a while and then tried with a single question.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from mtgdm.errors import SettingError
from mtgdm.teachers.slots import Slots

if TYPE_CHECKING:
    from mtgdm.domain import Domain
    from mtgdm.teachers.seam import Backend, TeacherSettings

TOLERATED = 0.1
"""Share of a window's answers that may say `busy`: a stray one says little about the load."""
LEAST_WINDOW = 20
"""Answers of a window, or as many as may be in flight where that is more."""
DECREASE = 0.5
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


def backends(teacher: type[Backend], settings: TeacherSettings, domain: Domain) -> list[Backend]:
    """A backend for each address of the settings, or the one that needs none; SettingError for too many."""
    urls = list(dict.fromkeys(settings.url))
    if len(urls) > 1 and not teacher.has_url:
        raise SettingError(
            f"the teacher backend {settings.backend} has no address, {len(urls)} were given",
            hint="leave out --url",
        )
    return [teacher(settings.model_copy(update={"url": [url]}), domain) for url in urls]


def doubled(first_s: float, times: int, longest_s: float) -> float:
    """A pause that doubles; of thousands of times too, where a power of 2.0 is an OverflowError."""
    return min(longest_s, first_s * 2.0 ** min(times, 64))


class Limit:
    """How many questions may be in flight: additive increase, multiplicative decrease.

    Chiu and Jain (1989), "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance in
    Computer Networks". The limit grows by 1 with as many good answers as may be in flight, never above
    `most`, and halves where more than TOLERATED of a window's answers say `busy`.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.now = most
        self.decreases = 0
        """What was asked before the last of them says nothing about the limit since."""
        self._answers = 0
        self._busy = 0
        self._good = 0

    def note(self, decreases: int, *, busy: bool) -> None:
        """A question asked after so many decreases is over; `busy` where the server had too much to do for it."""
        if decreases != self.decreases:
            return
        window = max(self.now, LEAST_WINDOW)
        self._answers += 1
        self._busy += busy
        self._good += not busy
        if self._busy > window * TOLERATED:
            self.now = max(1, int(self.now * DECREASE))
            self.decreases += 1
            self._answers = self._busy = self._good = 0
        elif self._answers >= window:
            self._answers = self._busy = 0
        if self._good >= self.now:
            self.now = min(self.most, self.now + 1)
            self._good = 0


class Endpoint:
    """A backend with what is known of it."""

    def __init__(self, backend: Backend, most: int) -> None:
        self.backend = backend
        self.limit = Limit(most)
        self.slots = Slots(most)
        self.in_flight = 0
        self.useless = False
        """Whether it said that it cannot be asked at all, and has answered nothing since."""
        self.told = False
        """Whether the user has been told that it is not reached."""
        self._failures = 0
        self._aside_until = 0.0

    @property
    def aside(self) -> bool:
        """Whether it is left alone just now."""
        return self._failures > 0 and time.monotonic() < self._aside_until

    @property
    def room(self) -> int:
        """How many more questions it may be asked; one at most where it has still to show that it is back."""
        return (1 if self._failures else self.limit.now) - self.in_flight

    def reached(self) -> None:
        """It answered, whatever it said."""
        self._failures = 0
        self.useless = self.told = False

    def lost(self) -> bool:
        """It was not reached: leave it aside, longer each time. False where it is aside already."""
        if self.aside:
            return False
        self._aside_until = time.monotonic() + doubled(FIRST_PAUSE_S, self._failures, LONGEST_PAUSE_S)
        self._failures += 1
        return True


class Endpoints:
    """All endpoints of a teacher: `concurrency` questions in flight at most, over all of them."""

    def __init__(self, backends: Sequence[Backend], concurrency: int) -> None:
        self.all = [Endpoint(backend, concurrency) for backend in backends]
        self.in_flight = 0
        self._most = concurrency
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._open = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            for endpoint in self.all:
                await opened.enter_async_context(endpoint.backend)
            self._open = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._open.aclose()

    @property
    def healthy(self) -> list[Endpoint]:
        """Those that are not aside; where all are, none is: somebody must find out which is back."""
        return [endpoint for endpoint in self.all if not endpoint.aside] or self.all

    async def take(self, *, first: bool = False) -> Endpoint:
        """The endpoint for one question, given back when it is over; `first` goes before those who wait."""
        while (endpoint := self._free()) is None:
            waiter = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if first else self._waiting.append)(waiter)
            await waiter
        endpoint.in_flight += 1
        self.in_flight += 1
        return endpoint

    def give_back(self, endpoint: Endpoint) -> None:
        """The question is over."""
        endpoint.in_flight -= 1
        self.in_flight -= 1
        room = min(self._most - self.in_flight, sum(max(0, other.room) for other in self.healthy))
        while room > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                room -= 1

    def _free(self) -> Endpoint | None:
        if self.in_flight >= self._most:
            return None
        found = [endpoint for endpoint in self.healthy if endpoint.room > 0]
        return min(found, key=lambda endpoint: endpoint.in_flight / endpoint.limit.now, default=None)
