"""The HTML of a report: one file that needs no network, in light and dark, on a desk and on a phone."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtgdm.charts.style import DARK, Figure
from mtgdm.manifest import Manifest, SettingValue
from mtgdm.reports.lineage import SHORT, changed, chosen_settings
from mtgdm.reports.values import clock, finite

_UNSAFE = re.compile(r"[<\u2028\u2029\ud800-\udfff]")
"""What would end a script element, break its lines, or is no text in UTF-8."""
Tone = str
"""`good`, `bad`, `warn`, `info`, or empty."""


def page(title: str, body: Sequence[str], figures: Mapping[str, Figure], plotly: str) -> str:
    """The whole page: sections of HTML, the figures they name, and plotly's own JavaScript."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    parts = {
        "title": escape(title),
        "body": "\n".join(body),
        "plotly": plotly.replace("</script", "<\\/script"),
        "figures": for_script(figures),
        "dark": for_script(DARK),
    }
    # Split first: what is put in may hold anything, the marks of the template too.
    pieces = template.split("{{")
    written = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        written += [parts[name], rest]
    return "".join(written)


def header(
    kicker: str, title: str, *, pill: tuple[str, Tone] | None = None, lines: Sequence[str] = ()
) -> str:
    """The head of the page: what this is, the sentence to remember, and why."""
    badge = f"<p>{tagged(*pill)}</p>" if pill else ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    reasons = f"<ul>{items}</ul>" if items else ""
    return f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>{badge}{reasons}</header>'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """A few figures large: label, value, and a line under it."""
    boxes = "".join(
        f'<div class="card"><span>{escape(label)}</span><b>{escape(value)}</b><span>{escape(under)}</span></div>'
        for label, value, under in items
    )
    columns = 3 if len(items) in (3, 5, 6, 9) else 4
    return f'<section class="cards" style="--columns: {columns}">{boxes}</section>'


def chart(name: str, title: str, lead: str) -> str:
    """A place for a figure with the question it answers."""
    return section(title, lead, f'<div class="chart" data-figure="{escape(name)}"></div>')


def section(title: str, lead: str, *content: str) -> str:
    """A titled box; `content` is HTML."""
    under = f'<p class="soft">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{escape(title)}</h2>{under}{''.join(content)}</section>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells; columns whose name begins with `#` are numbers."""
    numbers = [column.startswith("#") for column in columns]
    kinds = [' class="number"' if number else "" for number in numbers]
    head = "".join(
        f"<th{kind}>{escape(column.lstrip('#'))}</th>" for column, kind in zip(columns, kinds, strict=True)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, *content: str) -> str:
    """Something to open; both are HTML."""
    return f"<details><summary>{summary}</summary>{''.join(content)}</details>"


def lineage(manifests: Sequence[Manifest]) -> str:
    """What was run, on what and with which settings, the nearest stage first; nothing without a manifest."""
    if not manifests:
        return ""
    anew = changed(manifests)
    lead = "From the manifests beside the files: each stage that led here, the last one first."
    return section("What it was made from", lead, *(_run(one, anew) for one in manifests))


def _run(made: Manifest, anew: set[tuple[str, str]]) -> str:
    """One stage of a lineage, to be opened."""
    summary = (
        f"<b>{escape(made.stage)}</b> <span class='soft'>{made.started:%Y-%m-%d %H:%M} · {clock(made.seconds)} · "
        f"profile {escape(made.profile)}</span>"
    )
    inputs = [
        (
            f"<code>{escape(state.path)}</code>",
            f"<code title='{state.sha256}'>{state.sha256[:SHORT]}</code>",
            f"{state.bytes:,}"
            + (tagged("made anew since", "warn") if (state.path, state.sha256) in anew else ""),
        )
        for state in made.inputs
    ]
    chosen = chosen_settings(made)
    rest = {key: setting for key, setting in made.settings.items() if key not in chosen}
    versions = " · ".join(f"{name} {version}" for name, version in made.versions.items())
    return details(
        summary,
        f"<p>{escape(made.summary)}</p>" if made.summary else "",
        table(["input", "sha256", "#bytes"], inputs) if inputs else "",
        _settings(chosen) if chosen else "",
        details(f"<span class='soft'>{len(rest)} settings at their default</span>", _settings(rest))
        if rest
        else "",
        f"<p class='soft'>{escape(versions)}</p>",
    )


def _settings(settings: Mapping[str, SettingValue]) -> str:
    rows = [
        (
            f"<code>{escape(key)}</code>",
            f"<code>{escape(json.dumps(setting.value, ensure_ascii=False))}</code>",
            escape(setting.source),
        )
        for key, setting in settings.items()
    ]
    return table(["setting", "value", "from"], rows)


def texts(blocks: Sequence[tuple[str, str, bool]]) -> str:
    """Texts side by side: title, HTML of the text, and whether it takes the whole width."""
    boxes = "".join(
        f'<div class="{"wide" if wide else ""}"><h3>{escape(title)}</h3><pre>{text}</pre></div>'
        for title, text, wide in blocks
    )
    return f'<div class="texts">{boxes}</div>'


def row_browser(title: str, lead: str, rows: str) -> str:
    """Rows to filter, sort and open; `rows` is JSON made with `for_script`, as `rows.js` reads it."""
    code = Path(__file__).with_name("rows.js").read_text(encoding="utf-8")
    return section(
        title,
        lead,
        '<div id="row-browser"></div>',
        f'<script type="application/json" id="rows">{rows}</script><script>{code}</script>',
    )


def tagged(text: str, tone: Tone = "") -> str:
    """A word in a coloured pill."""
    return f'<span class="pill {tone}">{escape(text)}</span>'


def escape(text: str) -> str:
    """Text as HTML; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
    return html.escape(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))


def for_script(value: Any) -> str:
    """JSON that may stand in a script element, whatever texts it holds; NaN, which JSON has no word for, is null.

    A lone surrogate, which UTF-8 cannot hold, stands as its escape and comes out as it went in.
    """
    text = json.dumps(finite(value), ensure_ascii=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
