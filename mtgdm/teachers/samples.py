"""Several answers a prompt: the best one is kept, the others stay in a file for preference training.

Each prompt goes through the request loop several times, every time with a seed of its own. Its best answer is
settled once all have come; a run that is killed before asks for all of them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtgdm.errors import SettingError
from mtgdm.estimates import Expected
from mtgdm.rows import Row, encode
from mtgdm.teachers.judgement import facts_json

if TYPE_CHECKING:
    from types import TracebackType
    from typing import BinaryIO, Self

    from pydantic import BaseModel

    from mtgdm.domain import Message
    from mtgdm.teachers.judgement import Judge
    from mtgdm.teachers.loop import Outcome
    from mtgdm.teachers.seam import Backend, Completion, Options, TeacherSettings

SEEDS_APART = 1000
"""Between the seeds of two samples: a retry takes the next seed, which must not be that of another sample."""


@dataclass(frozen=True)
class Sample(Row):
    """A prompt that is asked for one of its answers."""

    number: int = 0


def samples_path(out: Path) -> Path:
    """Where the answers lie that were not chosen: beside `teacher.jsonl` in `teacher.samples.jsonl`."""
    return out.with_name(f"{out.stem}.samples{out.suffix}")


def each_sampled(rows: Iterator[Row], count: int) -> Iterator[Row]:
    """Every row so many times, one after the other: a server with a prefix cache reads the prompt once."""
    for row in rows:
        for number in range(count):
            yield Sample(row.id, row.messages, row.meta, row.path, row.line, row.rest, number)


def sampling(teacher: type[Backend], settings: TeacherSettings, count: int) -> type[Backend]:
    """The backend that gives each sample its own seed; SettingError where all answers would be the same."""
    if settings.backend == "offline" or settings.temperature == 0:
        why = "a template has one answer" if settings.backend == "offline" else "temperature 0 has one answer"
        raise SettingError(f"samples is {count}, but {why} to each prompt", hint="--samples 1")

    class Sampling(teacher):  # type: ignore[misc, valid-type]
        async def answer(
            self, messages: Sequence[Message], contract: type[BaseModel] | None, options: Options
        ) -> Completion:
            row = options.row
            if isinstance(row, Sample):
                # A backend may ask itself again: then the seed is the sample's already.
                plain = Row(row.id, row.messages, row.meta, row.path, row.line, row.rest)
                options = replace(options, seed=options.seed + SEEDS_APART * row.number, row=plain)
            completion: Completion = await super().answer(messages, contract, options)
            return completion

    Sampling.__name__, Sampling.__qualname__ = teacher.__name__, teacher.__qualname__
    Sampling.__doc__ = teacher.__doc__
    return Sampling


class Samples:
    """The answers to each prompt while they come; a context manager over the file of those not chosen."""

    def __init__(self, count: int, out: Path, judge: Judge, *, overwrite: bool = False) -> None:
        self._count = count
        self._path = samples_path(out)
        self._judge = judge
        self._overwrite = overwrite
        self._waiting: dict[str, list[Outcome]] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def settled(self, outcome: Outcome) -> Outcome | None:
        """The best outcome of a prompt once its last one has come; the others are written."""
        if self._overwrite:
            self._overwrite = False
            self._path.unlink(missing_ok=True)
        if self._count == 1:
            return outcome
        together = self._waiting.setdefault(outcome.row.id, [])
        together.append(outcome)
        if len(together) < self._count:
            return None
        del self._waiting[outcome.row.id]
        best, *others = sorted(together, key=_rank)
        for other in others:
            if other.text:
                self._write(other)
        return best

    def _write(self, outcome: Outcome) -> None:
        if self._file is None:
            self._file = self._path.open("ab", buffering=0)
        row, completion = outcome.row, outcome.completion
        sample = {
            "reason": outcome.reason,
            "facts": facts_json(outcome.facts),
            "finish_reason": completion.finish_reason if completion else None,
            "output_tokens": completion.output_tokens if completion else None,
            "repaired": outcome.repaired,
        }
        messages = [*row.prompt, {"role": "assistant", "content": self._judge.kept_text(row, outcome.text)}]
        self._file.write(encode({"id": row.id, "messages": messages, "meta": {**row.meta, "sample": sample}}))


def _rank(outcome: Outcome) -> tuple[bool, int, float, bool, int]:
    """The least is the best: kept, few claims without support, many facts told, without a repair turn."""
    facts = outcome.facts
    recall = facts.recall if facts is not None else None
    number = outcome.row.number if isinstance(outcome.row, Sample) else 0
    unsupported = len(facts.unsupported) if facts is not None else 0
    return outcome.reason is not None, unsupported, -(recall or 0.0), outcome.repaired, number


def times(estimate: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What a run has to do where every prompt is asked so many times."""
    found = dict(estimate)
    if count == 1 or not found:
        return found
    for name in ("prompt_tokens_at_most", "output_tokens_at_most", "output_tokens", "hours"):
        value = found.get(name)
        if isinstance(value, Expected):
            found[name] = value.times(count)
        elif isinstance(value, int | float):
            found[name] = value * count
    return {**found, "samples_a_prompt": count}
