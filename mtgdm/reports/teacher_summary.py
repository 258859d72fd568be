"""What a teacher run comes to: its figures as plain values, and what is worth knowing in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from mtgdm.reports.teacher_pace import Pace, describe_pace
from mtgdm.reports.teacher_run import TeacherRun, TypeFigures
from mtgdm.scoring.statistics import percentile
from mtgdm.terminal import counted

SHOWN_REASONS = 3


def describe(run: TeacherRun, pace: Pace, *, complete: bool) -> dict[str, Any]:
    """The figures of a run as plain JSON values; NaN or null where a value is not known."""
    kept, rejected = run.kept, run.rejected
    reasons_by_type: dict[str, dict[str, int]] = {}
    for (kind, reason), count in run.reasons.most_common():
        reasons_by_type.setdefault(kind, {})[reason] = count
    data = {
        "complete": complete,
        "rows": kept + rejected,
        "kept": kept,
        "rejected": rejected,
        "kept_share": kept / (kept + rejected),
        "teachers": [
            {"backend": backend, "model": model, "rows": rows}
            for (backend, model), rows in run.models.most_common()
        ],
        "all_types": _type_figures(_together(run)),
        "by_type": {name: _type_figures(figures) for name, figures in run.types.items()},
        "by_split": dict(run.splits.most_common()),
        "reasons": dict(run.all_reasons.most_common()),
        "reasons_by_type": reasons_by_type,
        "rejected_finish_reasons": dict(run.finish_reasons.most_common()),
        "tokens": _tokens(run),
        "repairs": {
            "repaired": sum(figures.repaired for figures in run.types.values()),
            "requests_per_kept_row": run.attempts / kept if run.attempts and kept else math.nan,
        },
        "pace": describe_pace(pace),
        "in_flight": run.seconds / pace.worked_s if pace.worked_s and run.seconds else math.nan,
        "most_unsupported": [
            {"id": one.id, "spot": one.spot, "type": one.type, "unsupported": one.count, "claims": one.claims}
            for one in run.worst
        ],
        "notes": run.notes,
    }
    return data | {"findings": findings(data)}


def findings(data: Mapping[str, Any]) -> list[str]:
    """What is worth knowing, in sentences."""
    found = [] if data["complete"] else ["the run is not complete: these are the rows so far"]
    reasons = list(data["reasons"].items())
    found += [f"rejected {count:,} × {reason}" for reason, count in reasons[:SHOWN_REASONS]]
    if len(reasons) > SHOWN_REASONS:
        found.append(f"and {counted(len(reasons) - SHOWN_REASONS, 'other reason')}")
    worst = max(data["by_type"], key=lambda kind: _lost(data["by_type"][kind]))
    if len(data["by_type"]) > 1 and _lost(data["by_type"][worst]) > 2 * (1 - data["kept_share"]):
        found.append(f"{worst} loses most: {_lost(data['by_type'][worst]):.1%} of its rows")
    recall, claims = data["all_types"]["fact_recall"], data["all_types"]["unsupported"]
    if recall["rows"]:
        found.append(
            f"kept answers tell {recall['mean']:.1%} of their records' facts; "
            f"{counted(claims['rows_with_claims'], 'row')} of {claims['rows']:,} make claims without support "
            f"({claims['claims']:,} in all)"
        )
    else:
        found.append("no row carries a record: facts were not checked")
    return found + _extra_cost(data)


def _extra_cost(data: Mapping[str, Any]) -> list[str]:
    """What was asked beyond one answer for each kept row."""
    found = []
    repaired, pace = data["repairs"]["repaired"], data["pace"]
    if repaired:
        found.append(f"{counted(repaired, 'row')} ({repaired / data['kept']:.1%}) kept after a repair turn")
    if pace and pace["rejected_output_tokens"]:
        lost = pace["rejected_output_tokens"]
        found.append(
            f"rejected answers cost {large(lost)} output tokens ({lost / pace['output_tokens']:.1%} of all)"
        )
    return found


def _type_figures(figures: TypeFigures) -> dict[str, Any]:
    claims = figures.unsupported
    return {
        "kept": figures.kept,
        "rejected": figures.rejected,
        "repaired": figures.repaired,
        "characters": _spread(figures.characters),
        "prompt_tokens": _spread(figures.prompt_tokens),
        "output_tokens": _spread(figures.output_tokens),
        "fact_recall": _spread(figures.recall),
        "unsupported": {
            "rows": len(claims),
            "rows_with_claims": sum(map(bool, claims)),
            "claims": sum(claims),
        },
    }


def _together(run: TeacherRun) -> TypeFigures:
    """All types as one."""
    whole = TypeFigures(run.kept, run.rejected, sum(figures.repaired for figures in run.types.values()))
    for figures in run.types.values():
        whole.characters += figures.characters
        whole.prompt_tokens += figures.prompt_tokens
        whole.output_tokens += figures.output_tokens
        whole.recall += figures.recall
        whole.unsupported += figures.unsupported
    return whole


def _spread(values: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "rows": len(ordered),
        "mean": fmean(ordered) if ordered else math.nan,
        "p50": percentile(ordered, 0.5),
        "p95": percentile(ordered, 0.95),
        "min": ordered[0] if ordered else math.nan,
        "max": ordered[-1] if ordered else math.nan,
    }


def _tokens(run: TeacherRun) -> dict[str, Any]:
    """What the kept answers cost; of a repaired row the last turn alone, as its row says."""
    prompt = sum(sum(figures.prompt_tokens) for figures in run.types.values())
    output = sum(sum(figures.output_tokens) for figures in run.types.values())
    rows = run.with_tokens
    return {
        "rows": rows,
        "prompt": prompt,
        "output": output,
        "prompt_per_row": prompt / rows if rows else math.nan,
        "output_per_row": output / rows if rows else math.nan,
    }


def _lost(figures: Mapping[str, Any]) -> float:
    rows: int = figures["kept"] + figures["rejected"]
    return figures["rejected"] / rows if rows else 0.0


def large(count: float) -> str:
    """A large count for people: `1.2 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            return f"{count / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{count:,.0f}"
