"""The charts of a training run: does it learn and generalise (loss), and does it run smoothly (optim)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mtgdm.charts.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PAPER,
    RED,
    SOFT_INK,
    TEAL,
    VIOLET,
    Figure,
    axis,
    faded,
    figure,
    line_shape,
    note,
    nothing_here,
    panel,
    stacked,
)
from mtgdm.reports.training_run import TrainingRun, clip_of, ends
from mtgdm.reports.values import counted

MOST_POINTS = 3000
"""A line of more points is drawn by the lowest and highest of each bucket, so that extremes survive."""

LOG_TICKS = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]

Points = tuple[list[float], list[float]]


def loss_figure(run: TrainingRun) -> Figure:
    """Train and eval loss with the best evaluation marked, and the gap between the two."""
    evaluations = [point for point in run.evaluations() if math.isfinite(point[1])]
    gaps = _gaps(run, evaluations)
    chart = figure("Training loss", _subtitle(run), 800 if gaps else 620)
    domains = stacked([3.1, 1], 0.12) if gaps else [(0.0, 1.0)]
    x_axis = _step_axis(run)
    steps, losses = run.train["step"], run.train["loss"]
    wide = _wide(losses)
    y_axis = (
        {"type": "log", "tickvals": LOG_TICKS, "ticktext": [f"{tick:g}" for tick in LOG_TICKS]}
        if wide
        else {}
    )
    title = "Loss (logarithmic)" if wide else "Loss"
    panel(chart, 1, title, y=domains[0], x_axis=x_axis | {"showticklabels": not gaps}, y_axis=y_axis)
    weight = _ema_weight(len(losses))
    if weight is None:
        chart["data"].append(_line(thinned(steps, losses), "train loss", BLUE, 2.25))
    else:
        chart["data"].append(_line(thinned(steps, losses), "train loss (logged)", BLUE, 1, opacity=0.28))
        chart["data"].append(
            _line(thinned(steps, smoothed(losses, weight)), "train loss (smoothed)", BLUE, 2.75)
        )
    if evaluations:
        chart["data"].append(_evaluations(evaluations))
        _mark_best(chart, run, evaluations)
    if not len(losses) and not evaluations:
        nothing_here(chart, 1, "no step was logged")
    if gaps:
        panel(chart, 2, "Eval loss minus train loss", y=domains[1], x_axis=x_axis | {"matches": "x"})
        chart["data"].append(
            _line(gaps, "eval − train", ORANGE, 2, number=2, fill="tozeroy", fillcolor=faded(ORANGE, 0.1))
            | {"mode": "lines+markers", "showlegend": False, "marker": {"size": 6}}
        )
        line_shape(chart, number=2, color=SOFT_INK, y=0, dash="dot")
    _name_steps(chart, 2 if gaps else 1)
    return chart


def optimizer_figure(run: TrainingRun) -> Figure:
    """Learning rate, gradient norm, step time and throughput over the run."""
    panels: list[tuple[str, str, str]] = [
        ("learning_rate", "Learning rate", VIOLET),
        ("grad_norm", "Gradient norm", GREY),
        ("step_seconds", "Seconds a step", ORANGE),
        ("tokens_per_s", "Tokens a second", TEAL),
    ]
    if any(math.isfinite(value) for value in run.train["peak_memory_mib"]):
        panels.append(("peak_memory_mib", "Peak memory, MiB", BLUE))
    chart = figure("Optimizer and speed", _subtitle(run), 240 + 165 * len(panels))
    domains = stacked([1] * len(panels), 0.065)
    y_axis = {"rangemode": "tozero", "nticks": 5}
    for number, ((column, title, color), domain) in enumerate(zip(panels, domains, strict=True), start=1):
        last = number == len(panels)
        x_axis = _step_axis(run) | {"showticklabels": last} | ({} if number == 1 else {"matches": "x"})
        panel(
            chart,
            number,
            title,
            y=domain,
            x_axis=x_axis,
            y_axis=y_axis | ({"tickformat": "~s"} if color is TEAL else {}),
        )
        _fill_panel(chart, run, column, color, number)
    _name_steps(chart, len(panels))
    chart["layout"]["showlegend"] = False
    return chart


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> Points:
    """The line with at most about `most` points: of each bucket its lowest and highest, in order."""
    if len(x) <= most:
        return list(x), [value if math.isfinite(value) else math.nan for value in y]
    size = math.ceil(len(x) / (most / 2))
    kept: list[int] = []
    for begin in range(0, len(x), size):
        bucket = [place for place in range(begin, min(begin + size, len(x))) if math.isfinite(y[place])]
        if bucket:
            kept += sorted({min(bucket, key=y.__getitem__), max(bucket, key=y.__getitem__)})
    return [x[place] for place in kept], [y[place] for place in kept]


def ema(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the bias of its start; gaps keep the last average."""
    smooth: list[float] = []
    total = share = 0.0
    for value in values:
        if math.isfinite(value):
            total = weight * total + (1 - weight) * value
            share = weight * share + (1 - weight)
        smooth.append(total / share if share else math.nan)
    return smooth


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """The mean of the average from the left and from the right, which lags behind neither way."""
    forward, backward = ema(values, weight), ema(values[::-1], weight)[::-1]
    return [(left + right) / 2 for left, right in zip(forward, backward, strict=True)]


def _wide(losses: Sequence[float]) -> bool:
    """Whether the losses span so much that the end of the run would be a flat line."""
    known = [loss for loss in losses if math.isfinite(loss)]
    return bool(known) and 0 < min(known) < max(known) / 20


def _ema_weight(points: int) -> float | None:
    """A window of a fortieth of the run, at most 50 points; none where there is nothing to smooth."""
    window = min(points / 40, 50)
    return 1 - 1 / window if window >= 2 else None


def _gaps(run: TrainingRun, evaluations: list[tuple[float, float]]) -> Points | None:
    """Eval loss minus the smoothed train loss at each evaluation, from the first logged step on."""
    steps, losses = run.train["step"], run.train["loss"]
    smooth = smoothed(losses, _ema_weight(len(losses)) or 0.0)
    gaps: Points = ([], [])
    place = -1
    for step, loss in evaluations:
        while place + 1 < len(steps) and steps[place + 1] <= step:
            place += 1
        if place >= 0 and math.isfinite(smooth[place]):
            gaps[0].append(step)
            gaps[1].append(loss - smooth[place])
    return gaps if len(gaps[0]) >= 2 else None


def _mark_best(chart: Figure, run: TrainingRun, evaluations: list[tuple[float, float]]) -> None:
    best = run.best
    if best is None:
        return
    step, loss = best
    chart["data"].append(
        {
            "type": "scatter",
            "mode": "markers",
            "x": [step],
            "y": [loss],
            "name": "best eval",
            "marker": {"symbol": "star", "size": 15, "color": GREEN, "line": {"color": PAPER, "width": 1}},
            "hovertemplate": "best eval %{y:.4f}<br>step %{x:,}<extra></extra>",
            "cliponaxis": False,
        }
    )
    near_end = step > 0.9 * max(run.last_step, 1)
    near_start = step < 0.1 * max(run.last_step, 1)
    text = f"<b>best {loss:.3f}</b><br>step {step:,}"
    anchor = "right" if near_end else "left" if near_start else "center"
    # An annotation on a logarithmic axis is placed by the logarithm of its value.
    y = math.log10(loss) if chart["layout"]["yaxis"].get("type") == "log" else loss
    note(chart, text, x=step, y=y, color=GREEN, anchor=anchor, shift=(0, 40), bottom=True, axes=("x", "y"))
    arrow = chart["layout"]["annotations"][-1]
    arrow.update(
        {
            "showarrow": True,
            "arrowhead": 0,
            "arrowwidth": 1.5,
            "arrowcolor": GREEN,
            "ax": 0,
            "ay": -58,
            "standoff": 8,
        }
    )
    arrow.update({"yshift": 0})


def _evaluations(evaluations: list[tuple[float, float]]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [step for step, _ in evaluations],
        "y": [loss for _, loss in evaluations],
        "name": "eval loss",
        "line": {"color": ORANGE, "width": 1.75, "dash": "dot"},
        "marker": {"size": 8, "color": ORANGE, "line": {"color": PAPER, "width": 1.25}},
        "hovertemplate": "eval %{y:.4f}<br>step %{x:,}<extra></extra>",
        "cliponaxis": False,
    }


def _fill_panel(chart: Figure, run: TrainingRun, column: str, color: str, number: int) -> None:
    values = run.train[column]
    if not any(math.isfinite(value) for value in values):
        nothing_here(chart, number, "not in the metrics file")
        chart["data"].append(_line(([], []), column, color, 1, number=number))
        return
    points = thinned(run.train["step"], values)
    weight = _ema_weight(len(values)) if column != "learning_rate" else None
    if weight is None:
        chart["data"].append(_line(points, column, color, 2, number=number))
    else:
        chart["data"].append(_line(points, column, color, 1, number=number, opacity=0.4))
        smooth = thinned(run.train["step"], smoothed(values, weight))
        chart["data"].append(_line(smooth, f"{column} (smoothed)", color, 2.25, number=number))
    if column == "learning_rate":
        chart["data"][-1] |= {"fill": "tozeroy", "fillcolor": faded(color, 0.08)}
    clip = clip_of(run)
    if column == "grad_norm" and clip is not None:
        line_shape(chart, number=number, color=RED, y=clip)
        axes = (f"{axis('x', number)} domain", axis("y", number))
        note(
            chart, f"clip {clip:g}", x=1, y=clip, color=RED, size=11.5, anchor="right", bottom=True, axes=axes
        )


def _line(
    points: Points, name: str, color: str, width: float, *, number: int = 1, opacity: float = 1.0, **more: Any
) -> dict[str, Any]:
    few, single = len(points[0]) <= 40, len(points[0]) <= 3
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "x": points[0],
        "y": points[1],
        "xaxis": axis("x", number),
        "yaxis": axis("y", number),
        "name": name,
        "opacity": opacity,
        "line": {"color": color, "width": width, "simplify": False},
        "marker": {"color": color, "size": 9 if single else 5.5},
        "hovertemplate": "%{y:.4~g}<br>step %{x:,}<extra>" + name + "</extra>",
        "cliponaxis": not few,
        **more,
    }


def _step_axis(run: TrainingRun) -> dict[str, Any]:
    """All steps, from 0 where the run began there; room on both sides of a single one."""
    first = min((*run.train["step"][:1], *run.eval_steps[:1]), default=0)
    last = run.last_step
    if last <= first:
        return {"range": [first - 1, first + 1], "nticks": 3}
    return {"range": [min(0.0, first) if first < last / 10 else first, last]}


def _name_steps(chart: Figure, number: int) -> None:
    chart["layout"][f"xaxis{'' if number == 1 else number}"]["title"]["text"] = "optimizer step"


def _subtitle(run: TrainingRun) -> str:
    parts = []
    if run.start.get("base_model"):
        parts.append(str(run.start["base_model"]))
    total = run.start.get("total_steps")
    of = f" of {total:,}" if run.end is None and isinstance(total, int) else ""
    parts.append(
        (f"{run.last_step:,}{of} steps" if of else counted(run.last_step, "step"))
        + (" (the run did not end)" if run.end is None else "")
    )
    if isinstance(run.start.get("train_rows"), int):
        parts.append(f"{run.start['train_rows']:,} train rows")
    _, final = ends(run.train["loss"])
    if math.isfinite(final):
        parts.append(f"final train loss {final:.3f}")
    return " · ".join(parts)
