"""The bones of every report: JSON, Markdown and page first, charts afterwards, each file whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from mtgdm.charts.export import font_hint, plotly_source, write_pngs
from mtgdm.charts.style import Figure
from mtgdm.errors import UserError
from mtgdm.reports.page import page
from mtgdm.reports.values import finite
from mtgdm.rows import replace
from mtgdm.stage import TIMESTAMP, Context

VERSION = 1
"""Of the JSON: raised when a key changes its meaning or goes."""


@dataclass(frozen=True)
class Report:
    """Everything one report says, in every form it takes."""

    title: str
    data: dict[str, Any]
    markdown: Callable[[Mapping[str, str]], str]
    """The Markdown, given the links of the charts that were drawn by their names."""
    body: Sequence[str]
    charts: Mapping[str, Figure]
    """The figures of the PNG files by name: `loss`, `optim`; each is kept as JSON too, to be drawn anew."""
    page_charts: Mapping[str, Figure] = field(default_factory=dict)
    """More figures of the page: `quality-narrow` is `quality` on a phone."""


@dataclass(frozen=True)
class Published:
    """Where the files of a report lie."""

    json: Path
    markdown: Path
    html: Path
    pictures: list[Path]


def publish(
    report: Report,
    context: Context,
    *,
    kind: str,
    out_dir: Path,
    diagrams_dir: Path,
    chart_timeout_s: float,
    require_png: bool,
) -> Published:
    """Write `<kind>-report-<timestamp>.json`, `.md`, `.html` and the figures as JSON, then the PNGs.

    A browser that fails costs a hint, not the report; with `require_png` it is a UserError, raised when
    everything else is written. No earlier report is overwritten.
    """
    name = _unused_name(kind, context, (out_dir, diagrams_dir))
    files = Published(out_dir / f"{name}.json", out_dir / f"{name}.md", out_dir / f"{name}.html", pictures=[])
    pictures = {chart: diagrams_dir / f"{name}.{chart}.png" for chart in report.charts}
    data = {"version": VERSION, **report.data}
    _write(files.json, json.dumps(finite(data), ensure_ascii=False, indent=2, default=str) + "\n")
    _write(files.markdown, report.markdown({}))
    figures = {**report.charts, **report.page_charts}
    _write(files.html, page(report.title, report.body, figures, plotly_source()))
    drawn = {pictures[chart]: finite(figure) for chart, figure in report.charts.items()}
    for picture, figure in drawn.items():
        _write(picture.with_suffix(".json"), json.dumps(figure, ensure_ascii=False) + "\n")
    export = write_pngs(drawn, limit_s=chart_timeout_s)
    files.pictures.extend(export.written)
    if export.problem is None:
        links = {chart: _link(path, out_dir) for chart, path in pictures.items()}
        _write(files.markdown, report.markdown(links))
        hint = font_hint(drawn)
        if hint is not None:
            context.warn(hint)
    elif require_png:
        raise UserError(f"no PNG charts: {export.problem}", hint=export.hint, where=diagrams_dir)
    else:
        context.warn(f"no PNG charts: {export.problem}; the report and its page are complete")
        if export.hint:
            context.print(f"hint: {export.hint}")
    return files


def say_where(files: Published, context: Context) -> None:
    """Print where the files lie."""
    context.print(f"report  {_shown(files.html, context)}   (also .md, .json)")
    if files.pictures:
        context.print(f"charts  {'   '.join(_shown(path, context) for path in files.pictures)}")


def _unused_name(kind: str, context: Context, folders: Sequence[Path]) -> str:
    """The name by the second of the start; a report that has it already leaves the next second to this one."""
    moment = context.started
    while True:
        name = f"{kind}-report-{moment.strftime(TIMESTAMP)}"
        if not any(any(folder.glob(f"{name}.*")) for folder in folders):
            return name
        moment += timedelta(seconds=1)


def _write(path: Path, text: str) -> None:
    with replace(path) as file:
        file.write(text.encode("utf-8", "replace"))


def _link(picture: Path, folder: Path) -> str:
    """A link from a file of `folder` to the picture; its absolute address where the drives differ."""
    try:
        return Path(os.path.relpath(picture, folder)).as_posix().replace(" ", "%20")
    except ValueError:
        return picture.resolve().as_uri()


def _shown(path: Path, context: Context) -> str:
    return str(path.relative_to(context.workspace) if path.is_relative_to(context.workspace) else path)
