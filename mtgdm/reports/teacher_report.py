"""The teacher report: what a teacher's rows and logs say, told as JSON, Markdown, page and charts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.charts.style import Figure
from mtgdm.manifest import Manifest
from mtgdm.reports import lineage, markdown, page
from mtgdm.reports.publish import Report
from mtgdm.reports.teacher_figures import answers_figure, kept_figure, pace_figure
from mtgdm.reports.teacher_pace import Pace
from mtgdm.reports.teacher_run import TeacherRun
from mtgdm.reports.teacher_summary import describe, large
from mtgdm.reports.values import brief, clock, shown
from mtgdm.terminal import counted

QUESTIONS = {
    "kept": (
        "What was kept, and why not the rest?",
        "Rows of each prompt type, and the reasons of rejection.",
    ),
    "answers": (
        "How long and how true are the answers?",
        "Kept answers: their length, and the share of their record's facts that they tell.",
    ),
    "pace": ("Did the teacher keep its pace?", "From the logs, with the pauses between sittings left out."),
}
BY_TYPE = ("type", "#kept", "#rejected", "#median length", "#fact recall", "#unsupported claims", "#repaired")
Cells = list[str]


def teacher_report(
    run: TeacherRun,
    pace: Pace,
    *,
    source: str,
    when: str,
    complete: bool,
    manifests: Sequence[Manifest] = (),
) -> Report:
    """The report of a run; `complete` says whether every row was asked for, as the manifest tells."""
    data = {
        "kind": "teacher",
        "created": when,
        "rows_file": source,
        **describe(run, pace, complete=complete),
        "lineage": [one.model_dump(mode="json") for one in manifests],
    }
    charts: dict[str, Figure] = {"kept": kept_figure(run)}
    narrow = {"kept-narrow": kept_figure(run, narrow=True)}
    if run.kept:
        charts["answers"] = answers_figure(run)
        narrow["answers-narrow"] = answers_figure(run, narrow=True)
    if len(pace):
        charts["pace"] = pace_figure(run, pace)
    title = f"Teacher report · {when}"
    return Report(
        title=title,
        data=data,
        markdown=lambda links: _markdown(title, data, links, manifests),
        body=_body(data, run, manifests, list(charts)),
        charts=charts,
        page_charts=narrow,
    )


def headline(data: Mapping[str, Any]) -> str:
    """The run in one line."""
    teachers = ", ".join(f"{one['backend']} {one['model']}".strip() for one in data["teachers"])
    by = f" · {teachers}" if teachers else ""
    return f"{data['kept']:,} of {data['rows']:,} rows kept ({data['kept_share']:.1%}){by}"


def key_figures(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The figures that matter: label, value, and what stands under it."""
    facts, claims, tokens = (
        data["all_types"]["fact_recall"],
        data["all_types"]["unsupported"],
        data["tokens"],
    )
    figures = [
        ("kept", f"{data['kept']:,}", f"{data['kept_share']:.1%} of {data['rows']:,} rows"),
        ("rejected", f"{data['rejected']:,}", counted(len(data["reasons"]), "reason")),
    ]
    if facts["rows"]:
        figures.append(("fact recall", shown(facts["mean"], 3), f"{facts['rows']:,} rows with facts"))
    if claims["rows"]:
        figures.append(
            (
                "unsupported claims",
                f"{claims['claims']:,}",
                f"in {counted(claims['rows_with_claims'], 'row')} of {claims['rows']:,}",
            )
        )
    length = data["all_types"]["characters"]
    figures.append(("characters an answer", brief(length["p50"]), f"95th percentile {brief(length['p95'])}"))
    if tokens["rows"]:
        figures.append(
            (
                "tokens a kept row",
                f"{brief(tokens['prompt_per_row'])} + {brief(tokens['output_per_row'])}",
                f"{large(tokens['prompt'])} + {large(tokens['output'])} in all",
            )
        )
    if pace := data["pace"]:
        speed = f"{brief(pace['output_tokens_per_s'])} tokens a second" if pace["output_tokens"] else ""
        figures.append(("rows a minute", brief(pace["rows_per_minute"]), speed))
        flight = f", {brief(data['in_flight'])} in flight" if math.isfinite(data["in_flight"]) else ""
        sittings = counted(pace["sittings"], "sitting")
        figures.append(("time worked", clock(pace["seconds_worked"]), f"{sittings}{flight}"))
    return figures


def type_rows(data: Mapping[str, Any]) -> list[Cells]:
    """A row of `BY_TYPE` for each prompt type."""
    return [
        [
            name,
            f"{figures['kept']:,}",
            f"{figures['rejected']:,}",
            brief(figures["characters"]["p50"]),
            shown(figures["fact_recall"]["mean"], 3),
            f"{figures['unsupported']['claims']:,}" if figures["unsupported"]["rows"] else "–",
            f"{figures['repaired']:,}",
        ]
        for name, figures in data["by_type"].items()
    ]


# --- Markdown ------------------------------------------------------------------------------------


def _markdown(
    title: str, data: Mapping[str, Any], links: Mapping[str, str], manifests: Sequence[Manifest]
) -> str:
    lines = [f"# {title}", "", f"**{markdown.escape(headline(data))}**", ""]
    lines += [f"- {markdown.escape(one)}" for one in data["findings"]]
    figures = [[markdown.escape(cell) for cell in row] for row in key_figures(data)]
    lines += ["", *markdown.table(["", "#", ""], figures), "", "## By type", ""]
    lines += markdown.table(BY_TYPE, [[markdown.escape(cell) for cell in row] for row in type_rows(data)])
    for name, link in links.items():
        question, lead = QUESTIONS[name]
        lines += ["", f"## {question}", "", lead, "", f"![{question}]({link})"]
    if data["reasons"]:
        rows = [[markdown.escape(reason), f"{count:,}"] for reason, count in data["reasons"].items()]
        lines += ["", "## Reasons of rejection", "", *markdown.table(["reason", "#rows"], rows)]
    if data["most_unsupported"]:
        claimed = [[markdown.escape(cell) for cell in row] for row in _claims(data)]
        lines += ["", "## Most unsupported claims", "", *markdown.table(["spot", "type", "claims"], claimed)]
    notes = [f"- {markdown.escape(note)}" for note in data["notes"]]
    lines += ["", "## Notes", "", *notes] if notes else []
    lines += ["", *lineage.in_markdown(manifests), f"Made from {markdown.code(data['rows_file'])}.", ""]
    return "\n".join(lines)


# --- the page ------------------------------------------------------------------------------------


def _body(
    data: Mapping[str, Any], run: TeacherRun, manifests: Sequence[Manifest], charts: Sequence[str]
) -> list[str]:
    pill = ("complete", "good") if data["complete"] else ("not complete", "warn")
    body = [
        page.header(
            f"mtgdm teacher report · {data['created']}", headline(data), pill=pill, lines=data["findings"]
        ),
        page.cards(key_figures(data)),
        page.section(
            "By type", "", page.table(BY_TYPE, [list(map(page.escape, row)) for row in type_rows(data)])
        ),
    ]
    body += [page.chart(name, *QUESTIONS[name]) for name in charts]
    if data["reasons"]:
        body.append(_reasons_section(data, run))
    if data["most_unsupported"]:
        rows = [list(map(page.escape, row)) for row in _claims(data)]
        lead = "Kept all the same, unless --max-unsupported says otherwise."
        body.append(
            page.section("Most unsupported claims", lead, page.table(["spot", "type", "claims"], rows))
        )
    body.append(page.lineage(manifests))
    if data["notes"]:
        items = "".join(f"<li>{page.escape(note)}</li>" for note in data["notes"])
        body.append(page.section("Notes", "", f"<ul>{items}</ul>"))
    body.append(f"<footer>Made from <code>{page.escape(data['rows_file'])}</code>.</footer>")
    return body


def _reasons_section(data: Mapping[str, Any], run: TeacherRun) -> str:
    """Every reason, with a row that shows it where one was kept in mind."""
    parts = []
    for reason, count in data["reasons"].items():
        summary = f'<span class="pill">{count:,}</span> {page.escape(reason)}'
        example = run.examples.get(reason)
        if example is None:
            parts.append(f"<p>{summary}</p>")
            continue
        what = f"{example.spot} · {example.type} · {example.id}"
        about = f'<p>{page.escape(example.reason)}</p><p class="soft">{page.escape(what)}</p>'
        parts.append(page.details(summary, about, f"<pre>{page.escape(example.text or '(no text)')}</pre>"))
    lead = "Figures and quoted words are left out, so that like counts with like; open one for an example."
    return page.section("Reasons of rejection", lead, *parts)


# --- words ---------------------------------------------------------------------------------------


def _claims(data: Mapping[str, Any]) -> list[Cells]:
    return [
        [one["spot"] or one["id"], one["type"], f"{one['unsupported']:,}: {', '.join(one['claims'])}"]
        for one in data["most_unsupported"]
    ]
