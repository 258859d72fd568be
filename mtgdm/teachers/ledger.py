"""What a teacher run has on disk: kept rows, rejected rows, and rows of prompts that are gone.

While a run goes on both files are journals: rows are appended as answers come, and a kill loses none that
is written. `settle` makes them what the next stage reads: in prompt order, each row with the `meta` its
prompt has now (a new split must not leave old splits in the answers), nothing in it that has no prompt.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mtgdm import manifest
from mtgdm.errors import BadRow, UserError
from mtgdm.rows import Journal, Row, encode, manifest_path, put_in_order, read_blocks, read_rows, replace
from mtgdm.teachers.judgement import facts_json

if TYPE_CHECKING:
    from mtgdm.row_ids import IdList, IdSet, Mask
    from mtgdm.teachers.judgement import Judge

LONGEST_PROMPT = "longest_prompt_tokens"
"""The count in the manifest of a prompts file that says how long its longest prompt is."""

_UINT32 = "I"
_FINGERPRINT = b'"teacher": {"fingerprint": "'
"""How `meta.teacher` begins in our rows. Quotes inside a text are escaped, so this is never part of one."""


@dataclass(frozen=True, eq=False)
class Prompts:
    """A file of prompts, read through once: the ids in their order, and what was found on the way."""

    path: Path
    ids: IdList
    """The id of each prompt; of duplicates the first counts."""
    lines: array[int]
    """The number of the line each stands on."""
    asked: int
    """How many of them this run is about: all, or the first `--limit`."""
    duplicates: int
    longest_tokens: int

    def among(self, ids: IdSet) -> Mask:
        """Which of the prompts this run is about are in a set."""
        return self.ids.among(ids)[: self.asked]

    def rows(self, wanted: Mask) -> Iterator[Row]:
        """The wanted ones of the prompts, in their order; the others are not parsed."""
        rows = read_rows(self.path, answered=False, numbers=compress(self.lines, wanted))
        for row, identity in zip(rows, compress(self.ids, wanted), strict=False):
            if row.id != identity:
                raise row.bad("the prompts changed while they were asked", hint="start again")
            yield row

    @classmethod
    def scan(cls, path: Path, limit: int, tokens: Callable[[list[dict[str, str]]], int]) -> Prompts:
        """Read every prompt before the first is asked: a bad line is found now, not after a day.

        A file that is as `mtgdm prompts` left it holds no bad line, so its ids are taken as they stand.
        """
        from mtgdm.row_ids import IdList, as_ids

        keys, lines = bytearray(), array(_UINT32)
        longest = _longest_noted(path)
        if longest is not None:
            for block in read_blocks(path):
                keys += block.ids.tobytes()
                lines.frombytes(block.numbers.astype(_UINT32).tobytes())
        else:
            longest = 0
            for row in read_rows(path, answered=False):
                keys += bytes.fromhex(row.id)
                lines.append(row.line)
                longest = max(longest, tokens(row.prompt))
        if not lines:
            raise UserError(
                "there is no prompt in this file", where=path, hint="make them with `mtgdm prompts`"
            )
        ids = IdList(as_ids(keys))
        again = ids.repeated()
        if again.any():
            ids, lines = IdList(ids.ids[~again]), array(_UINT32, compress(lines, ~again))
        if limit:
            first = read_rows(path, answered=False, numbers=lines[:limit])
            longest = max(tokens(row.prompt) for row in first)
        return cls(path, ids, lines, min(limit or len(ids), len(ids)), int(again.sum()), longest)


@dataclass
class FactSums:
    """What the answers of one type say of their records, added up."""

    rows: int = 0
    recalls: int = 0
    recall_sum: float = 0.0
    unsupported: int = 0

    def add(self, facts: Mapping[str, Any]) -> None:
        """Count one answer's `meta.teacher.facts`."""
        self.rows += 1
        recall = facts.get("recall")
        if isinstance(recall, int | float):
            self.recalls += 1
            self.recall_sum += recall
        self.unsupported += len(facts.get("unsupported") or ())

    @property
    def recall(self) -> float | None:
        """Mean share of the record's facts that an answer states."""
        return self.recall_sum / self.recalls if self.recalls else None


@dataclass
class Settled:
    """What `settle` found and did."""

    facts: dict[str, FactSums] = field(default_factory=dict)
    """What the kept answers say of their records, by prompt type."""
    moved: int = 0
    """Kept rows whose prompt is gone, now in the stale file."""
    dropped: int = 0
    """Rejected rows whose prompt is gone."""
    put_aside: int = 0
    """Rows kept under other thresholds, now in the rejected file."""
    refreshed: int = 0
    """Kept rows whose prompt has another `meta` now."""
    compacted: int = 0
    """Kept rows whose JSON was written in another form."""


class Ledger:
    """The two journals of a run; each is made with its first row: a run that fails at once leaves none."""

    def __init__(self, out: Path, fingerprint: str, *, overwrite: bool = False) -> None:
        from mtgdm.row_ids import IdSet

        self.out = out
        self.rejected = rejected_path(out)
        self.stale = out.with_name(f"{out.stem}.stale{out.suffix}")
        self._fingerprint = fingerprint
        self._overwrite = overwrite
        self._open = ExitStack()
        self._kept: Journal | None = None
        self._lost: Journal | None = None
        self._facts: dict[str, FactSums] = {}
        """What the rows of this run say of their records."""
        self._resumed = False
        self._all_compact = False
        """Whether every row of earlier runs is known to be in the compact form."""
        self.kept_ids: IdSet = IdSet()
        self.rejected_ids: IdSet = IdSet()
        """Rejected under this fingerprint: rows another teacher failed on are asked again."""

    def __enter__(self) -> Self:
        if self._overwrite:
            return self
        try:
            if self.out.exists():
                self._all_compact = _noted_compact(self.out)
                ours = _FINGERPRINT + self._fingerprint.encode() + b'"'
                self._kept = self._open.enter_context(Journal(self.out, inspect=self._compare, known=ours))
                self.kept_ids = self._kept.ids
                self._resumed = bool(self.kept_ids)
            if self.rejected.exists():
                self._lost = self._open.enter_context(Journal(self.rejected, inspect=self._remember))
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    # --- while answers come ----------------------------------------------------------------------

    def keep(self, row: dict[str, Any]) -> None:
        """Write a row with its answer."""
        self._begin()
        if self._kept is None:
            self._kept = self._open.enter_context(Journal(self.out))
            self.kept_ids = self._kept.ids
        self._append(self._kept, row)
        if facts := _facts(row["meta"]):
            kind = row["meta"].get("type")
            self._facts.setdefault(kind if isinstance(kind, str) else "", FactSums()).add(facts)

    def reject(self, row: dict[str, Any]) -> None:
        """Put a row aside with the reason."""
        self._begin()
        if self._lost is None:
            self._lost = self._open.enter_context(Journal(self.rejected))
        self._append(self._lost, row)
        self.rejected_ids.add(row["id"])

    def _begin(self) -> None:
        """Start anew, once there is something to put in the place of what is there."""
        if not self._overwrite:
            return
        self._overwrite = False
        # The kept file goes last: a kill before that leaves it whole, to be overwritten again.
        for path in (self.rejected, self.out):
            manifest_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    @staticmethod
    def _append(journal: Journal, row: dict[str, Any]) -> None:
        try:
            journal.append(row)
        except OSError as error:
            raise UserError(
                f"the row cannot be written: {error.strerror or error}",
                where=journal.path,
                hint="make room and start again: what is finished is kept",
            ) from error

    # --- what earlier runs left ------------------------------------------------------------------

    def _compare(self, number: int, line: bytes) -> None:
        found = _fingerprint(line)
        if found is not None and found != self._fingerprint:
            raise UserError(
                "the answers in this file come from another teacher or other sampling settings",
                where=f"{self.out}:{number}",
                hint="write elsewhere with --out FILE, or start anew with --overwrite",
            )

    def _remember(self, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadRow(
                self.rejected, number, "not JSON", hint="delete the line: its row is asked again"
            ) from error
        rejected = row.get("rejected")
        if isinstance(rejected, dict) and rejected.get("fingerprint") == self._fingerprint:
            self.rejected_ids.add(row["id"])

    def verify(self, prompts: Prompts) -> None:
        """Read the whole output and compare it with the prompts; BadRow at the first row that does not fit.

        Rows are matched by their messages, as their ids are: a row whose own id is another was changed.
        """
        lines = array(_UINT32, bytes(4 * len(prompts.ids)))
        hint = "start anew with --overwrite, or write elsewhere with --out FILE"
        for row in read_rows(self.out, answered=True):
            if not (row.answer or "").strip():
                raise row.bad("the answer is empty", hint="delete the line: its row is asked again")
            if row.rest.get("given_id") in prompts.ids:
                raise row.bad("the messages are not those of its prompt", hint=hint)
            place = prompts.ids.place(row.id)
            if place is None:
                raise row.bad(f"this row answers no prompt of {prompts.path}", hint=hint)
            if lines[place]:
                raise row.bad(f"this prompt is already answered in line {lines[place]}", hint=hint)
            lines[place] = row.line

    # --- at the end ------------------------------------------------------------------------------

    def settle(self, prompts: Prompts, judge: Judge) -> Settled:
        """Bring both files into prompt order and up to the prompts as they are; what is so is not touched.

        Answers kept under other thresholds are held to those of `judge`.
        """
        self._open.close()
        done = Settled()
        if self.out.exists():
            put_in_order(self.out, prompts.ids)
            if not self._resumed:  # nothing but what this run wrote, from the prompts as they are
                done.facts = self._facts
            elif self._survey(prompts, judge, done):
                self._rewrite(prompts, judge)
        if self.rejected.exists():
            self._tidy_rejected(prompts, done)
        return done

    def _survey(self, prompts: Prompts, judge: Judge, done: Settled) -> bool:
        """Count what has no prompt or another meta, and gather the facts; says whether to rewrite."""
        for row, prompt in self._beside(prompts):
            if prompt is None:
                done.moved += 1
                continue
            if not _same_meta(row, prompt):
                done.refreshed += 1
            done.compacted += self._kept_text(row, judge) != row.answer
            facts = _facts(row.meta)
            if not judge.keeps(facts):
                done.put_aside += 1
            elif facts:
                done.facts.setdefault(row.type or "", FactSums()).add(facts)
        return bool(done.moved or done.refreshed or done.put_aside or done.compacted)

    def _kept_text(self, row: Row, judge: Judge) -> str:
        """The answer of an earlier run in the form of this one: its form is no reason to ask again."""
        answer = row.answer or ""
        return answer if self._all_compact else judge.kept_text(row, answer)

    def _rewrite(self, prompts: Prompts, judge: Judge) -> None:
        from mtgdm.row_ids import IdSet

        kept = IdSet()
        with replace(self.out) as file, Journal(self.stale) as stale, Journal(self.rejected) as rejected:
            for row, prompt in self._beside(prompts):
                if prompt is None:
                    if row.id not in stale.ids:
                        stale.append(_as_json(row, row.meta))
                    continue
                meta = row.meta
                problem = None
                if not (_same_meta(row, prompt) and judge.keeps(_facts(meta))):
                    checked = judge.facts(prompt.meta, row.type, row.answer or "")
                    problem = judge.fact_problem(checked)
                    meta = _without_teacher(prompt.meta)
                    if isinstance(teacher := row.meta.get("teacher"), dict):
                        meta["teacher"] = {**teacher, "facts": facts_json(checked)}
                if problem is None:
                    file.write(encode(_as_json(row, meta, self._kept_text(row, judge))))
                    kept.add(row.id)
                else:
                    rejected.append(
                        rejected_row(row, problem, row.answer or "", fingerprint=self._fingerprint)
                    )
                    self.rejected_ids.add(row.id)
        self.kept_ids = kept
        for journal in (self.stale, self.rejected):
            if journal.stat().st_size == 0:
                journal.unlink()

    def _beside(self, prompts: Prompts) -> Iterator[tuple[Row, Row | None]]:
        """Each answer with its prompt: both stand in prompt order, answers without one at the end."""
        following = prompts.rows(prompts.ids.among(self.kept_ids))
        for row in read_rows(self.out, answered=True):
            prompt = next(following, None)
            yield row, prompt if prompt is not None and prompt.id == row.id else None

    def _tidy_rejected(self, prompts: Prompts, done: Settled) -> None:
        from mtgdm.row_ids import IdSet

        wanted = IdSet()
        answered = 0
        for row in read_rows(self.rejected):
            if row.id not in prompts.ids:
                done.dropped += 1
            elif row.id in self.kept_ids:
                answered += 1
            else:
                wanted.add(row.id)
        if not wanted:
            manifest_path(self.rejected).unlink(missing_ok=True)
            self.rejected.unlink()
            return
        if done.dropped or answered:
            with replace(self.rejected) as file:
                for row in read_rows(self.rejected):
                    if row.id in wanted:
                        file.write(encode(_as_json(row, row.meta)))
        put_in_order(self.rejected, prompts.ids)


def rejected_row(
    row: Row,
    reason: str,
    text: str,
    *,
    fingerprint: str,
    finish_reason: str | None = None,
    attempts: int | None = None,
) -> dict[str, Any]:
    """A prompt without an answer: why, and the text that was not kept. `attempts` is None for a second look."""
    rejected = {
        "reason": reason,
        "text": text,
        "finish_reason": finish_reason,
        "attempts": attempts,
        "fingerprint": fingerprint,
    }
    meta = _without_teacher(row.meta)
    return {"id": row.id, "messages": row.prompt, "meta": meta, **row.rest, "rejected": rejected}


def rejected_path(out: Path) -> Path:
    """Where the rejected rows of an output lie: `teacher.jsonl` has `teacher.rejected.jsonl` beside it."""
    return out.with_name(f"{out.stem}.rejected{out.suffix}")


def count_lines(path: Path) -> int:
    """How many lines a file has, counted at the speed of the disk; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 18), b""))


def _longest_noted(path: Path) -> int | None:
    """The tokens of the longest prompt, where the file is still as `mtgdm prompts` left it."""
    made = manifest.read(path)
    longest = made.counts.get(LONGEST_PROMPT) if made else None
    if made is None or not isinstance(longest, int):
        return None
    return longest if _as_made(path, made) else None


def _noted_compact(path: Path) -> bool:
    """Whether a complete run wrote every JSON answer of this file in the compact form."""
    made = manifest.read(path)
    form = made.settings.get("json_form") if made else None
    return made is not None and form is not None and form.value == "compact" and _as_made(path, made)


def _as_made(path: Path, made: manifest.Manifest) -> bool:
    """Whether a file is still as its manifest says."""
    then = made.output.model_copy(update={"path": path.name})
    return manifest.state(path, path.parent, [then]).sha256 == then.sha256


def _facts(meta: Mapping[str, Any]) -> Mapping[str, Any]:
    teacher = meta.get("teacher")
    facts = teacher.get("facts") if isinstance(teacher, dict) else None
    return facts if isinstance(facts, dict) else {}


def _same_meta(row: Row, prompt: Row) -> bool:
    return _without_teacher(row.meta) == _without_teacher(prompt.meta)


def _without_teacher(meta: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if key != "teacher"}


def _fingerprint(line: bytes) -> str | None:
    """The fingerprint of an answer; lines of another form are parsed, those of other tools have none."""
    place = line.find(_FINGERPRINT)
    if place >= 0:
        start = place + len(_FINGERPRINT)
        return line[start : line.find(b'"', start)].decode("ascii", "replace")
    if b'"fingerprint"' not in line:
        return None
    try:
        value = json.loads(line)["meta"]["teacher"]["fingerprint"]
    except (ValueError, KeyError, TypeError):
        return None
    return str(value)


def _as_json(row: Row, meta: dict[str, Any], answer: str | None = None) -> dict[str, Any]:
    messages = row.messages
    if answer is not None:
        messages = [*row.prompt, {**messages[-1], "content": answer}]
    return {"id": row.id, "messages": messages, "meta": meta, **row.rest}
