"""What an evaluation comes to in words and tables, as Markdown, page and terminal show it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mtgdm.reports.evaluation import METRICS, Metric, label
from mtgdm.reports.values import brief, shown, span
from mtgdm.terminal import counted

SPEEDS = (
    ("latency_s", "seconds a row"),
    ("tokens_per_s", "tokens a second"),
    ("output_tokens", "output tokens"),
    ("prompt_tokens", "prompt tokens"),
    ("length_ratio", "length, the reference's is 1"),
)
SIGNS = {"better": " ↑", "worse": " ↓", "too few rows to tell": ""}
"""Behind the means of a group: whether the student is better or worse than its base there."""
BY_PROVINCE = ("char_f1", "contract_valid", "fact_recall", "unsupported_facts")
PROVINCES_SHOWN = 12
IN_SHORT = (
    "char_f1",
    "exact_match",
    "contract_valid",
    "prose_valid",
    "language_ok",
    "fact_recall",
    "unsupported_facts",
)
"""What the terminal shows: of the measures of likeness one is enough."""
REASONS_IN_SHORT = 3
WHO = ("base", "student", "teacher")
SIGNS_MEAN = "The student's means, the base's before the arrow. Told apart from its base: ↑ better, ↓ worse."


def headline(data: Mapping[str, Any]) -> str:
    """The evaluation in one line, what takes its worth away first."""
    return f"{_but(data)}{_outcome(data)}"


def _but(data: Mapping[str, Any]) -> str:
    parts = []
    if not data["complete"]:
        parts.append(f"not complete, {data['rows']:,} of {data['planned_rows']:,} rows")
    if data["leaked_rows"]:
        parts.append(f"trained on spots of {data['leaked_rows']:,} of {counted(data['rows'], 'row')}")
    return f"{' and '.join(parts)}: " if parts else ""


def _outcome(data: Mapping[str, Any]) -> str:
    of = counted(data["rows"], "row") + (f", {counted(data['spots'], 'spot')}" if data["spots"] else "")
    now, before = (_figure(data, who, "char_f1") for who in ("student", "base"))
    difference = data["difference"]
    if not difference:
        return f"student alone ({of})" + (f": char_f1 {now['mean']:.2f}" if now else "")
    gain = f": char_f1 {before['mean']:.2f} → {now['mean']:.2f}" if before and now else ""
    better, worse = len(data["verdict"]["better"]), len(data["verdict"]["worse"])
    if not better and not worse:
        return f"too few rows to tell the student from its base ({of}){gain}"
    if not better:
        return f"student is worse than its base on {worse} of {len(difference)} metrics ({of}){gain}"
    lost = f", is worse on {worse}" if worse else ""
    return f"student beats its base on {better} of {len(difference)} metrics{lost} ({of}){gain}"


def standing(data: Mapping[str, Any]) -> tuple[str, str]:
    """The verdict in a word or two, and its tone: `good`, `bad`, `warn`, `info`, or empty."""
    better, worse = data["verdict"]["better"], data["verdict"]["worse"]
    if data["leaked_rows"]:
        return "tells little: the student was trained on spots of these rows", "bad"
    if not data["complete"]:
        return "not complete", "warn"
    if not data["difference"]:
        return "no base to compare with", "info"
    if better and worse:
        return "better than its base, and worse", "warn"
    if better:
        return "better than its base", "good"
    return ("worse than its base", "bad") if worse else ("too few rows to tell", "")


def comparison(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table base against student: metric, base, student, teacher, difference to the base, verdict."""
    base, teacher, difference = data["base"] or {}, data["teacher"] or {}, data["difference"] or {}
    rows: list[tuple[str, ...]] = []
    for metric in present(data):
        gain = difference.get(metric.key)
        rows.append(
            (
                metric.label,
                _mean(base.get(metric.key)),
                _mean(data["student"][metric.key]),
                _mean(teacher.get(metric.key)),
                _signed(gain) if gain else "–",
                gain["verdict"] if gain else "–",
            )
        )
    return rows


def short_comparison(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The same for a terminal of 80 columns, the interval beside the student alone."""
    rows: list[tuple[str, ...]] = []
    for metric in present(data):
        if metric.key not in IN_SHORT:
            continue
        base, student, teacher = [
            shown(one["mean"]) if (one := _figure(data, who, metric.key)) else "–" for who in WHO
        ]
        gain = (data["difference"] or {}).get(metric.key)
        interval = span(data["student"][metric.key]["ci95"])
        rows.append((metric.label, base, student, interval, teacher, gain["verdict"] if gain else "–"))
    return rows


def against_teacher(data: Mapping[str, Any]) -> str | None:
    """How far the student is from its teacher, in a sentence; None where the metrics do not say."""
    differences = data["teacher_difference"]
    if not differences:
        return None
    groups = {"better": "better than its teacher on", "worse": "behind its teacher on"}
    parts = []
    for verdict, words in groups.items():
        found = [
            f"{label(key)} {_signed(gain)}" for key, gain in differences.items() if gain["verdict"] == verdict
        ]
        if found:
            parts.append(f"{words} {', '.join(found)}")
    unclear = [label(key) for key, gain in differences.items() if gain["verdict"] not in groups]
    if unclear:
        parts.append(f"no difference to its teacher can be told on {', '.join(unclear)}")
    return "; ".join(parts)


def judged(data: Mapping[str, Any]) -> str | None:
    """What the judge said, in a sentence; None where none was asked."""
    found = data["judge"]
    if not found:
        return None
    first = found["first_preferred"]
    bias = "" if first is None else f", the answer shown first was preferred in {first:.0%} of the verdicts"
    by, against = (" and ".join(found[key]) for key in ("by", "against"))
    return (
        f"{by} preferred the student to its {against} in {found['won']:,} of {counted(found['pairs'], 'pair')}, "
        f"{found['ties']:,} ties, {found['lost']:,} lost: score {_mean(found['score'])}, {found['verdict']}; "
        f"both orders agree on {found['same_in_both_orders']:.0%}{bias}"
    )


def failing(data: Mapping[str, Any]) -> str:
    """How many answers have something wrong, and what most often, in a sentence."""
    failures = data["failures"]
    if not failures["rows"]:
        return f"no answer of {data['rows']:,} has anything wrong"
    reasons = list(failures["reasons"].items())
    most = ", ".join(f"{count:,} × {reason}" for reason, count in reasons[:REASONS_IN_SHORT])
    more = (
        f", and {len(reasons) - REASONS_IN_SHORT} more reasons" if len(reasons) > REASONS_IN_SHORT + 1 else ""
    )
    return f"{failures['rows']:,} of {counted(data['rows'], 'answer')} with something wrong: {most}{more}"


def speed(data: Mapping[str, Any]) -> str | None:
    """How fast the student is, in a sentence; None where the metrics do not say."""
    student = data["student"]
    parts = []
    if "latency_s" in student:
        latency = student["latency_s"]
        shares = f", in batches of up to {data['batch_rows']}" if data["batch_rows"] else ""
        parts.append(f"{brief(latency['p50'])} s a row (p95 {brief(latency['p95'])}{shares})")
    if "tokens_per_s" in student:
        parts.append(f"{brief(student['tokens_per_s']['mean'])} tokens a second")
    if "output_tokens" in student:
        parts.append(f"{brief(student['output_tokens']['mean'])} tokens an answer")
    return ", ".join(parts) or None


def speeds(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of speeds: what, then mean, p50 and p95 of the base and of the student."""
    rows = []
    for key, name in SPEEDS:
        figures = [(data[who] or {}).get(key) for who in ("base", "student")]
        if any(figures):
            cells = [
                brief(one[figure]) if one else "–" for one in figures for figure in ("mean", "p50", "p95")
            ]
            rows.append((name, *cells))
    return rows


def cards(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that matter: label, value, and what stands under it."""
    student, base = data["student"], data["base"] or {}
    figures = [("rows", f"{data['rows']:,}", counted(data["spots"], "spot"))]
    for key in ("char_f1", "contract_valid", "fact_recall"):
        if key in student:
            before = f"{base[key]['mean']:.2f} → " if key in base else ""
            bounds = span(student[key]["ci95"])
            figures.append(
                (label(key), f"{before}{student[key]['mean']:.2f}", f"95 %: {bounds}" if bounds else "")
            )
    if "latency_s" in student:
        latency = student["latency_s"]
        size = data["batch_rows"]
        under = (
            f"of batches of up to {size} rows" if size else f"95 % of rows within {brief(latency['p95'])} s"
        )
        figures.append(("seconds a row" if size else "latency, median", f"{brief(latency['p50'])} s", under))
    if "tokens_per_s" in student:
        pace = student["tokens_per_s"]
        figures.append(("tokens a second", brief(pace["mean"]), f"median {brief(pace['p50'])}"))
    return figures


def contract_keys(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The keys of the contracts that answers break: key, and how often the base and the student do."""
    student, base = data["failures"]["contract_keys"], data["failures"]["base_contract_keys"]
    order = sorted({*student, *base}, key=lambda key: (-student.get(key, 0), -base.get(key, 0), key))
    return [
        (key, f"{base.get(key, 0):,}" if data["base"] else "–", f"{student.get(key, 0):,}") for key in order
    ]


def about(data: Mapping[str, Any]) -> list[str]:
    """What the headline rests on: the rows, the model, and the metrics behind each verdict."""
    of = f" of {counted(data['spots'], 'spot')}" if data["spots"] else ""
    lines = [*data["notes"]] if data["leaked_rows"] else []
    lines.append(counted(data["rows"], "row") + of + (f" · student {data['model']}" if data["model"] else ""))
    for name, key in (("better", "better"), ("worse", "worse"), ("too few rows to tell", "unclear")):
        if data["verdict"][key]:
            lines.append(f"{name}: {', '.join(label(metric) for metric in data['verdict'][key])}")
    lines += [line for line in (against_teacher(data), judged(data)) if line]
    return [*lines, failing(data)]


def by_type(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table by prompt type: metric, then the figure of each type."""
    rows: list[tuple[str, ...]] = [("rows", *(f"{one['rows']:,}" for one in data["by_type"].values()))]
    for metric in present(data):
        rows.append((metric.label, *(_of_group(one, metric.key) for one in data["by_type"].values())))
    return rows


def by_province(data: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows of the provinces with most rows."""
    keys = [key for key in BY_PROVINCE if key in data["student"]]
    rows = [
        (name, f"{one['rows']:,}", f"{one['spots']:,}", *(_of_group(one, key) for key in keys))
        for name, one in list(data["by_province"].items())[:PROVINCES_SHOWN]
    ]
    return ["province", "rows", "spots", *map(label, keys)], rows


def provinces_lead(data: Mapping[str, Any]) -> str:
    """What the table by province shows, and how far it can be believed."""
    more = len(data["by_province"]) - PROVINCES_SHOWN
    left = f" The {PROVINCES_SHOWN} with most rows; {more} more stand in the JSON." if more > 0 else ""
    return f"{SIGNS_MEAN}{left} Among many groups one in twenty is told apart by chance."


def title(data: Mapping[str, Any]) -> str:
    """The headline without its figures."""
    if not data["difference"]:
        return sentence(f"{_but(data)}student evaluated on its own")
    return sentence(_but(data) + _outcome(data).split(" (")[0])


def present(data: Mapping[str, Any]) -> list[Metric]:
    """The metrics of the student, in their order."""
    return [metric for metric in METRICS if metric.key in data["student"]]


def sentence(text: str) -> str:
    """A text with a capital at its start."""
    return text[:1].upper() + text[1:]


def _figure(data: Mapping[str, Any], who: str, key: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = (data[who] or {}).get(key)
    return found


def _of_group(group: Mapping[str, Any], key: str) -> str:
    """The base's mean, the student's, and a sign where the rows tell which is better."""
    now, before = group["student"].get(key), (group["base"] or {}).get(key)
    if not now:
        return "–"
    gain = (group["difference"] or {}).get(key)
    arrow = f"{before['mean']:.2f} → " if before else ""
    return f"{arrow}{now['mean']:.2f}{SIGNS[gain['verdict']] if gain else ''}"


def _mean(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "–"
    bounds = span(figures["ci95"])
    return f"{shown(figures['mean'])} ({bounds})" if bounds else shown(figures["mean"])


def _signed(figures: Mapping[str, Any]) -> str:
    mean, (low, high) = figures["mean"], figures["ci95"]
    text = f"{mean:+.2f}"
    if math.isfinite(low) and math.isfinite(high):
        text += f" ({low:+.2f} to {high:+.2f})"
    return text.replace("-", "−")
