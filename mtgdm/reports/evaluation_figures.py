"""The charts of an evaluation: how good are the answers (quality), and how fast do they come (runtime)."""

from __future__ import annotations

import math
from collections import Counter
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
    escape,
    faded,
    figure,
    line_shape,
    name_panel,
    note,
    nothing_here,
    panel,
    stacked,
)
from mtgdm.reports.evaluation import METRICS, EvalRow, Evaluation, Metric, Who, values_of
from mtgdm.reports.values import counted
from mtgdm.scoring.statistics import percentile

DRAWN: tuple[tuple[Who, str], ...] = (("base", BASE), ("student", STUDENT))
"""Who stands in the charts, in the order of drawing."""
MOST_TYPES = 4
"""More prompt types than this do not fit side by side; the JSON and the page have them all."""
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
    subtitle = _subtitle(evaluation) + " · mean with 95 % interval, spots resampled"
    subtitle += f" · {counted(unseen, 'smaller type')} left out" if unseen else ""
    chart = figure(
        "Quality of the answers", subtitle, 330 + 58 * len(shares) + 190 + 110 * bool(counts), left=138
    )
    heights = [max(1.0, 58 * len(shares)), 130.0, *([46.0] if counts else [])]
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
    _legend(chart, evaluation)
    return chart


def runtime_figure(evaluation: Evaluation, *, narrow: bool = False) -> Figure:
    """Latency and throughput: their distributions (below each other where narrow), and their course."""
    chart = figure("Speed of generation", _subtitle(evaluation), 1240 if narrow else 1040)
    bands = stacked([1.15] * (2 if narrow else 1) + [1, 1, 1], 0.075 if narrow else 0.085)
    halves = [(0.0, 1.0)] * 2 if narrow else beside([1, 1], 0.075)
    _spread_panel(chart, 1, "Latency, seconds a row", evaluation, "latency_s", halves[0], bands[0])
    _spread_panel(chart, 2, "Tokens a second", evaluation, "tokens_per_s", halves[1], bands[-4])
    _course_panel(
        chart,
        3,
        "Latency over the run, seconds",
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
    _legend(chart, evaluation)
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
    _keep_axes(chart, number)


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
            chart["data"].append(_bars(values, 0.0, 0.05, 20, number, color, name))
    _keep_axes(chart, number)


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
        _keep_axes(chart, number)
        return
    # From 0 on: an axis cut off below makes two models of nearly the same speed look far apart.
    low = min(0.0, *every)
    high = min(max(every), FAR * max(percentile(values, 0.95) for values in (student, base) if values))
    width = (high - low) / BINS or 1.0 / BINS
    traces = [
        _bars(values, low, width, BINS, number, color, name)
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
    _keep_axes(chart, number)


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


def _bars(
    values: Sequence[float], low: float, width: float, bins: int, number: int, color: str, name: str
) -> dict[str, Any]:
    """How many values fall into each bin, the bins without any left out."""
    counts = Counter(min(bins - 1, int((value - low) / width)) for value in values)
    return {
        "type": "bar",
        "x": [low + (place + 0.5) * width for place in sorted(counts)],
        "y": [counts[place] for place in sorted(counts)],
        "width": width * 0.94,
        "xaxis": axis("x", number),
        "yaxis": axis("y", number),
        "name": name,
        "legendgroup": name,
        "showlegend": False,
        "marker": {"color": faded(color, 0.6), "line": {"color": color, "width": 1}},
        "hovertemplate": "%{y} rows near %{x:.3~g}<extra>" + name + "</extra>",
    }


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


def _legend(chart: Figure, evaluation: Evaluation) -> None:
    """Entries for the two colours, drawn as marks of their own so that every panel shares them."""
    names = [("base", BASE)] if evaluation.compared else []
    for name, color in [*names, ("student", STUDENT)]:
        chart["data"].append(
            {
                "type": "scatter",
                "mode": "markers",
                "x": [None],
                "y": [None],
                "name": name,
                "legendgroup": name,
                "marker": {"size": 11, "color": color},
            }
        )
    chart["layout"]["barmode"] = "overlay"
    chart["layout"]["legend"]["y"] = 1.045


def _keep_axes(chart: Figure, number: int) -> None:
    """Axes without a trace are not drawn: give an empty panel one that shows nothing."""
    chart["data"].append(
        {
            "type": "scatter",
            "x": [None],
            "y": [None],
            "xaxis": axis("x", number),
            "yaxis": axis("y", number),
            "hoverinfo": "skip",
            "showlegend": False,
        }
    )


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


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _subtitle(evaluation: Evaluation) -> str:
    rows = counted(len(evaluation.rows), "row")
    return f"{rows} · {counted(evaluation.spots, 'spot')}" if evaluation.spots else rows
