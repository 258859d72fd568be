"""An evaluation as its metrics file tells it: means with intervals, base against student, by type."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from mtgdm.errors import UserError
from mtgdm.rows import read_lines
from mtgdm.scoring.statistics import Interval, mean_interval, paired_difference, percentile


@dataclass(frozen=True)
class Metric:
    """A quality metric: its key in the rows and how people read it."""

    key: str
    label: str
    meaning: str
    lower_is_better: bool = False


METRICS = (
    Metric("char_f1", "character F1", "shared characters with the reference, order ignored"),
    Metric("sequence_ratio", "sequence ratio", "longest common subsequence with the reference"),
    Metric("chrf", "chrF", "shared character n-grams with the reference"),
    Metric("exact_match", "exact match", "the reference, character for character"),
    Metric("contract_valid", "contract valid", "JSON answers that keep their contract; prose has none"),
    Metric("fact_recall", "fact recall", "facts of the record that the answer states"),
    Metric("unsupported_facts", "unsupported facts", "claims a row that the record does not support", True),
)
RUNTIME = ("latency_s", "tokens_per_s", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class EvalRow:
    """One evaluated row: what it is about, and the metrics of student and base."""

    id: str
    spot: str | None
    province: str | None
    type: str
    student: dict[str, Any]
    base: dict[str, Any] | None

    @property
    def unit(self) -> str:
        """What is resampled: the spot, or the row where no spot is named."""
        return self.spot or self.id


@dataclass
class Evaluation:
    """The rows of one metrics file, in the order in which they were evaluated."""

    path: Path
    rows: list[EvalRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def spots(self) -> int:
        """How many spots the rows are about."""
        return len({row.spot for row in self.rows if row.spot})

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


def read_evaluation(path: Path) -> Evaluation:
    """Read a metrics file; a row that stands twice counts once, what a kill left torn is noted."""
    evaluation = Evaluation(path)
    rows: dict[str, EvalRow] = {}
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
    if unreadable == [number] and number:
        evaluation.notes.append(
            f"the last line ({number:,}) is torn and was left out: eval was killed while writing"
        )
    elif unreadable:
        evaluation.notes.append(f"{len(unreadable):,} lines could not be read and were left out")
    evaluation.rows = list(rows.values())
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
        "by_type": {name: _compare(evaluation.of_type(name)) for name in evaluation.types},
        "difference": whole["difference"],
        "spots": evaluation.spots,
        "verdict": verdict(whole["difference"], len(evaluation.rows), evaluation.spots),
        "worst_rows": [_reference(row) for row in worst(evaluation.rows)],
        "notes": evaluation.notes,
    }


def values_of(rows: Iterable[EvalRow], key: str, *, base: bool = False) -> list[float]:
    """The finite values of a metric over the rows that have it."""
    return [value for row in rows if (value := _value(row.base if base else row.student, key)) is not None]


def interval_of(rows: Sequence[EvalRow], key: str, *, base: bool = False) -> Interval:
    """The mean of a metric with its interval, whole spots resampled."""
    pairs = [(row.unit, _value(row.base if base else row.student, key)) for row in rows]
    known = [(unit, value) for unit, value in pairs if value is not None]
    return mean_interval([value for _, value in known], groups=[unit for unit, _ in known])


def worst(rows: Sequence[EvalRow], most: int = 10) -> list[EvalRow]:
    """The rows least like their reference, then those with a broken contract and missing facts."""

    def badness(row: EvalRow) -> tuple[float, float, float]:
        get = row.student
        return (
            _value(get, "char_f1") or 0.0,
            _value(get, "fact_recall") or 0.0,
            -(_value(get, "unsupported_facts") or 0.0),
        )

    return sorted((row for row in rows if why_bad(row)), key=badness)[:most]


def why_bad(row: EvalRow) -> list[str]:
    """What is wrong with a row's answer, in words; nothing where it is as it should be."""
    get = row.student
    reasons = []
    if get.get("finish_reason") not in (None, "stop", "eos"):
        reasons.append(f"ended by {get['finish_reason']}")
    if get.get("contract_valid") is False:
        reasons.append("breaks its contract")
    recall = _value(get, "fact_recall")
    if recall is not None and recall < 0.5:
        reasons.append(f"states {recall:.0%} of the facts")
    claims = _value(get, "unsupported_facts")
    if claims:
        reasons.append(f"{claims:.0f} unsupported claim{'' if claims == 1 else 's'}")
    likeness = _value(get, "char_f1")
    if likeness is not None and likeness < 0.5:
        reasons.append("little in common with the reference")
    return reasons


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
    return {
        "rows": len(rows),
        "student": _figures(rows),
        "base": _figures(compared, base=True) if compared else None,
        "difference": _differences(compared) if compared else None,
    }


def _figures(rows: Sequence[EvalRow], *, base: bool = False) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for metric in METRICS:
        interval = interval_of(rows, metric.key, base=base)
        if interval.rows:
            figures[metric.key] = {
                "mean": interval.mean,
                "ci95": [interval.low, interval.high],
                "rows": interval.rows,
            }
    for key in RUNTIME:
        values = values_of(rows, key, base=base)
        if values:
            figures[key] = {
                "mean": fmean(values),
                "p50": percentile(values, 0.5),
                "p95": percentile(values, 0.95),
            }
    ended = [(row.base or {}) if base else row.student for row in rows]
    figures["finish_reasons"] = dict(Counter(str(get.get("finish_reason")) for get in ended).most_common())
    return figures


def _differences(rows: Sequence[EvalRow]) -> dict[str, Any]:
    differences: dict[str, Any] = {}
    for metric in METRICS:
        pairs = [(_value(row.student, metric.key), _value(row.base, metric.key), row.unit) for row in rows]
        known = [(one, other, unit) for one, other, unit in pairs if one is not None and other is not None]
        if not known:
            continue
        found = paired_difference(
            [one for one, _, _ in known],
            [other for _, other, _ in known],
            groups=[unit for _, _, unit in known],
            lower_is_better=metric.lower_is_better,
        )
        differences[metric.key] = {
            "mean": found.mean,
            "ci95": [found.low, found.high],
            "verdict": found.verdict,
        }
    return differences


def _reference(row: EvalRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "spot": row.spot,
        "type": row.type,
        "char_f1": _value(row.student, "char_f1"),
        "why": why_bad(row),
    }


def _row(value: dict[str, Any], number: int) -> EvalRow:
    base = value.get("base_metrics")
    return EvalRow(
        id=str(value.get("id") or f"line {number}"),
        spot=_text(value.get("spot")),
        province=_text(value.get("province")),
        type=_text(value.get("type")) or "untyped",
        student=value["metrics"],
        base=base if isinstance(base, dict) else None,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _value(metrics: dict[str, Any] | None, key: str) -> float | None:
    value = (metrics or {}).get(key)
    if not isinstance(value, bool | int | float) or not math.isfinite(value):
        return None
    return float(value)
