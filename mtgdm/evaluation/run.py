"""One evaluation: what is asked, what is there already, and where the answers go.

A row is one write to the outputs as soon as it is whole; the base's answers wait in a journal of their own
until the student's stand beside them. A kill loses what is being generated and nothing else.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtgdm import rows
from mtgdm.errors import UserError
from mtgdm.evaluation.base_answers import BaseAnswers, Said
from mtgdm.evaluation.earlier import (
    WAYS_OUT,
    Aside,
    about,
    fits_limit,
    mend,
    metrics_of,
    read_outputs,
    refuse_other_files,
    same,
)
from mtgdm.evaluation.student import RUNTIME, Reply, Student
from mtgdm.evaluation.thoughts import split, without_thoughts
from mtgdm.manifest import settings_digest
from mtgdm.rows import Journal, Row
from mtgdm.scoring.failures import number
from mtgdm.scoring.row import reference_score, score
from mtgdm.terminal import counted

if TYPE_CHECKING:
    from mtgdm.stage import Context
    from mtgdm.terminal import Progress

SHOWN = {
    "char_f1": "char-F1",
    "contract_valid": "contract-valid",
    "fact_recall": "facts",
    "exact_match": "exact",
}
"""What is told while it runs and at its end; the report has all."""
_WHILE_RUNNING = ("char_f1", "contract_valid", "fact_recall")


@dataclass
class Running:
    """Means over the rows so far, without going through them again at every row."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One more row."""
        for key in SHOWN:
            value = number(metrics, key)
            if value is not None:
                self.sums[key] = self.sums.get(key, 0.0) + value
                self.counts[key] = self.counts.get(key, 0) + 1

    @property
    def means(self) -> dict[str, float]:
        """The mean of each metric over the rows that have it."""
        return {key: self.sums[key] / self.counts[key] for key in SHOWN if key in self.counts}


@dataclass
class Evaluated:
    """What an evaluation found."""

    rows: list[dict[str, Any]]
    """The eval rows, in the order of the test rows."""
    refused: dict[str, str]
    """Why a row could not be asked, by its id."""
    student: dict[str, float]
    base: dict[str, float]


class Evaluation:
    """Asks a student, and its base with `compare`, for the rows that an earlier run has not answered."""

    def __init__(
        self,
        student: Student,
        wanted: Sequence[Row],
        context: Context,
        *,
        out: Path,
        test: str,
        known: Collection[str] = (),
        compare: bool = False,
        settings: Sequence[Any] = (),
        about: str = "",
        leaked: Collection[str] = (),
        partial: bool = False,
        overwrite: bool = False,
        log_every: int = 10,
    ) -> None:
        """`test`: the file of the rows, as outputs name it; `known`: ids of all rows there that could be asked.

        `settings`: what else shapes an answer. `about`: the same in words. `leaked`: ids of rows about what the
        student was trained on. `partial`: rows not wanted stay.
        """
        self._student = student
        self._wanted = [without_thoughts(row) for row in wanted]
        self._context = context
        self._out = out
        self._test = test
        self._known = {*known, *(row.id for row in wanted)}
        self._compare = compare
        self._leaked = frozenset(leaked)
        self._partial = partial
        self._overwrite = overwrite
        self._log_every = log_every
        self.metrics_path = context.log_path(".metrics.jsonl")
        """The metrics of this run, a line for each row, those of an earlier run first."""
        self._label = f"{student.name}{about}"
        base = student.base_identity if compare else None
        shaping = {**student.identity, "base": base, "settings": list(settings)}
        self._fingerprint = settings_digest(shaping)[:16]
        self._base_answers = BaseAnswers(out, self._label, self._fingerprint, student.max_new_tokens)
        self._refused: dict[str, str] = {}
        self._asked = 0
        self._found: dict[str, dict[str, Any]] = {}
        self._means, self._base_means = Running(), Running()
        self._tokens = 0

    def run(self) -> Evaluated:
        """Ask the base, then the student, and write each row as soon as it is whole."""
        self._aside = Aside(self._out)
        earlier = self._earlier()
        missing = [row for row in self._wanted if row.id not in earlier]
        if earlier:
            self._context.print(f"{len(earlier):,} of {len(self._wanted):,} rows are there already")
        self._student.witness = next((row for row in self._wanted if row.id in earlier), None)
        try:
            self._write(earlier, missing)
        except BaseException:
            if not self._asked:
                self._aside.bring_back()
            raise
        self._aside.forget()
        rows.put_in_order(self._out, (row.id for row in self._wanted))
        if self._compare:
            self._base_answers.forget(self._found)
        found = [self._found[row.id] for row in self._wanted if row.id in self._found]
        return Evaluated(found, self._refused, self._means.means, self._base_means.means)

    def _write(self, earlier: Mapping[str, dict[str, Any]], missing: list[Row]) -> None:
        with self.metrics_path.open("wb") as metrics_file, Journal(self._out) as journal:

            def keep(row: dict[str, Any]) -> None:
                metrics_file.write(rows.encode(metrics_line(row, len(self._wanted))))
                metrics_file.flush()
                self._found[row["id"]] = row
                self._means.add(row["metrics"])
                self._base_means.add(row.get("base_metrics") or {})

            for row in self._wanted:
                if row.id in earlier:
                    keep(earlier[row.id])
            if missing:
                self._ask(missing, journal, keep)
            metrics_file.writelines(self._refused_lines())

    def add_verdicts(
        self, found: Evaluated, judged: Mapping[str, dict[str, Any]], *, by: str | None = None
    ) -> None:
        """Put the verdicts of a judge into the rows and their metrics; those of an earlier judge go."""
        for row in found.rows:
            row.pop("judge", None)
            if row["id"] in judged:
                row["judge"] = judged[row["id"]]
        # With --limit the file holds rows that were not asked about this time: they stay, but for another's verdicts.
        now = {row["id"]: row for row in found.rows}
        there = [rows.parse_object(self._out, *line) for line in rows.read_lines(self._out)]
        for row in there:
            if by is not None and row["id"] not in now and row.get("judge", {}).get("by") != by:
                row.pop("judge", None)
        with rows.replace(self._out) as file:
            file.writelines(rows.encode(now.get(row["id"], row)) for row in there)
        with rows.replace(self.metrics_path) as file:
            file.writelines(rows.encode(metrics_line(row, len(self._wanted))) for row in found.rows)
            file.writelines(self._refused_lines())

    def _refused_lines(self) -> Iterator[bytes]:
        for row in self._wanted:
            if row.id in self._refused:
                yield rows.encode({**_about_row(row.id, row.meta), "refused": self._refused[row.id]})

    def _ask(self, missing: list[Row], journal: Journal, keep: Callable[[dict[str, Any]], None]) -> None:
        total = len(missing) * (2 if self._compare else 1)
        self._context.log.info("%s: %d rows, %d of them to ask", self._label, len(self._wanted), len(missing))
        with self._context.progress(total, "answers" if self._compare else "rows") as bar:
            bar.live = self._student.notes
            of_base = self._ask_base(missing, bar) if self._compare else {}
            missing = [row for row in missing if row.id not in self._refused]
            started, self._tokens = time.monotonic(), 0

            def answered(row: Row, reply: Reply) -> None:
                self._asked += 1
                reply = split(reply) if self._student.may_think else reply
                scored = self._scored(row, (reply.text, reply.runtime), of_base.get(row.id))
                if reply.thoughts:
                    scored["thoughts"] = reply.thoughts
                journal.append(scored)
                self._aside.forget()
                keep(scored)
                self._log(self._asked, scored)
                bar.advance()
                means = self._means.means
                first, *others = [f"{SHOWN[key]} {means[key]:.3f}" for key in _WHILE_RUNNING if key in means]
                # Where there is no room the last go: whether it moves says more than a third mean.
                bar.note(" · ".join([first, *self._speed(reply, started), *others]))

            self._student.ask(missing, answered, lambda row, why: self._refuse(row, why, bar))

    def _ask_base(self, missing: list[Row], bar: Progress) -> dict[str, Said]:
        """The base's answers, in a journal of their own until the student's stand beside them."""
        with self._base_answers as known:
            asked = [row for row in missing if row.id not in known.found]
            bar.advance(len(missing) - len(asked))
            bar.note("base model")
            started, self._tokens = time.monotonic(), 0

            def answered(row: Row, reply: Reply) -> None:
                known.add(row, split(reply) if self._student.may_think else reply)
                bar.advance()
                bar.note(" · ".join(["base model", *self._speed(reply, started)]))

            if asked:
                # A row that the base cannot answer is left out for the student too: pairs are compared.
                self._student.ask(
                    asked, answered, lambda row, why: self._refuse(row, f"base: {why}", bar, 2), base=True
                )
            return known.found

    def _speed(self, reply: Reply, started: float) -> list[str]:
        self._tokens += reply.output_tokens or 0
        seconds = time.monotonic() - started
        return [f"{self._tokens / seconds:,.0f} tokens/s"] if self._tokens and seconds else []

    def _refuse(self, row: Row, why: str, bar: Progress, times: int = 1) -> None:
        self._refused[row.id] = why
        self._context.log.warning("row %s could not be asked: %s", row.id, why)
        bar.advance(times)

    def _scored(self, row: Row, said: Said, base_said: Said | None) -> dict[str, Any]:
        domain = self._context.domain
        scored: dict[str, Any] = {
            "id": row.id,
            "messages": row.prompt,
            "reference": row.answer,
            "output": said[0],
        }
        if base_said is not None:
            scored["base_output"] = base_said[0]
        scored["metrics"] = score(domain, row, *said)
        if base_said is not None:
            scored["base_metrics"] = score(domain, row, *base_said)
        scored["reference_metrics"] = reference_score(domain, row)
        scored["meta"] = self._meta(row)
        return scored

    def _meta(self, row: Row) -> dict[str, Any]:
        made: dict[str, Any] = {
            "model": self._label,
            "fingerprint": self._fingerprint,
            "test": self._test,
            "max_new_tokens": self._student.max_new_tokens,
        }
        if row.id in self._leaked:
            made["leaked"] = True
        return {**row.meta, "split": row.split, "eval": made}

    def _log(self, asked: int, row: dict[str, Any]) -> None:
        if asked % self._log_every == 0:
            line = json.dumps(metrics_line(row, len(self._wanted)), ensure_ascii=False)
            self._context.log.info("row %d %s %s", asked, row["id"], line)

    # --- what is there already ---

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """The rows that need not be asked again; what an earlier run left besides is told, or refused."""
        out = self._out
        if self._overwrite and out.exists():
            refuse_other_files(out)
            self._base_answers.path.unlink(missing_ok=True)
            self._aside.put()
        there = read_outputs(out) if out.exists() else []
        if not there:
            return {}
        if self._is_of_a_former_student(there):
            self._aside.put()
            return {}
        mend(out)
        wanted = {row.id: row for row in self._wanted}
        self._refuse_other_rows([value for value in there if value["id"] not in self._known])
        found: dict[str, dict[str, Any]] = {}
        kept: list[dict[str, Any]] = []
        for value in there:
            row = wanted.get(value["id"])
            if row is None:
                kept += [value] if self._partial else []
            elif self._is_the_answer(value):
                found[row.id] = self._as_scored_now(row, value)
                kept.append(found[row.id])
        if any(one is not other for one, other in zip_longest(kept, there)):
            self._tell_changes(there, kept)
            with rows.replace(out) as file:
                file.writelines(map(rows.encode, kept))
        return found

    def _is_of_a_former_student(self, there: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the answers are of this student before it changed; UserError where they are another's."""
        others = [made for value in there if (made := about(value)).get("fingerprint") != self._fingerprint]
        for made in others:
            if made.get("model") != self._label or not made.get("fingerprint"):
                raise UserError(
                    f"these answers are of {made.get('model') or 'another tool'}; asked now is {self._label}",
                    where=self._out,
                    hint=WAYS_OUT,
                )
        if others and self._partial:
            raise UserError(
                f"{self._label} has changed since: some rows asked anew would replace all its "
                f"{counted(len(there), 'answer')}",
                where=self._out,
                hint=WAYS_OUT,
            )
        if others:
            self._context.print(
                f"{self._label} has changed since (trained again, or another base): "
                f"its {counted(len(there), 'answer')} will be replaced"
            )
        return bool(others)

    def _refuse_other_rows(self, unwanted: Sequence[Mapping[str, Any]]) -> None:
        """UserError where answers to the rows of another file would be lost, or would stand among these."""
        files = {about(value).get("test", self._test) for value in unwanted} - {self._test}
        if files:
            raise UserError(
                f"{counted(len(unwanted), 'answer')} here to rows of {', '.join(sorted(map(str, files)))}, which "
                f"{self._test} does not hold",
                where=self._out,
                hint=WAYS_OUT,
            )

    def _is_the_answer(self, value: Mapping[str, Any]) -> bool:
        """Whether asking again would give the same: a limit that cut an answer may be another now."""
        limit, made_under = self._student.max_new_tokens, about(value).get("max_new_tokens")
        return all(fits_limit(metrics, made_under, limit) for metrics in metrics_of(value))

    def _as_scored_now(self, row: Row, value: dict[str, Any]) -> dict[str, Any]:
        """The row itself, or scored anew where its reference or its record have changed."""
        if same(value.get("reference"), row.answer) and same(value["meta"], self._meta(row)):
            return value
        beside = (value["base_output"], _runtime(value["base_metrics"])) if "base_metrics" in value else None
        scored = self._scored(row, (value["output"], _runtime(value["metrics"])), beside)
        return scored | {key: value[key] for key in ("thoughts",) if key in value}

    def _tell_changes(self, there: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> None:
        left = {value["id"] for value in kept}
        wanted = {row.id for row in self._wanted}
        gone = [value for value in there if value["id"] not in left]
        dropped = sum(value["id"] not in wanted for value in gone)
        if dropped:
            answers = counted(dropped, "answer")
            self._context.print(f"dropped: {answers} to rows that {self._test} no longer holds")
        if again := len(gone) - dropped:
            self._context.print(f"asked again: {counted(again, 'row')}, under another limit of tokens")


def metrics_line(row: Mapping[str, Any], of: int) -> dict[str, Any]:
    """A row of the metrics file: what it is about, of how many rows, and its metrics without its texts."""
    evaluated = row["meta"]["eval"]
    line = {
        **_about_row(row["id"], row["meta"]),
        "model": evaluated["model"],
        "of": of,
        "metrics": row["metrics"],
        "base_metrics": row.get("base_metrics"),
        "reference_metrics": row.get("reference_metrics"),
    }
    if evaluated.get("leaked"):
        line["leaked"] = True
    return line | ({"judge": row["judge"]} if "judge" in row else {})


def _runtime(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: metrics.get(key) for key in RUNTIME}


def _about_row(identity: str, meta: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": identity, **{key: meta.get(key) for key in ("spot", "province", "type")}}
