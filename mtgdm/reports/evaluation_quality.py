"""The chart of quality: how good are the answers, base against student."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.charts.style import (
    BASE,
    GRID,
    PAPER,
    SOFT_INK,
    STUDENT,
    Figure,
    axis,
    beside,
    figure,
    name_panel,
    note,
    nothing_here,
    panel,
    stacked,
)
from mtgdm.reports.evaluation import METRICS, EvalRow, Evaluation, Metric, values_of
from mtgdm.reports.evaluation_marks import DRAWN, bars, keep_axes, legend, subtitle_of
from mtgdm.terminal import counted

MOST_TYPES = 4
"""More prompt types than this do not fit side by side; the JSON and the page have them all."""
Figures = Mapping[str, Any]
"""What `describe` says of some rows."""


def quality_figure(evaluation: Evaluation, figures: Figures, *, narrow: bool = False) -> Figure:
    """Base against student for each metric with 95 % intervals, over all rows and (not narrow) by type.

    `figures` is what `describe` found of the evaluation.
    """
    columns: list[tuple[str, Sequence[EvalRow], Figures]] = [("All rows", evaluation.rows, figures)]
    by_type = figures["by_type"]
    if len(by_type) > 1 and not narrow:
        largest = sorted(by_type, key=lambda name: -by_type[name]["rows"])[:MOST_TYPES]
        columns += [(name, evaluation.of_type(name), by_type[name]) for name in by_type if name in largest]
    unseen = len(by_type) - len(columns) + 1 if len(columns) > 1 else 0
    charted = [metric for metric in METRICS if metric.charted and metric.key in figures["student"]]
    shares = [metric for metric in charted if not metric.lower_is_better]
    counts = [metric for metric in charted if metric.lower_is_better]
    subtitle = subtitle_of(evaluation) + " · mean with 95 % interval, spots resampled"
    subtitle += f" · {counted(unseen, 'smaller type')} left out" if unseen else ""
    chart = figure(
        "Quality of the answers",
        subtitle,
        330 + 58 * max(3, len(shares)) + 190 + 110 * bool(counts),
        left=138,
    )
    heights = [58.0 * len(shares) or 130.0, 130.0, *([46.0] if counts else [])]
    bands = stacked(heights, 0.125)
    widths = beside([1.55] + [1.0] * (len(columns) - 1), 0.035) if len(columns) > 1 else [(0.0, 1.0)]
    most = max(
        (value for *_, found in columns for metric in counts for value in _reach(found, metric)), default=0.5
    )
    number = 0
    for place, ((title, rows, found), across) in enumerate(zip(columns, widths, strict=True)):
        first = place == 0
        heading = f"{title} ({len(rows):,})"
        number += 1
        _dumbbells(chart, number, heading, found, shares, across, bands[0], labels=first, top=1.0)
        number += 1
        _histogram(chart, number, rows, across, bands[1], labels=first)
        if counts:
            number += 1
            _dumbbells(chart, number, "", found, counts, across, bands[2], labels=first, top=most)
    name_panel(chart, "<b>Rows by character F1</b>", x=widths[0][0], y=bands[1][1])
    if counts:
        text = "<b>Unsupported facts a row</b>" + (
            "" if narrow else " (claims the record does not hold: fewer is better)"
        )
        name_panel(chart, text, x=widths[0][0], y=bands[2][1])
    legend(chart, evaluation)
    return chart


def _dumbbells(
    chart: Figure,
    number: int,
    title: str,
    figures: Figures,
    metrics: Sequence[Metric],
    across: tuple[float, float],
    band: tuple[float, float],
    *,
    labels: bool,
    top: float,
) -> None:
    """One line a metric: the base's mean and the student's, each with its interval, tied together."""
    shares = not metrics or not metrics[0].lower_is_better
    known = [(metric, _intervals(figures, metric)) for metric in metrics]
    x_axis: dict[str, Any] = (
        {"range": [-0.04, 1.04], "tickvals": [0, 0.25, 0.5, 0.75, 1], "ticktext": ["0", "", "0.5", "", "1"]}
        if shares
        else {"range": [-0.04 * top, 1.08 * top], "nticks": 4}
    )
    y_axis = {
        "range": [len(metrics) - 0.35, -0.65],
        "tickvals": list(range(len(metrics))),
        "ticktext": [metric.label for metric in metrics],
        "showticklabels": labels,
        "showgrid": False,
    }
    panel(chart, number, title, x=across, y=band, x_axis=x_axis, y_axis=y_axis)
    for place, (metric, (student, base)) in enumerate(known):
        if student is None:
            axes = (f"{axis('x', number)} domain", axis("y", number))
            note(chart, "does not apply", x=0.5, y=place, color=SOFT_INK, size=11, axes=axes)
            continue
        if base is not None:
            chart["data"].append(_tie(number, place, base[0], student[0]))
            chart["data"].append(_mean(number, place, base, BASE, "base", metric))
        chart["data"].append(_mean(number, place, student, STUDENT, "student", metric))
        _write_means(
            chart, number, place, student[0], None if base is None else base[0], wide=labels, top=top
        )
    if not metrics:
        nothing_here(chart, number, "no metric in the file")
    keep_axes(chart, number)


def _write_means(
    chart: Figure, number: int, place: int, student: float, base: float | None, *, wide: bool, top: float
) -> None:
    """The means above their dots; where the dots are too close for two texts, one text for both."""
    written = f"<b>{student:.2f}</b>"
    if base is not None and abs(base - student) > (0.16 if wide else 0.3) * top:
        _write(chart, number, place, f"{base:.2f}", base, 0.06 * top, 0.9 * top, wide=wide, color=SOFT_INK)
        _write(chart, number, place, written, student, 0.06 * top, 0.9 * top, wide=wide, color=STUDENT)
    else:
        if base is not None:
            written = f"<span style='color:{SOFT_INK}'>{base:.2f} →</span> {written}"
        near, far = (0.15 * top, 0.85 * top) if wide else (0.25 * top, 0.75 * top)
        _write(chart, number, place, written, student, near, far, wide=wide, color=STUDENT)


def _write(
    chart: Figure,
    number: int,
    place: int,
    text: str,
    x: float,
    near: float,
    far: float,
    *,
    wide: bool,
    color: str,
) -> None:
    """A text above the dot at `x`, kept inside the panel at its ends."""
    anchor, shift = ("left", -7.0) if x < near else ("right", 7.0) if x > far else ("center", 0.0)
    axes = (axis("x", number), axis("y", number))
    size = 12.5 if wide else 11.5
    note(chart, text, x=x, y=place, size=size, color=color, anchor=anchor, shift=(shift, 15), axes=axes)


def _histogram(
    chart: Figure,
    number: int,
    rows: Sequence[EvalRow],
    across: tuple[float, float],
    band: tuple[float, float],
    *,
    labels: bool,
) -> None:
    x_axis = {
        "range": [-0.04, 1.04],
        "tickvals": [0, 0.25, 0.5, 0.75, 1],
        "ticktext": ["0", "", "0.5", "", "1"],
    }
    panel(chart, number, "", x=across, y=band, x_axis=x_axis, y_axis={"nticks": 4, "rangemode": "tozero"})
    if labels:
        chart["layout"][f"yaxis{number}"]["title"] = {"text": "rows", "font": {"size": 12, "color": SOFT_INK}}
    for name, color in DRAWN:
        values = values_of(rows, "char_f1", name)
        if values:
            chart["data"].append(bars(values, 0.0, 0.05, 20, number, color, name))
    keep_axes(chart, number)


def _mean(
    number: int, place: int, interval: tuple[float, float, float], color: str, name: str, metric: Metric
) -> dict[str, Any]:
    mean, low, high = interval
    known = math.isfinite(low) and math.isfinite(high)
    span = f"<br>95 %: {low:.3f} to {high:.3f}" if known else "<br>too few spots for an interval"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [mean],
        "y": [place],
        "xaxis": axis("x", number),
        "yaxis": axis("y", number),
        "name": name,
        "legendgroup": name,
        "showlegend": False,
        "marker": {"size": 11, "color": color, "line": {"color": PAPER, "width": 1.25}},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [max(0.0, high - mean) if known else 0],
            "arrayminus": [max(0.0, mean - low) if known else 0],
            "color": color,
            "thickness": 2.25,
            "width": 5,
        },
        "hovertemplate": f"{metric.label}: %{{x:.3f}}{span}<extra>{name}</extra>",
        "cliponaxis": False,
    }


def _tie(number: int, place: int, start: float, end: float) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [start, end],
        "y": [place, place],
        "xaxis": axis("x", number),
        "yaxis": axis("y", number),
        "line": {"color": GRID, "width": 5},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _reach(figures: Figures, metric: Metric) -> list[float]:
    """How far to the right the means and intervals of a metric go."""
    return [value for one in _intervals(figures, metric) if one for value in (one[0], one[2]) if value > 0]


def _intervals(
    figures: Figures, metric: Metric
) -> tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]:
    """Mean, low and high of the student and of the base."""
    known = [(figures[who] or {}).get(metric.key) for who in ("student", "base")]
    student, base = ((one["mean"], *one["ci95"]) if one else None for one in known)
    return student, base
