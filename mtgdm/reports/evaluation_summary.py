"""What an evaluation comes to: student, base and teacher with intervals, by type and province, and what fails."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from mtgdm.reports.evaluation import (
    ALIASES,
    METRICS,
    SPREADS,
    EvalRow,
    Evaluation,
    Who,
    label,
    worst,
)
from mtgdm.scoring.statistics import mean_interval, paired_difference, percentile

_VARYING = re.compile(r"'[^']*'|\d[\d.]*%?")
"""What differs from row to row in reasons that are the same: figures, and words that are quoted."""


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """The report in the shape other tools rely on; NaN where rows are too few to know."""
    columns = _Columns(evaluation.rows)
    whole = _compare(columns, range(len(evaluation.rows)))
    provinces = columns.places(lambda row: row.province)
    largest_first = sorted(provinces, key=lambda name: -len(provinces[name]))
    return {
        "rows": len(evaluation.rows),
        "student": whole["student"],
        "base": whole["base"],
        "teacher": whole["teacher"],
        "by_type": {
            name: _compare(columns, places) for name, places in columns.places(lambda row: row.type).items()
        },
        "by_province": {name: _compare(columns, provinces[name]) for name in largest_first},
        "difference": whole["difference"],
        "teacher_difference": whole["teacher_difference"],
        "judge": _judged(evaluation.rows),
        "spots": evaluation.spots,
        "planned_rows": evaluation.planned,
        "complete": evaluation.complete,
        "batch_rows": evaluation.batch_rows,
        "verdict": verdict(whole["difference"], len(evaluation.rows), evaluation.spots),
        "failures": _failures(evaluation.rows),
        "worst_rows": [_reference(row) for row in worst(evaluation.rows)],
        "notes": evaluation.notes,
    }


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


class _Columns:
    """The figures of rows by metric: groups of rows, as places, are picked without a way through every row."""

    def __init__(self, rows: Sequence[EvalRow]) -> None:
        self._rows = rows
        self._values: dict[tuple[Who, str], list[Any]] = {}
        self.units = [row.unit for row in rows]
        self.spots = [row.spot for row in rows]

    def places(self, name: Callable[[EvalRow], str | None]) -> dict[str, list[int]]:
        """The places of the rows of each group, in order of appearance; rows without a name are left out."""
        found: dict[str, list[int]] = {}
        for place, row in enumerate(self._rows):
            if (group := name(row)) is not None:
                found.setdefault(group, []).append(place)
        return found

    def has(self, who: Who, places: Sequence[int]) -> list[int]:
        """Those of the places where there are metrics of somebody."""
        return [place for place in places if getattr(self._rows[place], who) is not None]

    def values(self, who: Who, key: str) -> list[Any]:
        """A metric of every row, None where it does not apply."""
        if (who, key) not in self._values:
            self._values[who, key] = [row.of(who).get(key) for row in self._rows]
        return self._values[who, key]


def _compare(columns: _Columns, places: Sequence[int]) -> dict[str, Any]:
    compared, taught = columns.has("base", places), columns.has("teacher", places)
    return {
        "rows": len(places),
        "spots": len({spot for place in places if (spot := columns.spots[place])}),
        "student": _figures(columns, places, "student"),
        "base": _figures(columns, compared, "base") if compared else None,
        "teacher": _means(columns, taught, "teacher") if taught else None,
        "difference": _differences(columns, compared, "base") if compared else None,
        "teacher_difference": _differences(columns, taught, "teacher") if taught else None,
    }


def _figures(columns: _Columns, places: Sequence[int], who: Who) -> dict[str, Any]:
    figures = _means(columns, places, who)
    for key in SPREADS:
        column = columns.values(who, key)
        values = [value for place in places if (value := column[place]) is not None]
        if values:
            figures[key] = {
                "mean": fmean(values),
                "p50": percentile(values, 0.5),
                "p95": percentile(values, 0.95),
            }
    reasons = columns.values(who, "finish_reason")
    figures["finish_reasons"] = dict(Counter(str(reasons[place]) for place in places).most_common())
    return figures


def _means(columns: _Columns, places: Sequence[int], who: Who) -> dict[str, Any]:
    """The mean of each metric with its interval, whole spots resampled."""
    figures: dict[str, Any] = {}
    for metric in (*METRICS, *ALIASES):
        column = columns.values(who, metric.key)
        known = [place for place in places if column[place] is not None]
        if known:
            units = [columns.units[place] for place in known]
            values = [column[place] for place in known]
            one = mean_interval(values, groups=units, shares=not metric.counts)
            figures[metric.key] = {"mean": one.mean, "ci95": [one.low, one.high], "rows": one.rows}
    return figures


def _differences(columns: _Columns, places: Sequence[int], other: Who) -> dict[str, Any]:
    """What the student gains over another, over the rows where both have a metric."""
    differences: dict[str, Any] = {}
    for metric in METRICS:
        one, two = columns.values("student", metric.key), columns.values(other, metric.key)
        known = [place for place in places if one[place] is not None and two[place] is not None]
        if not known:
            continue
        found = paired_difference(
            [one[place] for place in known],
            [two[place] for place in known],
            groups=[columns.units[place] for place in known],
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
    judged = [(row, row.judge) for row in rows if row.judge]
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
    reasons = [[_VARYING.sub("…", reason) for reason in row.why_bad] for row in rows]
    return {
        "rows": sum(map(bool, reasons)),
        "reasons": dict(Counter(reason for found in reasons for reason in found).most_common()),
        "contract_keys": _contract_keys(rows, "student"),
        "base_contract_keys": _contract_keys(rows, "base"),
    }


def _contract_keys(rows: Sequence[EvalRow], who: Who) -> dict[str, int]:
    keys = (row.of(who).get("contract_key") for row in rows)
    return dict(Counter(str(key) for key in keys if key is not None).most_common())


def _reference(row: EvalRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "spot": row.spot,
        "type": row.type,
        "char_f1": row.student.get("char_f1"),
        "why": row.why_bad,
    }
