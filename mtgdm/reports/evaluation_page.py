"""The eval report as a page: the verdict first, then what fails with every row to look at, then the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.manifest import Manifest
from mtgdm.reports import page
from mtgdm.reports.evaluation_rows import RowsOfPage
from mtgdm.reports.evaluation_words import (
    SIGNS_MEAN,
    about,
    by_province,
    by_type,
    cards,
    comparison,
    contract_keys,
    present,
    provinces_lead,
    speeds,
    standing,
    title,
)
from mtgdm.terminal import counted

TONES = {"better": "good", "worse": "bad", "too few rows to tell": ""}
REASONS_SHOWN = 12


def body(
    data: Mapping[str, Any],
    rows: RowsOfPage,
    made: Sequence[Manifest],
    questions: Mapping[str, tuple[str, str]],
    *,
    when: str,
    outputs: str,
) -> list[str]:
    """The sections of the page; `outputs` is how the file with the texts of all rows is called."""
    kicker = f"mtgdm eval report · {when}" + (f" · {data['model']}" if data["model"] else "")
    sections = [
        page.header(kicker, title(data), pill=standing(data), lines=about(data)),
        page.cards(cards(data)),
        _comparison(data),
        page.chart("quality", *questions["quality"]),
        _failures(data),
        page.row_browser("Every row", _browser_lead(rows, outputs), rows.json),
        *_groups(data),
        page.chart("runtime", *questions["runtime"]),
        _speeds(data),
        page.lineage(made),
    ]
    if data["notes"]:
        items = "".join(f"<li>{page.escape(note)}</li>" for note in data["notes"])
        sections.append(page.section("Notes", "", f"<ul>{items}</ul>"))
    sections.append(f"<footer>Made from <code>{page.escape(data['metrics_file'])}</code>.</footer>")
    return sections


def _comparison(data: Mapping[str, Any]) -> str:
    rows = [
        (
            f"{page.escape(metric)}<br><small class='meaning'>{page.escape(meaning.meaning)}</small>",
            *map(_spanned, cells),
            page.tagged(verdict, TONES.get(verdict, "")) if verdict != "–" else "–",
        )
        for (metric, *cells, verdict), meaning in zip(comparison(data), present(data), strict=True)
    ]
    if not rows:
        return ""
    columns = ["metric", "base", "student", "teacher", "student − base", "verdict"]
    lead = "Means over the rows, with 95 % intervals; the difference is taken row by row."
    return page.section("Base against student", lead, page.table(columns, rows))


def _failures(data: Mapping[str, Any]) -> str:
    """What goes wrong, by reason and by the key of the contract; nothing where nothing does."""
    failures = data["failures"]
    if not failures["rows"] and not failures["base_contract_keys"]:
        return ""
    reasons = list(failures["reasons"].items())
    items = "".join(
        f"<li>{count:,} × {page.escape(reason)}</li>" for reason, count in reasons[:REASONS_SHOWN]
    )
    if len(reasons) > REASONS_SHOWN:
        items += f"<li class='soft'>{len(reasons) - REASONS_SHOWN} more reasons stand in the JSON</li>"
    parts = [f"<ul>{items}</ul>"]
    keys = [(f"<code>{page.escape(key)}</code>", base, student) for key, base, student in contract_keys(data)]
    if keys:
        parts.append(page.table(["contract key that breaks first", "#base", "#student"], keys))
    lead = f"{counted(failures['rows'], 'answer')} of {data['rows']:,} with something wrong."
    return page.section("Where it fails", lead, *parts)


def _browser_lead(rows: RowsOfPage, outputs: str) -> str:
    lead = "Those with most wrong first. "
    if rows.texts:
        lead += "Marked is what the student says and the reference does not, and in the reference what is missing. "
    else:
        lead += f"The texts are not at hand: {outputs} is missing or of another evaluation. "
    if rows.cut:
        lead += (
            f"The page has room for {rows.shown:,} of {rows.of:,} rows, those with most wrong; "
            f"all of them stand in {outputs}."
        )
    return lead.strip()


def _groups(data: Mapping[str, Any]) -> list[str]:
    sections = []
    if len(data["by_type"]) > 1:
        columns = ["metric", *(f"#{name}" for name in data["by_type"])]
        sections.append(
            page.section("By prompt type", SIGNS_MEAN, page.table(columns, _escaped(by_type(data))))
        )
    if len(data["by_province"]) > 1:
        names, rows = by_province(data)
        columns = [names[0], *(f"#{name}" for name in names[1:])]
        table = page.table(columns, _escaped(rows))
        sections.append(page.section("By province", provinces_lead(data), table))
    return sections


def _speeds(data: Mapping[str, Any]) -> str:
    rows = _escaped(speeds(data))
    columns = ["", "#base mean", "#p50", "#p95", "#student mean", "#p50", "#p95"]
    return page.section("Speed and length in figures", "", page.table(columns, rows)) if rows else ""


def _escaped(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [tuple(map(page.escape, row)) for row in rows]


def _spanned(cell: str) -> str:
    """`0.79 (0.69 to 0.88)` with the interval small."""
    mean, bracket, bounds = cell.partition(" (")
    return f"{page.escape(mean)} <small>({page.escape(bounds)}</small>" if bracket else page.escape(mean)
