"""What asking the teacher will take: from rows that are answered already, or from a few asked for it now."""

from __future__ import annotations

import math
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtgdm.errors import BadRow
from mtgdm.estimates import Expected
from mtgdm.plugins import named
from mtgdm.rows import parse_object, read_lines, row_id
from mtgdm.teachers.endpoints import backends
from mtgdm.teachers.forecast import Answer, hours, lengths, output_tokens, tokens_per_s
from mtgdm.teachers.ledger import Prompts, count_lines, rejected_path
from mtgdm.teachers.seam import GROUP
from mtgdm.teachers.tokens import context_size, prompt_at_most

if TYPE_CHECKING:
    from mtgdm.row_ids import IdSet, Mask
    from mtgdm.rows import Row
    from mtgdm.stage import Context
    from mtgdm.teachers.judgement import Judge
    from mtgdm.teachers.loop import Outcome
    from mtgdm.teachers.seam import Backend, TeacherSettings

UNTYPED = "untyped"
LOOKED_AT = 2000
"""So many finished rows, spread over the file, say what the others are like."""
SMALLEST_PROBE = 8
LONGEST_PROBE_S = 240.0
"""So long a probe waits for answers; what is written by then tells how fast, if not how long."""
ALL_AT_ONCE = "these were asked all at once, perhaps while the model was being loaded"
SHARED = 0.25
"""How a server speeds up as n of C rows are left: (C / n) ** SHARED. With 2 C rows asked of simulated servers, 4 and 16
at once, the hours were 0.87 to 1.09 times the true ones where rows go side by side, in batches, or one after the other,
and 0.80 to 0.87 times where all share one power; the range held these in 85 of 100 probes or more."""


@dataclass(frozen=True, eq=False)
class Work:
    """What is still to be asked."""

    prompts: Prompts
    waiting: Mask
    """Which of the prompts, in their order."""
    types: Mapping[str, array[int]]
    """By prompt type, which of those that wait."""
    prompt_tokens: int
    """Of their prompts, at most."""

    @property
    def to_ask(self) -> int:
        """How many rows wait."""
        return sum(map(len, self.types.values()))

    @classmethod
    def found(
        cls, path: Path, out: Path, *, limit: int = 0, overwrite: bool = False, retry_rejected: bool = False
    ) -> Work:
        """The prompts of a file, without those that an output (and its rejected rows) answers."""
        prompts = Prompts.scan(path, limit, prompt_at_most)
        done = prompts.among(_ids([] if overwrite else [out]))
        if not overwrite and not retry_rejected:
            done |= prompts.among(_ids([rejected_path(out)]))
        types: dict[str, array[int]] = {}
        tokens = 0
        for number, row in enumerate(prompts.rows(~done)):
            types.setdefault(row.type or UNTYPED, array("I")).append(number)
            tokens += prompt_at_most(row.prompt)
        return cls(prompts, ~done, types, tokens)

    def spread(self, count: int) -> Iterator[Row]:
        """So many of the rows that wait: of every type as many, evenly over the file, in its order."""
        shares = dict.fromkeys(self.types, 0)
        while sum(shares.values()) < min(count, self.to_ask):
            for kind, rows in self.types.items():
                if shares[kind] < len(rows) and sum(shares.values()) < count:
                    shares[kind] += 1
        waiting = self.waiting.nonzero()[0]
        chosen = self.waiting & False
        for kind, rows in self.types.items():
            for number in range(shares[kind]):
                chosen[waiting[rows[(2 * number + 1) * len(rows) // (2 * shares[kind])]]] = True
        return self.prompts.rows(chosen)


def estimated(work: Work, settings: TeacherSettings, out: Path) -> dict[str, Any]:
    """What a run has to do, as far as can be known without asking: from the finished rows, where there are any."""
    answers = _finished(out, settings) if work.to_ask else []
    found = _expected(work, settings, answers)
    found["rests_on"] = f"{len(answers):,} finished rows" if answers else None
    if work.to_ask and not answers:
        enough = _enough(settings)
        found["hint"] = f"`mtgdm plan --probe {enough}` asks {enough} rows, and tells tokens and hours of all"
    return found


def probed(
    work: Work, settings: TeacherSettings, judge: Judge, count: int, context: Context
) -> dict[str, Any]:
    """What a run has to do, from `count` rows asked as it would ask them; their answers are thrown away.

    They are asked at the real concurrency, so that what batching gains and queueing costs is in their
    seconds, as their retries and corrections are. The first ones, one for each place, tell how long answers
    are but not how fast: they found the server idle. At the end it empties, see `_held`.

    Raises Unavailable where the teacher cannot be asked.
    """
    places = _places(work, settings)
    probe = _ask(work, settings, judge, min(count, work.to_ask), context)
    asked = probe.asked
    answers = [
        Answer(one.outcome.row.type or UNTYPED, _tokens(one.outcome), held_s, at_start=number < places)
        for number, (one, held_s) in enumerate(zip(asked, _held(asked, places), strict=True))
        if one.outcome.completion is not None
    ]
    took_s = max((one.ended for one in asked), default=0.0) - min((one.began for one in asked), default=0.0)
    found = _expected(work, settings, answers, took_s)
    some = "1 row, whose answer was" if len(asked) == 1 else f"{len(asked):,} rows, whose answers were"
    found["rests_on"] = f"a probe of {some} thrown away" if answers else None
    reasons = Counter(re.sub(r"\d+", "…", one.outcome.reason) for one in asked if one.outcome.reason)
    speed = tokens_per_s(answers, places) or probe.tokens_per_s
    found["probe"] = {
        "asked": len(asked) + probe.unfinished,
        "would_be_kept": len(asked) - reasons.total(),
        "output_tokens_per_s": speed and round(speed, 1),
        "answers_at_once": probe.answers_at_once,
    }
    if probe.unfinished:
        found["probe"]["unfinished"] = probe.unfinished
        context.terminal.warn(
            f"{probe.unfinished:,} of {len(asked) + probe.unfinished:,} answers were not whole after "
            f"{LONGEST_PROBE_S:g} s, with {probe.tokens:,} tokens written: the probe goes without them"
        )
    if reasons:
        found["rejected"] = ", ".join(f"{times:,} × {reason}" for reason, times in reasons.most_common(3))
    if answers and len(asked) < min(_enough(settings), work.to_ask):
        few = (
            f"{places} rows are in flight at once"
            if any(not one.at_start for one in answers)
            else ALL_AT_ONCE
        )
        found["hint"] = f"{few}: `--probe {_enough(settings)}` says more"
    return found


def _expected(
    work: Work, settings: TeacherSettings, answers: Sequence[Answer], took_s: float = 0.0
) -> dict[str, Any]:
    waiting = {kind: len(rows) for kind, rows in work.types.items()}
    tokens = output_tokens(waiting, answers)
    duration = hours(waiting, answers, _places(work, settings), took_s)
    by_type: dict[str, dict[str, Any]] = {}
    for kind, count in waiting.items() if tokens else ():
        one = lengths(kind, answers)
        by_type[kind] = {"to_ask": count, "output_tokens": one and one.rounded()}
    return {
        "rows": work.prompts.asked,
        "to_ask": work.to_ask,
        "prompt_tokens_at_most": work.prompt_tokens,
        "output_tokens_at_most": work.to_ask * settings.max_tokens,
        "output_tokens": tokens and tokens.rounded(),
        "hours": duration and duration.rounded(4),
        "by_type": by_type,
    }


# --- asking a few --------------------------------------------------------------------------------


@dataclass
class _Asked:
    """One row of the probe, from the moment it took its place in flight."""

    began: float
    ended: float
    outcome: Outcome


@dataclass(frozen=True)
class _Probe:
    """What a few rows told."""

    asked: list[_Asked]
    """Those that were answered, in the order in which they took their places."""
    unfinished: int
    """Rows whose answers were not whole when time was up."""
    tokens: int
    """Tokens that were written in all."""
    tokens_per_s: float | None
    answers_at_once: int | None
    """How many answers the server writes at once, where these are fewer than it is asked for."""


def _ask(work: Work, settings: TeacherSettings, judge: Judge, count: int, context: Context) -> _Probe:
    """Ask so many rows through the real loop and write nothing."""
    import asyncio

    from mtgdm.teachers.loop import Loop

    if not settings.num_ctx:
        sized = context_size(work.prompts.longest_tokens, settings.max_tokens)
        settings = settings.model_copy(update={"num_ctx": sized})
    teacher: type[Backend] = named(GROUP, settings.backend, "teacher backend")
    began: dict[str, float] = {}
    asked: dict[str, _Asked] = {}

    def rows() -> Iterator[Row]:
        for row in work.spread(count):
            began[row.id] = time.monotonic()
            yield row

    started = time.monotonic()
    with context.terminal.progress(f"{context.stage} probe", count, "rows") as bar:

        def record(outcome: Outcome) -> None:
            identity = outcome.row.id
            asked[identity] = _Asked(began[identity], time.monotonic(), outcome)
            kept = sum(one.outcome.reason is None for one in asked.values())
            bar.advance()
            bar.note(f"{kept:,} would be kept")

        loop = Loop(
            backends(teacher, settings, context.domain),
            settings,
            judge,
            warn=context.terminal.warn,
        )
        bar.live = loop.notes
        tokens = 0

        async def run() -> None:
            nonlocal tokens
            try:
                async with asyncio.timeout(LONGEST_PROBE_S):
                    await loop.run(rows(), record)
            except TimeoutError:
                pass
            finally:
                tokens = loop.tokens

        asyncio.run(run())
    return _Probe(
        [asked[identity] for identity in began if identity in asked],
        len(began) - len(asked),
        tokens,
        tokens / (time.monotonic() - started) if tokens else None,
        loop.answers_at_once,
    )


def _held(asked: Sequence[_Asked], places: int) -> list[Expected]:
    """How long each row would have held its place had the others stayed taken, in seconds.

    When no row is left to ask the server empties, and the last rows are answered faster than in a run: not
    faster at all where each is answered for itself, `places` / n times where all share one power and n are
    left. The range is between these.
    """
    moments = sorted({moment for one in asked for moment in (one.began, one.ended)})
    left = [sum(one.began <= moment < one.ended for one in asked) for moment in moments]

    def seconds(one: _Asked, shared: float) -> float:
        return sum(
            (after - before) * math.pow(max(1.0, places / max(1, count)), shared)
            for (before, after), count in zip(pairwise(moments), left, strict=False)
            if one.began <= before < one.ended
        )

    return [Expected(seconds(one, SHARED), seconds(one, 0.0), seconds(one, 1.0)) for one in asked]


def _tokens(outcome: Outcome) -> int | None:
    """Tokens of a row's answers, the first taken to be as long as its correction."""
    completion = outcome.completion
    if completion is None or completion.output_tokens is None:
        return None
    return completion.output_tokens * (2 if outcome.repaired or outcome.reason is not None else 1)


def _places(work: Work, settings: TeacherSettings) -> int:
    """How many rows can be in flight at once."""
    return max(1, min(settings.concurrency, work.to_ask))


def _enough(settings: TeacherSettings) -> int:
    """As many rows as tell: one for each place, and as many that find the places taken."""
    return max(SMALLEST_PROBE, 2 * settings.concurrency)


# --- rows that are there -------------------------------------------------------------------------


def _ids(paths: Iterable[Path]) -> IdSet:
    """The ids of the rows in these files; a line that a kill left torn is none."""
    from mtgdm.row_ids import IdSet, read_blocks

    keys = bytearray()
    for path in paths:
        if not path.is_file():
            continue
        with path.open("rb") as file:
            for block in read_blocks(file):
                keys += block.ids[block.ours].tobytes()
                for place in (~block.ours).nonzero()[0].tolist():
                    with suppress(BadRow, KeyError, TypeError):
                        row = parse_object(path, *block.line(place))
                        keys += bytes.fromhex(row_id(row["messages"]))
    return IdSet(keys)


def _finished(out: Path, settings: TeacherSettings) -> list[Answer]:
    """What this teacher's answers in an output took, LOOKED_AT of them at most, spread over the file."""
    lines = count_lines(out)
    if not lines:
        return []
    answers: list[Answer] = []
    for number, line in read_lines(out, range(1, lines + 1, -(-lines // LOOKED_AT))):
        with suppress(BadRow, KeyError, TypeError):
            meta = parse_object(out, number, line)["meta"]
            teacher = meta["teacher"]
            if teacher["backend"] != settings.backend or settings.model not in (None, teacher["model"]):
                continue
            turns = 2 if teacher.get("repaired") else 1
            seconds, tokens = turns * float(teacher["seconds"]), teacher["output_tokens"]
            if seconds:
                tokens = None if tokens is None else turns * tokens
                kind = meta.get("type") or UNTYPED
                answers.append(Answer(kind, tokens, Expected(seconds, seconds, seconds)))
    return answers
