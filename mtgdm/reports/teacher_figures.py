"""The charts of a teacher run: what was kept and why not, how long and how true the answers are, how fast they came."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mtgdm.charts.style import (
    BLUE,
    GREEN,
    ORANGE,
    RED,
    SOFT_INK,
    TEAL,
    Figure,
    axis,
    beside,
    escape,
    faded,
    figure,
    line,
    note,
    nothing_here,
    panel,
    stacked,
)
from mtgdm.reports.teacher_pace import Bucket, Pace, over_time
from mtgdm.reports.teacher_run import TeacherRun, TypeFigures
from mtgdm.scoring.statistics import percentile
from mtgdm.terminal import counted

MOST_TYPES = 6
"""More prompt types than this find no room in a chart; the JSON has them all."""
MOST_REASONS = 8
LONGEST_REASON = 110
"""So many characters of a reason stand over its bar."""
BINS = 40
FURTHEST = 0.995
"""Lengths are drawn up to this share of the rows: one endless answer would flatten all others."""


def kept_figure(run: TeacherRun, *, narrow: bool = False) -> Figure:
    """How many rows of each type were kept, and for what the others were rejected."""
    types = largest(run)
    reasons = run.all_reasons.most_common(MOST_REASONS)
    heights = [len(types) + 0.4, *([1.35 * len(reasons) + 0.3] if reasons else [])]
    inside = 44 * sum(heights) + (70 if reasons else 0)
    chart = figure("Kept and rejected", _subtitle(run), round(inside) + 230, left=118)
    domains = stacked(heights, 70 / inside)
    _bars_by_type(chart, types, domains[0], narrow=narrow)
    if reasons:
        shown = LONGEST_REASON // 3 if narrow else LONGEST_REASON
        _bars_of_reasons(chart, [(_short(reason, shown), rows) for reason, rows in reasons], domains[1])
    chart["layout"]["barmode"] = "stack"
    chart["layout"]["legend"]["traceorder"] = "normal"
    return chart


def answers_figure(run: TeacherRun, *, narrow: bool = False) -> Figure:
    """Length and fact recall of the kept answers, type by type."""
    types = [(name, figures) for name, figures in largest(run) if figures.kept]
    with_tokens = run.with_tokens == run.kept
    unit = "tokens" if with_tokens else "characters"
    lengths = [figures.output_tokens if with_tokens else figures.characters for _, figures in types]
    top = max((percentile(values, FURTHEST) for values in lengths), default=1.0) or 1.0
    columns = [(0.0, 1.0), (0.0, 1.0)] if narrow else beside([1.35, 1], 0.09)
    count = len(types) * (2 if narrow else 1)
    inside = 130 * count + 62 * (count - 1)
    said = f"{_subtitle(run)} · the last bar holds all that are longer"
    chart = figure("Answers", said, inside + 192)
    domains = stacked([1] * count, 62 / inside)
    for place, ((name, figures), values) in enumerate(zip(types, lengths, strict=True)):
        rows = domains[2 * place : 2 * place + 2] if narrow else [domains[place]] * 2
        for number, title, some, row, column, color, end in (
            (2 * place + 1, f"{name}: {unit}", values, rows[0], columns[0], BLUE, top),
            (2 * place + 2, f"{name}: fact recall", figures.recall, rows[1], columns[1], GREEN, 1.0),
        ):
            _histogram(chart, number, title, some, row, column, color=color, top=end)
    chart["layout"] |= {"showlegend": False, "bargap": 0.06}
    return chart


def pace_figure(run: TeacherRun, pace: Pace) -> Figure:
    """Rows and tokens over the time worked, and the share of rows that was rejected."""
    buckets = over_time(pace)
    panels: list[tuple[str, str, list[float]]] = [
        ("Rows a minute", BLUE, [one.rows / (one.end_s - one.begin_s) * 60 for one in buckets]),
        ("Rejected, % of the rows", RED, [_lost_percent(one) for one in buckets]),
    ]
    if any(pace.output_tokens):
        speed = [one.output_tokens / (one.end_s - one.begin_s) for one in buckets]
        panels.insert(1, ("Output tokens a second", TEAL, speed))
    chart = figure("Pace", _worked(pace), 230 + 165 * len(panels))
    scale, unit = _time_unit(pace.worked_s)
    x = [(one.begin_s + one.end_s) / 2 / scale for one in buckets]
    domains = stacked([1] * len(panels), 0.1)
    for number, ((title, color, values), domain) in enumerate(zip(panels, domains, strict=True), start=1):
        last = number == len(panels)
        x_axis = {"range": [0, (pace.worked_s or 1) / scale], "showticklabels": last}
        panel(
            chart,
            number,
            title,
            y=domain,
            x_axis=x_axis | ({} if number == 1 else {"matches": "x"}),
            y_axis={"rangemode": "tozero", "nticks": 5},
        )
        hover = f"%{{y:.4~g}}<br>%{{x:.1f}} {unit}<extra>{title}</extra>"
        chart["data"].append(
            line((x, values), title, color, 2, number=number, hovertemplate=hover, fill="tozeroy")
            | {"fillcolor": faded(color, 0.1)}
        )
        if not buckets:
            nothing_here(chart, number, "everything came within one moment")
    chart["layout"][f"xaxis{len(panels)}"]["title"]["text"] = f"{unit} worked"
    chart["layout"]["showlegend"] = False
    return chart


def largest(run: TeacherRun) -> list[tuple[str, TypeFigures]]:
    """The types with most rows, in the order in which they were met."""
    by_rows = sorted(run.types.items(), key=lambda pair: -(pair[1].kept + pair[1].rejected))
    names = {name for name, _ in by_rows[:MOST_TYPES]}
    return [(name, figures) for name, figures in run.types.items() if name in names]


def _bars_by_type(
    chart: Figure, types: Sequence[tuple[str, TypeFigures]], domain: tuple[float, float], *, narrow: bool
) -> None:
    names = [name for name, _ in types]
    total = [figures.kept + figures.rejected for _, figures in types]
    ticks = {"tickvals": names, "ticktext": [escape(_short(name, 14)) for name in names]}
    y_axis = {"type": "category", "categoryorder": "array", "categoryarray": names[::-1], **ticks}
    x_axis = {
        "range": [0, max(total, default=1) * (1.75 if narrow else 1.3)],
        "tickformat": ",d",
        "nticks": 6,
    }
    panel(chart, 1, "Rows by type", y=domain, x_axis=x_axis, y_axis=y_axis | {"showgrid": False})
    for name, color, counts in (
        ("kept", BLUE, [figures.kept for _, figures in types]),
        ("rejected", ORANGE, [figures.rejected for _, figures in types]),
    ):
        hover = "%{y}: %{x:,} " + name + "<extra></extra>"
        bar = {"type": "bar", "orientation": "h", "x": counts, "y": names, "name": name, "width": 0.62}
        chart["data"].append(bar | {"marker": {"color": color}, "hovertemplate": hover})
    for all_, (name, figures) in zip(total, types, strict=True):
        lost = f"{figures.rejected / all_:.1%} rejected" if figures.rejected else "all kept"
        text = lost if narrow else f"<b>{figures.kept:,}</b> of {all_:,} · {lost}"
        note(chart, text, x=all_, y=name, anchor="left", shift=(8, 0), axes=("x", "y"))


def _bars_of_reasons(chart: Figure, reasons: Sequence[tuple[str, int]], domain: tuple[float, float]) -> None:
    places = list(range(len(reasons)))
    counts = [count for _, count in reasons]
    y_axis = {"range": [len(reasons) - 0.4, -0.75], "showticklabels": False, "showgrid": False}
    x_axis = {"range": [0, max(counts) * 1.16], "tickformat": ",d"}
    panel(chart, 2, "Why rows were rejected", y=domain, x_axis=x_axis, y_axis=y_axis)
    bar = {"type": "bar", "orientation": "h", "x": counts, "y": places, "width": 0.3, "showlegend": False}
    hover = "%{x:,} rows<extra></extra>"
    axes = {"xaxis": "x2", "yaxis": "y2"}
    chart["data"].append(bar | axes | {"marker": {"color": ORANGE}, "hovertemplate": hover})
    for place, (reason, count) in enumerate(reasons):
        note(chart, escape(reason), x=0, y=place - 0.38, anchor="left", shift=(4, 0), axes=("x2", "y2"))
        note(chart, f"<b>{count:,}</b>", x=count, y=place, anchor="left", shift=(8, 0), axes=("x2", "y2"))


def _histogram(
    chart: Figure,
    number: int,
    title: str,
    values: Sequence[float],
    y: tuple[float, float],
    x: tuple[float, float],
    *,
    color: str,
    top: float,
) -> None:
    """How many rows have which value; the last bar holds all that is beyond `top` too."""
    width = top / BINS
    counts = [0] * BINS
    for value in values:
        counts[min(int(value / width), BINS - 1)] += 1
    y_axis = {"rangemode": "tozero", "nticks": 4}
    panel(chart, number, title, y=y, x=x, x_axis={"range": [0, top]}, y_axis=y_axis)
    axes = {"xaxis": axis("x", number), "yaxis": axis("y", number)}
    middles = [(place + 0.5) * width for place in range(BINS)]
    hover = "%{y:,} rows<br>about %{x:.3~g}<extra></extra>"
    bar = {"type": "bar", "x": middles, "y": counts, "width": width * 0.94, "hovertemplate": hover}
    chart["data"].append(bar | axes | {"marker": {"color": color}})
    if not values:
        nothing_here(chart, number, "not known")
        return
    text = f"median {_figure(percentile(values, 0.5))}"
    place = (f"{axis('x', number)} domain", f"{axis('y', number)} domain")
    note(chart, text, x=1, y=1, anchor="right", shift=(0, 8), bottom=True, color=SOFT_INK, axes=place)


def _lost_percent(bucket: Bucket) -> float:
    return 100 * bucket.rejected / bucket.rows if bucket.rows else math.nan


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2f}"


def _time_unit(seconds: float) -> tuple[float, str]:
    return (3600.0, "hours") if seconds > 7200 else (60.0, "minutes") if seconds > 120 else (1.0, "seconds")


def _worked(pace: Pace) -> str:
    scale, unit = _time_unit(pace.worked_s)
    sittings = counted(pace.sittings, "sitting")
    return (
        f"{len(pace):,} answers in {pace.worked_s / scale:,.1f} {unit} worked · {sittings}, pauses left out"
    )


def _subtitle(run: TeacherRun) -> str:
    models = " · ".join(f"{backend} {model}".strip() for backend, model in run.models)
    return f"{models} · " * bool(models) + f"{run.kept:,} kept · {run.rejected:,} rejected"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
