"""The eval report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.manifest import Manifest
from mtgdm.reports import lineage
from mtgdm.reports.evaluation_words import (
    SIGNS_MEAN,
    about,
    by_province,
    by_type,
    comparison,
    contract_keys,
    headline,
    present,
    provinces_lead,
    sentence,
    speeds,
)
from mtgdm.reports.markdown import code, escape, table
from mtgdm.reports.values import shown
from mtgdm.terminal import counted


def in_markdown(
    title: str,
    data: Mapping[str, Any],
    made: Sequence[Manifest],
    questions: Mapping[str, tuple[str, str]],
    links: Mapping[str, str],
) -> str:
    """The whole report; `links` are those of the charts that were drawn, `questions` what they answer."""

    def picture(name: str) -> list[str]:
        return [f"![{questions[name][0]}]({links[name]})", ""] if name in links else []

    lines = [f"# {title}", "", f"**{escape(sentence(headline(data)))}**", ""]
    lines += [*(f"- {escape(line)}" for line in about(data)), ""]
    columns = [
        "metric",
        "base (95 % interval)",
        "student (95 % interval)",
        "teacher",
        "student − base",
        "verdict",
    ]
    lines += [*table(columns, comparison(data)), ""]
    lines += [*(f"- **{metric.label}**: {metric.meaning}" for metric in present(data)), ""]
    lines += picture("quality")
    lines += [*_failures(data), *_groups(data)]
    columns = ["", "#base mean", "#p50", "#p95", "#student mean", "#p50", "#p95"]
    lines += ["## Speed", "", *table(columns, speeds(data)), "", *picture("runtime")]
    lines += lineage.in_markdown(made)
    if data["notes"]:
        lines += ["## Notes", "", *(f"- {escape(note)}" for note in data["notes"]), ""]
    return "\n".join([*lines, f"Made from {code(data['metrics_file'])}.", ""])


def _failures(data: Mapping[str, Any]) -> list[str]:
    if not data["worst_rows"]:
        return []
    of = f"{counted(data['failures']['rows'], 'row')} of {data['rows']:,}"
    lines = ["## Where it fails", "", f"{of} have something wrong:", ""]
    lines += [f"- {count:,} × {escape(reason)}" for reason, count in data["failures"]["reasons"].items()]
    keys = contract_keys(data)
    if keys:
        rows = [(code(key), base, student) for key, base, student in keys]
        lines += ["", "Keys of the contracts that answers break first:", ""]
        lines += table(["key", "#base", "#student"], rows)
    worst = [
        (
            escape(row["spot"] or "–"),
            escape(row["type"]),
            shown(row["char_f1"]),
            escape(", ".join(row["why"])),
            code(row["id"]),
        )
        for row in data["worst_rows"]
    ]
    return [*lines, "", *table(["spot", "type", "#character F1", "why", "row"], worst), ""]


def _groups(data: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    if len(data["by_type"]) > 1:
        columns = ["student", *map(escape, data["by_type"])]
        lines += ["## By prompt type", "", SIGNS_MEAN, "", *table(columns, by_type(data)), ""]
    if len(data["by_province"]) > 1:
        columns, rows = by_province(data)
        cells = [tuple(map(escape, row)) for row in rows]
        lines += ["## By province", "", provinces_lead(data), "", *table(columns, cells), ""]
    return lines
