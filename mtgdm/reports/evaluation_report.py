"""The eval report: what `evaluation` found, told as JSON, Markdown, page and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtgdm.errors import BadRow
from mtgdm.reports import page
from mtgdm.reports.evaluation import METRICS, EvalRow, Evaluation, Metric, describe, label, why_bad, worst
from mtgdm.reports.evaluation_figures import quality_figure, runtime_figure
from mtgdm.reports.publish import Report
from mtgdm.reports.values import brief, counted, shown, span
from mtgdm.rows import read_rows

QUESTIONS = {
    "quality": (
        "How good are the answers?",
        "Means with their 95 % intervals. Rows of one spot rise and fall together, so whole spots are resampled.",
    ),
    "runtime": ("How fast do they come?", "Latency, throughput and length of the answers, row by row."),
}
SPEEDS = (
    ("latency_s", "seconds a row"),
    ("tokens_per_s", "tokens a second"),
    ("output_tokens", "output tokens"),
    ("prompt_tokens", "prompt tokens"),
    ("length_ratio", "length, the reference's is 1"),
)
TONES = {"better": "good", "worse": "bad", "too few rows to tell": ""}
SIGNS = {"better": " ↑", "worse": " ↓", "too few rows to tell": ""}
"""Behind the means of a group: whether the student is better or worse than its base there."""
BY_PROVINCE = ("char_f1", "contract_valid", "fact_recall", "unsupported_facts")
PROVINCES_SHOWN = 12
WORST_SHOWN = 8
TYPICAL_SHOWN = 4
WHO = ("base", "student", "teacher")
SIGNS_MEAN = "The student's means, the base's before the arrow. Told apart from its base: ↑ better, ↓ worse."


@dataclass(frozen=True)
class Example:
    """The texts of one evaluated row, and the model that wrote its output."""

    prompt: str
    reference: str
    output: str
    base_output: str | None
    model: str | None


def evaluation_report(
    evaluation: Evaluation, *, source: str, outputs: Path, leaked: int, when: str
) -> Report:
    """The report of one evaluation.

    Texts of rows, and the name of the model, come from `outputs` where it holds the same rows. `leaked`
    is how many rows are about spots the student was trained on.
    """
    bad = worst(evaluation.rows, WORST_SHOWN)
    typical = _typical(evaluation, {row.id for row in bad})
    found = _texts(outputs, [*bad, *typical])
    if leaked:
        evaluation.notes.insert(
            0,
            f"{counted(leaked, 'row')} of {len(evaluation.rows):,} are about spots the student was trained on: "
            "the figures say little about spots it does not know",
        )
    if evaluation.refused:
        evaluation.notes.append(
            f"{counted(evaluation.refused, 'row')} could not be asked and stand in no figure"
        )
    model = " and ".join(evaluation.models) or next((one.model for one in found.values()), None)
    data = {
        "kind": "eval",
        "created": when,
        "model": model,
        "metrics_file": source,
        "leaked_rows": leaked,
        "refused_rows": evaluation.refused,
        **describe(evaluation),
    }
    title = f"Eval report · {when}"
    return Report(
        title=title,
        data=data,
        markdown=lambda links: _markdown(title, data, links),
        body=_body(data, source, when, _examples(data, bad, typical, found)),
        charts={"quality": quality_figure(evaluation), "runtime": runtime_figure(evaluation)},
        page_charts={
            "quality-narrow": quality_figure(evaluation, narrow=True),
            "runtime-narrow": runtime_figure(evaluation, narrow=True),
        },
    )


def headline(data: Mapping[str, Any]) -> str:
    """The evaluation in one line."""
    of = counted(data["rows"], "row") + (f", {counted(data['spots'], 'spot')}" if data["spots"] else "")
    student, base, difference = data["student"], data["base"] or {}, data["difference"]
    if "char_f1" not in student:
        return f"student evaluated on {of}"
    now = student["char_f1"]["mean"]
    if not difference:
        return f"student alone ({of}): char_f1 {now:.2f}"
    better, worse = len(data["verdict"]["better"]), len(data["verdict"]["worse"])
    gain = f": char_f1 {base['char_f1']['mean']:.2f} → {now:.2f}" if "char_f1" in base else ""
    if not better and not worse:
        return f"too few rows to tell the student from its base ({of}){gain}"
    lost = f", is worse on {worse}" if worse else ""
    return f"student beats its base on {better} of {len(difference)} metrics{lost} ({of}){gain}"


def comparison(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table base against student: metric, base, student, teacher, difference to the base, verdict."""
    base, teacher, difference = data["base"] or {}, data["teacher"] or {}, data["difference"] or {}
    rows: list[tuple[str, ...]] = []
    for metric in _present(data):
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
    for metric in _present(data):
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


def _figure(data: Mapping[str, Any], who: str, key: str) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = (data[who] or {}).get(key)
    return found


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


def _markdown(title: str, data: Mapping[str, Any], links: Mapping[str, str]) -> str:
    lines = [
        f"# {title}",
        "",
        f"**{_sentence(headline(data))}**",
        "",
        *(f"- {line}" for line in _about(data)),
        "",
    ]
    lines += [
        "| metric | base (95 % interval) | student (95 % interval) | teacher | student − base | verdict |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in comparison(data)]
    lines += ["", *(f"- **{metric.label}**: {metric.meaning}" for metric in _present(data)), ""]
    if data["worst_rows"]:
        lines += [
            "## Where it fails",
            "",
            f"{counted(data['failures']['rows'], 'row')} of {data['rows']:,} have something wrong:",
            "",
            *(f"- {count:,} × {reason}" for reason, count in data["failures"]["reasons"].items()),
            "",
            "| spot | type | character F1 | why | row |",
            "|---|---|---:|---|---|",
        ]
        lines += [
            f"| {_cell(row['spot'] or '–')} | {_cell(row['type'])} | {shown(row['char_f1'])} "
            f"| {_cell(', '.join(row['why']))} | `{row['id']}` |"
            for row in data["worst_rows"]
        ]
        lines += [""]
    lines += _picture("quality", links)
    if len(data["by_type"]) > 1:
        names = list(data["by_type"])
        lines += ["## By prompt type", "", SIGNS_MEAN, "", f"| student | {' | '.join(map(_cell, names))} |"]
        lines += [f"|---|{'---|' * len(names)}"]
        lines += [f"| {' | '.join(row)} |" for row in _by_type(data)]
        lines += [""]
    if len(data["by_province"]) > 1:
        columns, cells = _by_province(data)
        lines += ["## By province", "", _provinces_lead(data), "", f"| {' | '.join(columns)} |"]
        lines += [f"|---|{'---|' * (len(columns) - 1)}"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in cells]
        lines += [""]
    lines += ["## Speed", "", "| | base mean | p50 | p95 | student mean | p50 | p95 |", "|---|" + "---:|" * 6]
    lines += [f"| {' | '.join(row)} |" for row in speeds(data)]
    lines += ["", *_picture("runtime", links)]
    if data["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in data["notes"]), ""]
    return "\n".join([*lines, f"Made from `{data['metrics_file']}`.", ""])


def _body(data: Mapping[str, Any], source: str, when: str, examples: Sequence[str]) -> list[str]:
    kicker = f"mtgdm eval report · {when}" + (f" · {data['model']}" if data["model"] else "")
    body = [page.header(kicker, _title(data), lines=_about(data)), page.cards(_cards(data))]
    rows = [
        (
            f"{page.escape(metric)}<br><small class='meaning'>{page.escape(meaning.meaning)}</small>",
            *map(_spanned, cells),
            page.tagged(verdict, TONES.get(verdict, "")) if verdict != "–" else "–",
        )
        for (metric, *cells, verdict), meaning in zip(comparison(data), _present(data), strict=True)
    ]
    columns = ["metric", "base", "student", "teacher", "student − base", "verdict"]
    lead = "Means over the rows, with 95 % intervals; the difference is taken row by row."
    body.append(page.section("Base against student", lead, page.table(columns, rows)))
    body += examples[:1]
    body.append(page.chart("quality", *QUESTIONS["quality"]))
    if len(data["by_type"]) > 1:
        cells = [tuple(page.escape(cell) for cell in row) for row in _by_type(data)]
        columns = ["metric", *(f"#{name}" for name in data["by_type"])]
        body.append(page.section("By prompt type", SIGNS_MEAN, page.table(columns, cells)))
    if len(data["by_province"]) > 1:
        columns, provinces = _by_province(data)
        cells = [tuple(page.escape(cell) for cell in row) for row in provinces]
        names = [columns[0], *(f"#{name}" for name in columns[1:])]
        body.append(page.section("By province", _provinces_lead(data), page.table(names, cells)))
    body.append(page.chart("runtime", *QUESTIONS["runtime"]))
    columns = ["", "#base mean", "#p50", "#p95", "#student mean", "#p50", "#p95"]
    cells = [tuple(page.escape(cell) for cell in row) for row in speeds(data)]
    body.append(page.section("Speed and length in figures", "", page.table(columns, cells)))
    body += examples[1:]
    if data["notes"]:
        items = "".join(f"<li>{page.escape(note)}</li>" for note in data["notes"])
        body.append(page.section("Notes", "", f"<ul>{items}</ul>"))
    body.append(f"<footer>Made from <code>{page.escape(source)}</code>.</footer>")
    return body


def _examples(
    data: Mapping[str, Any], bad: Sequence[EvalRow], typical: Sequence[EvalRow], found: Mapping[str, Example]
) -> list[str]:
    """The rows to look at: the worst, then typical ones, with their texts where they are at hand; may be empty."""
    failed = fine = ""
    if bad:
        reasons = "".join(
            f"<li>{count:,} × {page.escape(reason)}</li>"
            for reason, count in data["failures"]["reasons"].items()
        )
        of = f"{counted(data['failures']['rows'], 'row')} of {data['rows']:,}"
        lead = f"{of} have something wrong; these are the worst. Marked is what leaves the reference."
        rows = (_example(row, found.get(row.id)) for row in bad)
        failed = page.section("Where it fails", lead, f"<ul>{reasons}</ul>", *rows)
    if typical and found:
        lead = "Rows in the middle of the field, one of each prompt type."
        fine = page.section("Typical answers", lead, *(_example(row, found.get(row.id)) for row in typical))
    return [failed, fine]


def _example(row: EvalRow, texts: Example | None) -> str:
    why = "".join(page.tagged(reason, "warn") for reason in why_bad(row))
    summary = (
        f"<b>{page.escape(row.spot or row.id)}</b> <span class='soft'>{page.escape(row.type)} · "
        f"character F1 {shown(row.student.get('char_f1'))}</span>{why}"
    )
    if texts is None:
        return page.details(summary, f"<p class='soft'>row <code>{page.escape(row.id)}</code></p>")
    blocks = [
        ("reference (teacher)", page.escape(texts.reference), False),
        ("student", page.marked(texts.output, texts.reference), False),
    ]
    if texts.base_output is not None:
        blocks.append(("base", page.escape(texts.base_output), True))
    return page.details(summary, page.texts([*blocks, ("prompt", page.escape(texts.prompt), True)]))


def _typical(evaluation: Evaluation, taken: set[str]) -> list[EvalRow]:
    """The row with the middle character F1 of each prompt type."""
    rows = []
    for name in evaluation.types[:TYPICAL_SHOWN]:
        field = sorted(evaluation.of_type(name), key=lambda row: row.student.get("char_f1") or 0.0)
        middle = field[len(field) // 2]
        if middle.id not in taken:
            rows.append(middle)
    return rows


def _texts(outputs: Path, rows: Sequence[EvalRow]) -> dict[str, Example]:
    """The texts of these rows, from a file of eval rows; a row whose metrics differ is of another run."""
    if not outputs.is_file():
        return {}
    wanted = {row.id: row for row in rows}
    found: dict[str, Example] = {}
    with suppress(BadRow):  # a kill cut the last line off: what stands before it counts
        for row in read_rows(outputs):
            identity = row.rest.get("given_id", row.id)  # as the metrics name it
            asked = wanted.get(identity)
            output, metrics = row.rest.get("output"), row.rest.get("metrics")
            if asked is None or not isinstance(output, str) or metrics != asked.student:
                continue
            base = row.rest.get("base_output")
            model = (row.meta.get("eval") or {}).get("model")
            found[identity] = Example(
                prompt="\n\n".join(message["content"] for message in row.prompt),
                reference=str(row.rest.get("reference") or ""),
                output=output,
                base_output=base if isinstance(base, str) else None,
                model=model if isinstance(model, str) else None,
            )
    return found


def _cards(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    student, base = data["student"], data["base"] or {}
    cards = [("rows", f"{data['rows']:,}", counted(data["spots"], "spot"))]
    for key in ("char_f1", "contract_valid", "fact_recall"):
        if key in student:
            before = f"{base[key]['mean']:.2f} → " if key in base else ""
            label = next(metric.label for metric in METRICS if metric.key == key)
            bounds = span(student[key]["ci95"])
            cards.append((label, f"{before}{student[key]['mean']:.2f}", f"95 %: {bounds}" if bounds else ""))
    if "latency_s" in student:
        latency = student["latency_s"]
        cards.append(
            (
                "latency, median",
                f"{brief(latency['p50'])} s",
                f"95 % of rows within {brief(latency['p95'])} s",
            )
        )
    if "tokens_per_s" in student:
        speed = student["tokens_per_s"]
        cards.append(("tokens a second", brief(speed["mean"]), f"median {brief(speed['p50'])}"))
    return cards


def _about(data: Mapping[str, Any]) -> list[str]:
    """What the headline rests on: the rows, the model, and the metrics behind each verdict."""
    of = f" of {counted(data['spots'], 'spot')}" if data["spots"] else ""
    lines = [*data["notes"]] if data["leaked_rows"] else []
    lines.append(counted(data["rows"], "row") + of + (f" · student {data['model']}" if data["model"] else ""))
    for name, key in (("better", "better"), ("worse", "worse"), ("too few rows to tell", "unclear")):
        if data["verdict"][key]:
            lines.append(f"{name}: {', '.join(label(metric) for metric in data['verdict'][key])}")
    return [*lines, *(line for line in (against_teacher(data), judged(data)) if line)]


def _by_type(data: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("rows", *(f"{one['rows']:,}" for one in data["by_type"].values()))]
    for metric in _present(data):
        rows.append((metric.label, *(_of_group(one, metric.key) for one in data["by_type"].values())))
    return rows


def _by_province(data: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Columns and rows of the provinces with most rows."""
    keys = [key for key in BY_PROVINCE if key in data["student"]]
    rows = [
        (name, f"{one['rows']:,}", f"{one['spots']:,}", *(_of_group(one, key) for key in keys))
        for name, one in list(data["by_province"].items())[:PROVINCES_SHOWN]
    ]
    return ["province", "rows", "spots", *map(label, keys)], rows


def _provinces_lead(data: Mapping[str, Any]) -> str:
    more = len(data["by_province"]) - PROVINCES_SHOWN
    left = f" The {PROVINCES_SHOWN} with most rows; {more} more stand in the JSON." if more > 0 else ""
    return f"{SIGNS_MEAN}{left} Among many groups one in twenty is told apart by chance."


def _of_group(group: Mapping[str, Any], key: str) -> str:
    """The base's mean, the student's, and a sign where the rows tell which is better."""
    now, before = group["student"].get(key), (group["base"] or {}).get(key)
    if not now:
        return "–"
    gain = (group["difference"] or {}).get(key)
    arrow = f"{before['mean']:.2f} → " if before else ""
    return f"{arrow}{now['mean']:.2f}{SIGNS[gain['verdict']] if gain else ''}"


def _title(data: Mapping[str, Any]) -> str:
    if not data["difference"]:
        return "Student evaluated on its own"
    sentence = headline(data).split(" (")[0]
    return sentence[0].upper() + sentence[1:]


def _present(data: Mapping[str, Any]) -> list[Metric]:
    return [metric for metric in METRICS if metric.key in data["student"]]


def _picture(name: str, links: Mapping[str, str]) -> list[str]:
    return [f"![{QUESTIONS[name][0]}]({links[name]})", ""] if name in links else []


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


def _spanned(cell: str) -> str:
    """`0.79 (0.69 to 0.88)` with the interval small."""
    mean, bracket, bounds = cell.partition(" (")
    return f"{page.escape(mean)} <small>({page.escape(bounds)}</small>" if bracket else page.escape(mean)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
