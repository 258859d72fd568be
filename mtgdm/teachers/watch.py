"""What looks at an answer while it is written, so that a lost one is stopped before it is paid for.

Whatever is stopped is lost for certain: a loop, prose where JSON was asked for, brackets that do not match, a text
in another language, more than the tokens that were asked for. What may still become right goes on.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtgdm.teachers.finish import Finish
from mtgdm.teachers.judgement import script_problem
from mtgdm.teachers.repetition import repeated_sentence, repeated_unit
from mtgdm.teachers.tokens import at_least

if TYPE_CHECKING:
    from mtgdm.domain import Script

LOOK_EVERY = 48
"""Characters between two looks at the end of a text."""
SENTENCES_EVERY = 384
FIRST_MARK = 512
"""The script and the length are looked at here, and then at each mark half as far again."""
BEFORE_JSON = 800
"""So many characters without a brace are no beginning of JSON, whatever a model says before it."""
BEHIND_JSON = 800
"""So many characters behind the end of a JSON object are another answer."""
FOREIGN_TIMES = 4
"""Only a text with so many times more of another script is stopped: it may still come to its language."""
FOREIGN_WORDS = 160
SHOWN = 24

_THOUGHTS = re.compile(
    r"\s*(?:<\|?[/\w]*(?:think|thought|reason|reflect|channel|start|analysis|begin_of|message|plan|scratch)|\[THINK|\[THOUGHT"
    r"|◁|<seed:|(?-i:analysis[A-Z])|\*\*think|思考|Thinking)",
    re.IGNORECASE,
)
"""How thoughts begin that stand in the text itself: in another language, and no JSON."""


class JsonScan:
    """Follows the brackets of a JSON object as it grows."""

    _STRUCTURE = re.compile(r'["{}\[\]]')
    _STRING = re.compile(r'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)

    def __init__(self) -> None:
        self._open: list[str] = []
        self._begun = False
        self._in_string = False
        self._rest = ""
        """The end of what was seen, where it is the beginning of an escape."""
        self._outside = 0
        """Characters before the object, or behind it."""

    def problem(self, more: str) -> str | None:
        """What is wrong beyond repair with the text up to here, of which `more` is new."""
        text, self._rest = self._rest + more, ""
        place = 0
        while place < len(text):
            if self._in_string:
                place = self._behind_string(text, place)
                continue
            found = self._STRUCTURE.search(text, place)
            end = len(text) if found is None else found.start()
            if not self._open:
                self._outside += end - place
            if found is None:
                break
            place = found.end()
            if fault := self._structure(found[0]):
                return fault
        if not self._open and self._outside > (BEHIND_JSON if self._begun else BEFORE_JSON):
            return "the answer goes on behind its JSON object" if self._begun else "the answer is not JSON"
        return None

    def _structure(self, sign: str) -> str | None:
        if sign in "{[":
            if not self._open and sign == "[":
                return None  # [1] before the object is prose
            if not self._open:
                self._outside = 0
            self._begun = True
            self._open.append("}" if sign == "{" else "]")
        elif sign == '"':
            self._in_string = bool(self._open)
        elif self._open and self._open.pop() != sign:
            return f"not JSON: a '{sign}' closes what it did not open"
        return None

    def _behind_string(self, text: str, place: int) -> int:
        found = self._STRING.match(text, place)
        if found is None:
            backslashes = len(text) - len(text.rstrip("\\"))
            if backslashes % 2:
                self._rest = "\\"
            return len(text)
        self._in_string = False
        return found.end()


class AnswerWatch:
    """Looks at one answer, counts its tokens, and keeps the clock of its silence."""

    def __init__(
        self, *, max_tokens: int, is_json: bool, script: Script | None, stops: bool, began: Callable[[], None]
    ) -> None:
        """`stops`: whether a lost answer is stopped; `began` is called as the first piece comes."""
        self.pieces = 0
        """Pieces that were heard, each a token or a few."""
        self.thinks = False
        """Whether thoughts came in a field of their own."""
        self.problem: str | None = None
        self.reason = Finish.STOPPED
        self.first_at: float | None = None
        """When the first piece came."""
        self._stops = stops
        self._began = began
        self.asked_at = time.monotonic()
        self._max_tokens = max_tokens
        self._script = script
        self._json = JsonScan() if is_json else None
        self._fresh: list[str] = []
        self._unseen = 0
        self._text = ""
        self._thoughts = ""
        self._next_mark = FIRST_MARK
        self._next_sentences = SENTENCES_EVERY
        self._clock: asyncio.Timeout | None = None
        self._silence_s = 0.0
        self._deadline: float | None = None

    # --- what the reader calls ---------------------------------------------------------------------

    def heard(self, text: str) -> bool:
        """One more piece of the answer; True where it is lost."""
        self.pieces += 1
        if not self._stops:
            return False
        self._fresh.append(text)
        self._unseen += len(text)
        return self._unseen >= LOOK_EVERY and self._look()

    def thought(self, text: str) -> bool:
        """One more piece of the thoughts, which may only go round."""
        self.pieces += 1
        self.thinks = True
        if not self._stops:
            return False
        self._thoughts += text
        if len(self._thoughts) % LOOK_EVERY < len(text) and (unit := repeated_unit(self._thoughts)):
            self._lose(f"the thoughts repeat {_shown(unit)} without end", Finish.REPETITION)
        return self.problem is not None

    def alive(self) -> None:
        """The silence is over."""
        if self.first_at is None:
            self.first_at = time.monotonic()
            self._began()
        if self._clock is not None:
            self._put_off()

    @property
    def waited_s(self) -> float:
        """How long the answer has been waited for."""
        return time.monotonic() - self.asked_at

    # --- time ----------------------------------------------------------------------------------------

    def keep_time(self, clock: asyncio.Timeout, silence_s: float, deadline: float | None) -> None:
        """Put `clock` off whenever something is heard, by `silence_s`, never beyond `deadline`."""
        self._clock, self._silence_s, self._deadline = clock, silence_s, deadline
        self._put_off_at = 0.0

    def _put_off(self) -> None:
        assert self._clock is not None
        now = asyncio.get_running_loop().time()
        if now < self._put_off_at:
            return  # a clock that is set for each token costs as much as the token
        slack = self._silence_s / 20
        self._put_off_at = now + slack
        until = now + self._silence_s + slack
        if not self._clock.expired():
            self._clock.reschedule(until if self._deadline is None else min(until, self._deadline))

    # --- looks ---------------------------------------------------------------------------------------

    def _look(self) -> bool:
        more = "".join(self._fresh)
        self._fresh.clear()
        self._unseen = 0
        self._text += more
        text, size = self._text, len(self._text)
        if unit := repeated_unit(text):
            return self._lose(f"the answer repeats {_shown(unit)} without end", Finish.REPETITION)
        if size >= self._next_sentences:
            self._next_sentences = size + SENTENCES_EVERY
            if sentence := repeated_sentence(text):
                return self._lose(f"the answer says {_shown(sentence)} over and over", Finish.REPETITION)
        thinks = _THOUGHTS.match(text) is not None
        if self._json is not None and not thinks and (problem := self._json.problem(more)):
            return self._lose(problem)
        if size >= self._next_mark:
            self._next_mark = size + size // 2
            return self._look_at_all(text, thinks=thinks)
        return False

    def _look_at_all(self, text: str, *, thinks: bool) -> bool:
        if at_least(text) > self._max_tokens:
            return self._lose("the server does not hold to the limit of tokens", Finish.LENGTH)
        if self._script is not None and not thinks and (problem := lost_to_script(text, self._script)):
            return self._lose(problem)
        return False

    def _lose(self, problem: str, reason: Finish = Finish.STOPPED) -> bool:
        self.problem, self.reason = problem, reason
        return True


def lost_to_script(text: str, script: Script) -> str | None:
    """Why a text will not come to the script any more that was asked for."""
    problem = script_problem(text, script)
    if problem is None:
        return None
    wanted, foreign = map(int, re.findall(r"\d+", problem)[:2])  # as `script_problem` says them
    return problem if foreign >= FOREIGN_WORDS and foreign > FOREIGN_TIMES * wanted else None


def _shown(unit: str) -> str:
    words = " ".join(unit.split()) or repr(unit[:SHOWN])
    return f"'{words[:SHOWN]}…'" if len(words) > SHOWN else f"'{words}'"
