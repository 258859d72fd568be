"""An evaluation as its metrics file tells it: student, base and teacher with intervals, by type and province."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from mtgdm.errors import UserError
from mtgdm.rows import read_lines
from mtgdm.scoring import failures
from mtgdm.scoring.failures import number
from mtgdm.scoring.statistics import Interval, mean_interval, paired_difference, percentile

Who = Literal["student", "base", "teacher"]


@dataclass(frozen=True)
class Metric:
    """A quality metric: its key in the rows and how people read it."""

    key: str
    label: str
    meaning: str
    lower_is_better: bool = False
    charted: bool = True


METRICS = (
    Metric("char_f1", "character F1", "shared characters with the reference, order ignored"),
    Metric("sequence_ratio", "sequence ratio", "longest common subsequence with the reference; ROUGE-L"),
    Metric("chrf", "chrF", "shared character n-grams with the reference"),
    Metric("exact_match", "exact match", "the reference, character for character"),
    Metric("contract_valid", "contract valid", "JSON answers that keep their contract; prose has none"),
    Metric("prose_valid", "prose valid", "prose that keeps the rules of its type"),
    Metric("language_ok", "right language", "answers in the script or the languages that their type wants"),
    Metric("fact_recall", "fact recall", "facts of the record that the answer states"),
    Metric("unsupported_facts", "unsupported facts", "claims a row that the record does not support", True),
    Metric("repetition", "repetition", "share of the text that stood in it before", True, charted=False),
)
ALIASES = (Metric("rouge_l", "ROUGE-L", "the sequence ratio under the name that many look for"),)
"""In the figures for other tools, but in no table: a second name is no second reason."""
SPREADS = ("latency_s", "tokens_per_s", "prompt_tokens", "output_tokens", "length_ratio")
"""What has no better and worse: told by mean, median and 95th percentile."""
_VARYING = re.compile(r"'[^']*'|\d[\d.]*%?")
"""What differs from row to row in reasons that are the same: figures, and words that are quoted."""
_JUDGED = {"score", "student_first", "student_second"}


@dataclass(frozen=True)
class EvalRow:
    """One evaluated row: what it is about, and the metrics of student and base."""

    id: str
    spot: str | None
    province: str | None
    type: str
    student: dict[str, Any]
    base: dict[str, Any] | None
    teacher: dict[str, Any] | None = None
    """What can be told of the reference itself; None in files of earlier versions."""
    judge: dict[str, Any] | None = None
    leaked: bool = False

    def of(self, who: Who) -> dict[str, Any]:
        """The metrics of the student, its base or its teacher."""
        found: dict[str, Any] | None = getattr(self, who)
        return found or {}

    @property
    def unit(self) -> str:
        """What is resampled: the spot, or the row where no spot is named."""
        return self.spot or self.id


@dataclass
class Evaluation:
    """The rows of one metrics file, in the order in which they were evaluated."""

    path: Path
    rows: list[EvalRow] = field(default_factory=list)
    refused: int = 0
    """Rows that could not be asked."""
    models: list[str] = field(default_factory=list)
    """Who was evaluated: one, where nobody put files together."""
    notes: list[str] = field(default_factory=list)

    @property
    def spots(self) -> int:
        """How many spots the rows are about."""
        return len({row.spot for row in self.rows if row.spot})

    @property
    def leaked(self) -> int:
        """How many rows are about spots that the student was trained on."""
        return sum(row.leaked for row in self.rows)

    @property
    def types(self) -> list[str]:
        """The prompt types, in order of appearance."""
        return list(dict.fromkeys(row.type for row in self.rows))

    @property
    def compared(self) -> bool:
        """Whether any row has metrics of the base."""
        return any(row.base is not None for row in self.rows)

    def of_type(self, name: str) -> list[EvalRow]:
        """The rows of one prompt type."""
        return [row for row in self.rows if row.type == name]

    @property
    def provinces(self) -> dict[str, list[EvalRow]]:
        """The rows of each province, those with most rows first; rows that name none are left out."""
        found: dict[str, list[EvalRow]] = {}
        for row in self.rows:
            if row.province is not None:
                found.setdefault(row.province, []).append(row)
        return dict(sorted(found.items(), key=lambda pair: -len(pair[1])))


def read_evaluation(path: Path) -> Evaluation:
    """Read a metrics file; a row that stands twice counts once, what a kill left torn is noted."""
    evaluation = Evaluation(path)
    rows: dict[str, EvalRow] = {}
    refused: set[str] = set()
    models: dict[str, None] = {}
    unreadable: list[int] = []
    number = 0
    for number, line in read_lines(path):
        try:
            value = json.loads(line)
        except ValueError:
            unreadable.append(number)
            continue
        if isinstance(value, dict) and isinstance(value.get("metrics"), dict):
            row = _row(value, number)
            rows[row.id] = row
            if model := _text(value.get("model")):
                models[model] = None
        elif isinstance(value, dict) and "refused" in value:
            refused.add(str(value.get("id")))
    if unreadable == [number] and number:
        evaluation.notes.append(
            f"the last line ({number:,}) is torn and was left out: eval was killed while writing"
        )
    elif unreadable:
        evaluation.notes.append(f"{len(unreadable):,} lines could not be read and were left out")
    evaluation.rows, evaluation.models = list(rows.values()), list(models)
    evaluation.refused = len(refused - rows.keys())
    if not rows:
        if number > len(unreadable):
            raise UserError(
                "this holds no eval metrics", where=path, hint="name a log/eval-*.metrics.jsonl file"
            )
        evaluation.notes.append("no row was evaluated")
    return evaluation


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """The report in the shape other tools rely on; NaN where rows are too few to know."""
    whole = _compare(evaluation.rows)
    return {
        "rows": len(evaluation.rows),
        "student": whole["student"],
        "base": whole["base"],
        "teacher": whole["teacher"],
        "by_type": {name: _compare(evaluation.of_type(name)) for name in evaluation.types},
        "by_province": {name: _compare(rows) for name, rows in evaluation.provinces.items()},
        "difference": whole["difference"],
        "teacher_difference": whole["teacher_difference"],
        "judge": _judged(evaluation.rows),
        "spots": evaluation.spots,
        "verdict": verdict(whole["difference"], len(evaluation.rows), evaluation.spots),
        "failures": _failures(evaluation.rows),
        "worst_rows": [_reference(row) for row in worst(evaluation.rows)],
        "notes": evaluation.notes,
    }


def values_of(rows: Iterable[EvalRow], key: str, who: Who = "student") -> list[float]:
    """The finite values of a metric over the rows that have it."""
    return [value for row in rows if (value := number(row.of(who), key)) is not None]


def interval_of(rows: Sequence[EvalRow], key: str, who: Who = "student") -> Interval:
    """The mean of a metric with its interval, whole spots resampled."""
    known = [(row.unit, value) for row in rows if (value := number(row.of(who), key)) is not None]
    return mean_interval([value for _, value in known], groups=[unit for unit, _ in known])


def worst(rows: Sequence[EvalRow], most: int = 10) -> list[EvalRow]:
    """The rows with most wrong in them."""
    bad = [row for row in rows if why_bad(row)]
    return sorted(bad, key=lambda row: -failures.badness(row.student))[:most]


def why_bad(row: EvalRow) -> list[str]:
    """What is wrong with a row's answer, in words; nothing where it is as it should be."""
    return failures.why_bad(row.student, row.teacher)


def verdict(difference: dict[str, Any] | None, rows: int, spots: int) -> dict[str, Any]:
    """The sentence of the report and the metrics it rests on."""
    of = f"{rows:,} row{'' if rows == 1 else 's'}" + (
        f", {spots:,} spot{'' if spots == 1 else 's'}" if spots else ""
    )
    if not difference:
        return {"text": f"no base to compare with ({of})", "better": [], "worse": [], "unclear": []}
    groups: dict[str, list[str]] = {"better": [], "worse": [], "too few rows to tell": []}
    for key, figures in difference.items():
        groups[figures["verdict"]].append(key)
    better, worse, unclear = groups.values()
    text = f"better than its base on {len(better)} of {len(difference)} metrics"
    if worse:
        text += f", worse on {len(worse)} ({', '.join(label(key) for key in worse)})"
    if unclear:
        text += f", too few rows to tell on {len(unclear)}"
    return {"text": f"{text} ({of})", "better": better, "worse": worse, "unclear": unclear}


def label(key: str) -> str:
    """How people read a metric's key."""
    return next((metric.label for metric in METRICS if metric.key == key), key)


def _compare(rows: Sequence[EvalRow]) -> dict[str, Any]:
    compared = [row for row in rows if row.base is not None]
    taught = [row for row in rows if row.teacher is not None]
    return {
        "rows": len(rows),
        "spots": len({row.spot for row in rows if row.spot}),
        "student": _figures(rows),
        "base": _figures(compared, "base") if compared else None,
        "teacher": _means(taught, "teacher") if taught else None,
        "difference": _differences(compared, "base") if compared else None,
        "teacher_difference": _differences(taught, "teacher") if taught else None,
    }


def _figures(rows: Sequence[EvalRow], who: Who = "student") -> dict[str, Any]:
    figures = _means(rows, who)
    for key in SPREADS:
        values = values_of(rows, key, who)
        if values:
            figures[key] = {
                "mean": fmean(values),
                "p50": percentile(values, 0.5),
                "p95": percentile(values, 0.95),
            }
    figures["finish_reasons"] = dict(
        Counter(str(row.of(who).get("finish_reason")) for row in rows).most_common()
    )
    return figures


def _means(rows: Sequence[EvalRow], who: Who) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric in (*METRICS, *ALIASES):
        interval = interval_of(rows, metric.key, who)
        if interval.rows:
            figures[metric.key] = {
                "mean": interval.mean,
                "ci95": [interval.low, interval.high],
                "rows": interval.rows,
            }
    return figures


def _differences(rows: Sequence[EvalRow], other: Who) -> dict[str, Any]:
    """What the student gains over another, over the rows where both have a metric."""
    differences: dict[str, Any] = {}
    for metric in METRICS:
        pairs = [
            (number(row.student, metric.key), number(row.of(other), metric.key), row.unit) for row in rows
        ]
        known = [(one, two, unit) for one, two, unit in pairs if one is not None and two is not None]
        if not known:
            continue
        found = paired_difference(
            [one for one, _, _ in known],
            [two for _, two, _ in known],
            groups=[unit for _, _, unit in known],
            lower_is_better=metric.lower_is_better,
        )
        differences[metric.key] = {
            "mean": found.mean,
            "ci95": [found.low, found.high],
            "verdict": found.verdict,
        }
    return differences


def _judged(rows: Sequence[EvalRow]) -> dict[str, Any] | None:
    """What a judge said: how often the student won, and how much the order of the answers had to do with it."""
    judged = [(row, row.judge) for row in rows if row.judge and row.judge.keys() >= _JUDGED]
    if not judged:
        return None
    scores = [float(one["score"]) for _, one in judged]
    won = mean_interval(scores, groups=[row.unit for row, _ in judged])
    against_even = paired_difference(scores, [0.5] * len(scores), groups=[row.unit for row, _ in judged])
    first = sum((one["student_first"] == "student") + (one["student_second"] == "other") for _, one in judged)
    second = sum(
        (one["student_first"] == "other") + (one["student_second"] == "student") for _, one in judged
    )
    return {
        "by": sorted({str(one.get("by")) for _, one in judged}),
        "against": sorted({str(one.get("against")) for _, one in judged}),
        "pairs": len(judged),
        "won": scores.count(1.0),
        "ties": scores.count(0.5),
        "lost": scores.count(0.0),
        "score": {"mean": won.mean, "ci95": [won.low, won.high]},
        "verdict": against_even.verdict,
        "same_in_both_orders": fmean(one["student_first"] == one["student_second"] for _, one in judged),
        "first_preferred": first / (first + second) if first + second else None,
    }


def _failures(rows: Sequence[EvalRow]) -> dict[str, Any]:
    """How many rows have something wrong, what it is, and which keys of the contracts break."""
    reasons = [[_VARYING.sub("…", reason) for reason in why_bad(row)] for row in rows]
    keys = Counter(
        str(row.student["contract_key"]) for row in rows if row.student.get("contract_key") is not None
    )
    return {
        "rows": sum(map(bool, reasons)),
        "reasons": dict(Counter(reason for found in reasons for reason in found).most_common()),
        "contract_keys": dict(keys.most_common()),
    }


def _reference(row: EvalRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "spot": row.spot,
        "type": row.type,
        "char_f1": number(row.student, "char_f1"),
        "why": why_bad(row),
    }


def _row(value: dict[str, Any], number: int) -> EvalRow:
    others = {key: value.get(key) for key in ("base_metrics", "reference_metrics", "judge")}
    known = {key: one for key, one in others.items() if isinstance(one, dict)}
    return EvalRow(
        id=str(value.get("id") or f"line {number}"),
        spot=_text(value.get("spot")),
        province=_text(value.get("province")),
        type=_text(value.get("type")) or "untyped",
        student=value["metrics"],
        base=known.get("base_metrics"),
        teacher=known.get("reference_metrics"),
        judge=known.get("judge"),
        leaked=value.get("leaked") is True,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
