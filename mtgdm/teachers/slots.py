"""How many answers a server writes at once, from when their tokens come: what waits in its queue gets none.

Ollama answers one request at a time by default and sends the others nothing until their turn.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mtgdm.teachers.watch import AnswerWatch

LEAST_ANSWERS = 8
"""So many answers, or twice as many as are in flight, are looked at."""
BUSY = 0.5
"""Share of the time in which answers were written that shows a server at work: one that computes an answer first
and sends it in one piece is not seen at work at all."""

JUST_BEGUN = 0.05
"""Share of the time in which an answer was written."""


class Slots:
    """What is known of one server."""

    def __init__(self, asked_for: int) -> None:
        """`asked_for`: how many it is asked for at once."""
        self._asked_for = asked_for
        self._told = False
        self.found: int | None = None
        """How many it writes at once, where that is fewer than it is asked for."""
        self._in_flight: set[AnswerWatch] = set()
        self._answers = 0
        self._most = 0
        self._waited = 0
        """Answers of which another was written while they waited."""
        self._written_s = 0.0
        self._since: float | None = None

    def asked(self, watch: AnswerWatch) -> None:
        """A question was sent."""
        self._in_flight.add(watch)

    def ended(self, watch: AnswerWatch) -> None:
        """Its answer is over, or will not come."""
        self._in_flight.discard(watch)
        if watch.first_at is None or self._told:
            return
        now = time.monotonic()
        self._since = self._since or watch.first_at
        self._answers += 1
        self._written_s += now - watch.first_at
        # What began a moment ago may have waited for this one to end.
        before = now - JUST_BEGUN * (now - watch.first_at)
        written = 1 + sum(other.first_at is not None and other.first_at < before for other in self._in_flight)
        self._most = max(self._most, written)
        self._waited += written < min(1 + len(self._in_flight), self._asked_for)

    def to_tell(self) -> int | None:
        """How many it writes at once, the first time that is known to be too few."""
        if self._told or self._answers < max(LEAST_ANSWERS, 2 * self._asked_for) or self._since is None:
            return None
        self._told = True
        span_s = time.monotonic() - self._since
        at_work = self._written_s >= BUSY * self._most * span_s
        if self._most < self._asked_for and at_work and self._waited >= 0.75 * self._answers:
            self.found = self._most
        return self.found
