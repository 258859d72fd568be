"""What an evaluation comes to: student, base and teacher with intervals, by type and province, and what fails."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
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
    values_of,
    worst,
)
from mtgdm.scoring.statistics import mean_interval, paired_difference, percentile

_VARYING = re.compile(r"'[^']*'|\d[\d.]*%?")
"""What differs from row to row in reasons that are the same: figures, and words that are quoted."""


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
    """The mean of each metric with its interval, whole spots resampled."""
    figures: dict[str, Any] = {}
    measured = [(row.unit, row.of(who)) for row in rows]
    for metric in (*METRICS, *ALIASES):
        key = metric.key
        known = [(unit, value) for unit, found in measured if (value := found.get(key)) is not None]
        if known:
            one = mean_interval([value for _, value in known], groups=[unit for unit, _ in known])
            figures[key] = {"mean": one.mean, "ci95": [one.low, one.high], "rows": one.rows}
    return figures


def _differences(rows: Sequence[EvalRow], other: Who) -> dict[str, Any]:
    """What the student gains over another, over the rows where both have a metric."""
    differences: dict[str, Any] = {}
    measured = [(row.student, row.of(other), row.unit) for row in rows]
    for metric in METRICS:
        key = metric.key
        pairs = [(one.get(key), two.get(key), unit) for one, two, unit in measured]
        known = [(one, two, unit) for one, two, unit in pairs if one is not None and two is not None]
        if not known:
            continue
        found = paired_difference(
            [one for one, _, _ in known],
            [two for _, two, _ in known],
            groups=[unit for _, _, unit in known],
            lower_is_better=metric.lower_is_better,
        )
        differences[key] = {
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
