"""What a teacher run left: kept and rejected rows in figures, read as a stream that holds no text."""

from __future__ import annotations

import heapq
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgdm.domain import Domain
from mtgdm.errors import BadRow, UserError
from mtgdm.reports.training_run import number
from mtgdm.rows import parse_object, read_lines
from mtgdm.teachers.judgement import Judge, facts_json

UNTYPED = "untyped"
WORST = 10
"""So many kept rows with unsupported claims are named."""
EXAMPLES = 12
"""So many reasons of rejection have a row to show, and the text that was not kept."""
MOST_REASONS = 1000
"""Reasons that differ in more than figures are counted one by one up to here; the rest is `other reasons`."""
EXAMPLE_CHARACTERS = 1200

_VARYING = re.compile(r"'[^']*'|\d+(?:\.\d+)*%?")
"""What differs from row to row in reasons that are the same: figures, and words that are quoted."""
_PLACE = re.compile(r"\.\d+(?=[.:])")
"""Which item of a list it was: `steps.3.lat`."""
_NAMED = re.compile(r"(?<=; missing: ).*|(?<=, more than …: ).*")
"""The facts that a reason names; see `Judge.fact_problem`."""


@dataclass
class TypeFigures:
    """The rows of one prompt type; one value a kept row where it is known, so that quantiles are exact."""

    kept: int = 0
    rejected: int = 0
    repaired: int = 0
    characters: array[int] = field(default_factory=lambda: array("I"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("I"))
    output_tokens: array[int] = field(default_factory=lambda: array("I"))
    recall: array[float] = field(default_factory=lambda: array("f"))
    unsupported: array[int] = field(default_factory=lambda: array("I"))
    """Claims without support of each row that has a record."""


@dataclass(frozen=True, order=True)
class Claims:
    """A kept row with claims that its record does not support."""

    count: int
    id: str
    spot: str
    type: str
    claims: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A row that was rejected for a reason."""

    id: str
    spot: str
    type: str
    reason: str
    text: str


@dataclass
class TeacherRun:
    """All rows of a run."""

    path: Path
    types: dict[str, TypeFigures] = field(default_factory=dict)
    splits: Counter[str] = field(default_factory=Counter)
    models: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Kept rows by backend and model."""
    fingerprints: set[str] = field(default_factory=set)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Rejected rows by type and reason, figures and quoted words left out of the reasons."""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, Example] = field(default_factory=dict)
    worst: list[Claims] = field(default_factory=list)
    seconds: float = 0.0
    """Time in which the teacher answered the kept rows, added up over all in flight."""
    attempts: int = 0
    with_tokens: int = 0
    """Kept rows whose tokens are known."""
    notes: list[str] = field(default_factory=list)

    @property
    def kept(self) -> int:
        """Kept rows."""
        return sum(figures.kept for figures in self.types.values())

    @property
    def rejected(self) -> int:
        """Rejected rows."""
        return sum(figures.rejected for figures in self.types.values())

    @property
    def all_reasons(self) -> Counter[str]:
        """Rejected rows by reason, whatever their type."""
        found: Counter[str] = Counter()
        for (_, reason), count in self.reasons.items():
            found[reason] += count
        return found


def read_teacher_run(kept: Path, rejected: Path, domain: Domain) -> TeacherRun:
    """Read both files, each where it is there; facts that a row does not carry are checked against its record.

    Raises UserError where neither holds a row, BadRow at a line that is no row; a last line that is torn is
    noted.
    """
    run = TeacherRun(kept)
    judge = Judge(domain)
    for row in _rows(kept, run):
        _take_kept(run, row, judge)
    for row in _rows(rejected, run):
        _take_rejected(run, row)
    run.worst.sort(key=lambda one: (-one.count, one.id))
    if not run.types:
        raise UserError("there is no teacher row here", where=kept, hint="run `mtgdm teacher` first")
    return run


def _rows(path: Path, run: TeacherRun) -> Iterator[dict[str, Any]]:
    """The rows of a file, one at a time."""
    torn: BadRow | None = None
    for line_number, line in read_lines(path) if path.is_file() else ():
        if torn is not None:
            raise torn
        try:
            row = parse_object(path, line_number, line)
        except BadRow as error:
            torn = error
            continue
        messages = row.get("messages")
        if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
            raise BadRow(path, line_number, "`messages` is missing or no list of messages")
        yield row
    if torn is not None:
        run.notes.append(f"the last line of {path.name} is torn and was left out ({torn})")


def _take_kept(run: TeacherRun, row: Mapping[str, Any], judge: Judge) -> None:
    meta = _object(row.get("meta"))
    teacher = _object(meta.get("teacher"))
    kind = _type(meta)
    figures = run.types.setdefault(kind, TypeFigures())
    figures.kept += 1
    answer = str(row["messages"][-1].get("content") or "") if row["messages"] else ""
    figures.characters.append(len(answer))
    run.splits[str(meta.get("split") or "none named")] += 1
    if teacher:
        run.models[str(teacher.get("backend")), str(teacher.get("model") or "")] += 1
        run.fingerprints.add(str(teacher.get("fingerprint")))
        run.attempts += int(_count(teacher.get("attempts")))
        run.seconds += _count(teacher.get("seconds"))
        figures.repaired += teacher.get("repaired") is True
        _take_tokens(run, figures, teacher)
    facts = teacher.get("facts")
    if not isinstance(facts, dict):
        facts = facts_json(judge.facts(meta, _text(meta.get("type")) or None, answer))
    if isinstance(meta.get("record"), dict):
        _take_facts(run, figures, row, meta, facts)


def _take_tokens(run: TeacherRun, figures: TypeFigures, teacher: Mapping[str, Any]) -> None:
    prompt, output = _count(teacher.get("prompt_tokens")), _count(teacher.get("output_tokens"))
    if output:
        run.with_tokens += 1
        figures.prompt_tokens.append(int(prompt))
        figures.output_tokens.append(int(output))


def _take_facts(
    run: TeacherRun,
    figures: TypeFigures,
    row: Mapping[str, Any],
    meta: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    recall, unsupported = number(facts.get("recall")), facts.get("unsupported")
    if 0 <= recall <= 1:
        figures.recall.append(recall)
    claims = [str(claim) for claim in unsupported] if isinstance(unsupported, list) else []
    figures.unsupported.append(len(claims))
    if not claims or (len(run.worst) == WORST and len(claims) <= run.worst[0].count):
        return
    found = Claims(
        len(claims), str(row.get("id") or ""), _text(meta.get("spot")), _type(meta), tuple(claims[:WORST])
    )
    (heapq.heappush if len(run.worst) < WORST else heapq.heappushpop)(run.worst, found)


def _take_rejected(run: TeacherRun, row: Mapping[str, Any]) -> None:
    meta, rejected = _object(row.get("meta")), _object(row.get("rejected"))
    kind = _type(meta)
    run.types.setdefault(kind, TypeFigures()).rejected += 1
    run.fingerprints.add(str(rejected.get("fingerprint")))
    if (finish := rejected.get("finish_reason")) is not None:
        run.finish_reasons[str(finish)] += 1
    full = _text(rejected.get("reason")) or "no reason given"
    reason = kind_of_reason(full)
    if (kind, reason) not in run.reasons and len(run.reasons) >= MOST_REASONS:
        reason = "other reasons"
    run.reasons[kind, reason] += 1
    if reason not in run.examples and len(run.examples) < EXAMPLES:
        text = _text(rejected.get("text"))
        cut = "…" if len(text) > EXAMPLE_CHARACTERS else ""
        shown = text[:EXAMPLE_CHARACTERS] + cut
        run.examples[reason] = Example(str(row.get("id") or ""), _text(meta.get("spot")), kind, full, shown)


def kind_of_reason(reason: str) -> str:
    """A reason without what differs from row to row, so that like counts with like."""
    return _NAMED.sub("…", _VARYING.sub("…", _PLACE.sub("[]", reason)))


def _type(meta: Mapping[str, Any]) -> str:
    return _text(meta.get("type")) or UNTYPED


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> float:
    """A number that is not negative; 0 where there is none."""
    found = number(value)
    return found if 0 <= found < 2**32 else 0.0
