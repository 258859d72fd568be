"""The chart of speed: how fast do the answers come, and how did that change over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.charts.style import (
    BASE,
    PAPER,
    SOFT_INK,
    STUDENT,
    Figure,
    axis,
    beside,
    escape,
    faded,
    figure,
    line_shape,
    note,
    nothing_here,
    panel,
    stacked,
)
from mtgdm.reports.evaluation import EvalRow, Evaluation, values_of
from mtgdm.reports.evaluation_marks import DRAWN, bars, keep_axes, legend, subtitle_of
from mtgdm.scoring.statistics import percentile

MOST_ROWS = 3000
MOST_ROWS_NAMED = 200
"""Among more dots than this a name is only noise."""
BINS = 24
FAR = 3.0
"""So many times the 95th percentile is where a histogram ends: one slow row must not squeeze all others."""
SLOW = 1.2
"""A row is slow that takes this many times the median."""


Figures = Mapping[str, Any]
"""What `describe` says of some rows."""


def runtime_figure(evaluation: Evaluation, *, narrow: bool = False) -> Figure:
    """Latency and throughput: their distributions (below each other where narrow), and their course."""
    chart = figure("Speed of generation", subtitle_of(evaluation), 1240 if narrow else 1040)
    bands = stacked([1.15] * (2 if narrow else 1) + [1, 1, 1], 0.075 if narrow else 0.085)
    halves = [(0.0, 1.0)] * 2 if narrow else beside([1, 1], 0.075)
    shared = evaluation.batch_rows is not None
    title = "Seconds a row, its share of a batch" if shared else "Latency, seconds a row"
    _spread_panel(chart, 1, title, evaluation, "latency_s", halves[0], bands[0])
    _spread_panel(chart, 2, "Tokens a second", evaluation, "tokens_per_s", halves[1], bands[-4])
    _course_panel(
        chart,
        3,
        "Seconds a row over the run" if shared else "Latency over the run, seconds",
        evaluation,
        "latency_s",
        bands[-3],
        names=1 if narrow else 3,
    )
    _course_panel(chart, 4, "Tokens a second over the run", evaluation, "tokens_per_s", bands[-2])
    _course_panel(chart, 5, "Output tokens over the run", evaluation, "output_tokens", bands[-1])
    for number in (3, 4):
        chart["layout"][f"xaxis{number}"] |= {"showticklabels": False, "matches": "x5"}
    # A note, because plotly loses the place of an axis title where the axes are matched and the page is printed.
    text = "row, in the order of evaluation"
    note(chart, text, x=0.5, y=0, size=12.5, color=SOFT_INK, shift=(0, -42))
    legend(chart, evaluation)
    return chart


def _spread_panel(
    chart: Figure,
    number: int,
    title: str,
    evaluation: Evaluation,
    key: str,
    across: tuple[float, float],
    band: tuple[float, float],
) -> None:
    """A histogram of student and base, the student's median and 95th percentile marked."""
    student = values_of(evaluation.rows, key)
    base = values_of(evaluation.rows, key, "base")
    every = student + base
    if not every:
        panel(chart, number, title, x=across, y=band)
        nothing_here(chart, number, "not in the metrics file")
        keep_axes(chart, number)
        return
    # From 0 on: an axis cut off below makes two models of nearly the same speed look far apart.
    low = min(0.0, *every)
    high = min(max(every), FAR * max(percentile(values, 0.95) for values in (student, base) if values))
    width = (high - low) / BINS or 1.0 / BINS
    traces = [
        bars(values, low, width, BINS, number, color, name)
        for values, color, name in ((base, BASE, "base"), (student, STUDENT, "student"))
        if values
    ]
    chart["data"] += traces
    beyond = sum(value > high for value in every)
    highest = max(count for trace in traces for count in trace["y"])
    rows_title = {"text": "rows", "font": {"size": 12, "color": SOFT_INK}}
    y_axis = {"nticks": 5, "range": [0, highest * 1.45], "title": rows_title}
    x_axis = {"range": [low, low + width * (BINS + 0.5)]}
    title += f" (last bar: {beyond:,} beyond {_short(high)} too)" if beyond else ""
    panel(chart, number, title, x=across, y=band, y_axis=y_axis, x_axis=x_axis)
    if len(student) >= 3:
        _mark_percentiles(chart, number, student, low, high)


def _mark_percentiles(chart: Figure, number: int, values: Sequence[float], low: float, high: float) -> None:
    """Lines at the median and the 95th percentile, their texts at two heights, on the side with more room."""
    axes = (axis("x", number), f"{axis('y', number)} domain")
    for share, lines_down in ((0.5, 1), (0.95, 0)):
        value = percentile(values, share)
        line_shape(chart, number=number, color=STUDENT, x=value, dash="dot")
        anchor, shift = ("right", -5) if value > (low + high) / 2 else ("left", 5)
        text = f"p{share * 100:.0f} {_short(value)}"
        place = (shift, -9 - 17 * lines_down)
        behind = faded(PAPER, 0.8)
        note(
            chart,
            text,
            x=value,
            y=1.0,
            size=11.5,
            color=STUDENT,
            anchor=anchor,
            shift=place,
            axes=axes,
            behind=behind,
        )


def _course_panel(
    chart: Figure,
    number: int,
    title: str,
    evaluation: Evaluation,
    key: str,
    band: tuple[float, float],
    *,
    names: int = 0,
) -> None:
    """A dot a row in the order of evaluation, with the running median of the student."""
    every = values_of(evaluation.rows, key) + values_of(evaluation.rows, key, "base")
    y_axis = {"range": [0, max(every, default=1.0) * 1.15 or 1.0], "nticks": 5}
    panel(chart, number, title, y=band, y_axis=y_axis, x_axis={"range": [0, len(evaluation.rows) + 1]})
    stride = max(1, math.ceil(len(evaluation.rows) / MOST_ROWS))
    drawn = list(enumerate(evaluation.rows, start=1))[::stride]
    for name, color in DRAWN:
        points = [(place, value, row) for place, row in drawn if (value := row.of(name).get(key)) is not None]
        if not points:
            continue
        chart["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [place for place, _, _ in points],
                "y": [value for _, value, _ in points],
                "text": [escape(f"{row.spot or row.id} · {row.type}") for _, _, row in points],
                "xaxis": axis("x", number),
                "yaxis": axis("y", number),
                "name": name,
                "legendgroup": name,
                "showlegend": False,
                "marker": {
                    "size": 6,
                    "color": color,
                    "opacity": 0.55,
                    "line": {"color": PAPER, "width": 0.5},
                },
                "hovertemplate": "%{text}<br>%{y:.4~g}<extra>" + name + "</extra>",
                "cliponaxis": False,
            }
        )
        if name == "student":
            chart["data"].append(_running_median(points, number))
            if len(points) <= MOST_ROWS_NAMED:
                _name_slowest(chart, number, points, names)
    if not every:
        nothing_here(chart, number, "not in the metrics file")
    keep_axes(chart, number)


def _name_slowest(
    chart: Figure, number: int, points: Sequence[tuple[int, float, EvalRow]], most: int
) -> None:
    """Write the spot above rows that are slow beside the others, as far as the names stay clear of each other."""
    middle = percentile([value for _, value, _ in points], 0.5)
    named: list[int] = []
    for place, value, row in sorted(points, key=lambda point: -point[1]):
        if len(named) == most or row.spot is None or value < SLOW * middle:
            break
        if any(abs(place - other) < 0.16 * points[-1][0] for other in named):
            continue
        named.append(place)
        share = place / (points[-1][0] + 1)
        anchor = "left" if share < 0.1 else "right" if share > 0.9 else "center"
        text = f"{escape(row.spot)} {_short(value)} s"
        axes = (axis("x", number), axis("y", number))
        note(
            chart,
            text,
            x=place,
            y=value,
            size=11.5,
            color=STUDENT,
            anchor=anchor,
            shift=(0, 14),
            axes=axes,
            behind=faded(PAPER, 0.75),
        )


def _running_median(points: Sequence[tuple[int, float, EvalRow]], number: int) -> dict[str, Any]:
    half = max(1, len(points) // 20)
    values = [value for _, value, _ in points]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [place for place, _, _ in points],
        "y": [percentile(values[max(0, at - half) : at + half + 1], 0.5) for at in range(len(values))],
        "xaxis": axis("x", number),
        "yaxis": axis("y", number),
        "name": "student, running median",
        "showlegend": number == 3,
        "line": {"color": STUDENT, "width": 2.25},
        "hoverinfo": "skip",
    }


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
