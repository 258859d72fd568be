"""The charts of a training run: does it learn and generalise (loss), and does it run smoothly (optim)."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtgdm.charts.lines import Points, thinned, trend
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
    line,
    line_shape,
    note,
    nothing_here,
    panel,
    stacked,
)
from mtgdm.reports.training_measures import ends
from mtgdm.reports.training_run import TrainingRun, known
from mtgdm.terminal import counted

APART = 60
"""Markers of more evaluations than this would touch: they are a line."""
WIDE = 20
"""Losses of which the largest is this many times the smallest are drawn on a logarithmic axis."""
LOG_TICKS = [digit * 10.0**power for power in range(-6, 4) for digit in (1, 2, 5)]


@dataclass(frozen=True)
class Panel:
    """One quantity of the optimizer figure."""

    column: str
    title: str
    color: str
    scale: float = 1.0
    y_axis: Mapping[str, Any] = field(default_factory=dict)


PANELS = (
    Panel("learning_rate", "Learning rate", VIOLET),
    Panel("grad_norm", "Gradient norm", GREY),
    Panel("step_seconds", "Seconds a step", ORANGE),
    Panel("tokens_per_s", "Tokens a second", TEAL, y_axis={"tickformat": "~s"}),
    Panel("peak_memory_mib", "Peak memory, GiB", BLUE, scale=1 / 1024),
)


def loss_figure(run: TrainingRun) -> Figure:
    """Train and eval loss with the best evaluation marked, and the gap between the two."""
    evaluations = run.evaluations()
    gaps = _gaps(run, evaluations)
    chart = figure("Training loss", _subtitle(run), 800 if gaps else 620)
    domains = stacked([3.1, 1], 0.12) if gaps else [(0.0, 1.0)]
    x_axis = _step_axis(run)
    steps, losses = run.train["step"], run.train["loss"]
    title, y_axis = loss_axis([losses])
    panel(chart, 1, title, y=domains[0], x_axis=x_axis | {"showticklabels": not gaps}, y_axis=y_axis)
    smooth = trend(steps, losses)
    if smooth is None:
        chart["data"].append(_line(thinned(steps, losses), "train loss", BLUE, 2.25))
    else:
        chart["data"].append(_line(thinned(steps, losses), "train loss (logged)", BLUE, 1, opacity=0.28))
        chart["data"].append(_line(smooth, "train loss (smoothed)", BLUE, 2.75))
    if evaluations:
        chart["data"].append(_evaluations(evaluations))
        _mark_best(chart, run)
    if gaps:
        panel(chart, 2, "Eval loss minus train loss", y=domains[1], x_axis=x_axis | {"matches": "x"})
        chart["data"].append(
            _line(gaps, "eval − train", ORANGE, 2, number=2, fill="tozeroy", fillcolor=faded(ORANGE, 0.1))
            | {"showlegend": False}
        )
        line_shape(chart, number=2, color=SOFT_INK, y=0, dash="dot")
    _name_steps(chart, 2 if gaps else 1)
    return chart


def optimizer_figure(run: TrainingRun) -> Figure:
    """Learning rate, gradient norm, step time, throughput and memory over the run."""
    panels = [panel for panel in PANELS if panel.column != "peak_memory_mib" or _logged(run, panel.column)]
    chart = figure("Optimizer and speed", _subtitle(run), 240 + 165 * len(panels))
    domains = stacked([1] * len(panels), 0.065)
    for number, (shown, domain) in enumerate(zip(panels, domains, strict=True), start=1):
        last = number == len(panels)
        x_axis = _step_axis(run) | {"showticklabels": last} | ({} if number == 1 else {"matches": "x"})
        y_axis = {"rangemode": "tozero", "nticks": 5, **shown.y_axis}
        panel(chart, number, shown.title, y=domain, x_axis=x_axis, y_axis=y_axis)
        _fill_panel(chart, run, shown, number)
    _name_steps(chart, len(panels))
    chart["layout"]["showlegend"] = False
    return chart


def loss_axis(losses: Sequence[Sequence[float]]) -> tuple[str, dict[str, Any]]:
    """Name and axis of losses: logarithmic where the end of a run would be a flat line otherwise."""
    finite = [loss for some in losses for loss in known(some)]
    if not finite or not 0 < min(finite) < max(finite) / WIDE:
        return "Loss", {}
    ticks = {"tickvals": LOG_TICKS, "ticktext": [f"{tick:g}" for tick in LOG_TICKS]}
    return "Loss (logarithmic)", {"type": "log", **ticks}


def _logged(run: TrainingRun, column: str) -> bool:
    return any(map(math.isfinite, run.train[column]))


def _gaps(run: TrainingRun, evaluations: list[tuple[float, float]]) -> Points | None:
    """Eval loss minus the smoothed train loss at each evaluation, from the first logged step on."""
    steps, losses = trend(run.train["step"], run.train["loss"]) or (run.train["step"], run.train["loss"])
    gaps: Points = ([], [])
    place = -1
    for step, loss in evaluations:
        while place + 1 < len(steps) and steps[place + 1] <= step:
            place += 1
        if place >= 0 and math.isfinite(losses[place]):
            gaps[0].append(step)
            gaps[1].append(loss - losses[place])
    return gaps if len(gaps[0]) >= 2 else None


def _mark_best(chart: Figure, run: TrainingRun) -> None:
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
    apart = len(evaluations) <= APART
    x, y = thinned([step for step, _ in evaluations], [loss for _, loss in evaluations])
    return {
        "type": "scatter",
        "mode": "lines+markers" if apart else "lines",
        "x": x,
        "y": y,
        "name": "eval loss",
        "line": {"color": ORANGE, "width": 1.75, "dash": "dot" if apart else "solid"},
        "marker": {"size": 8, "color": ORANGE, "line": {"color": PAPER, "width": 1.25}},
        "hovertemplate": "eval %{y:.4f}<br>step %{x:,}<extra></extra>",
        "cliponaxis": False,
    }


def _fill_panel(chart: Figure, run: TrainingRun, shown: Panel, number: int) -> None:
    values = array("d", (value * shown.scale for value in run.train[shown.column]))
    if not _logged(run, shown.column):
        lost = shown.column == "grad_norm" and run.bad_norms
        nothing_here(chart, number, "no finite number" if lost else "not in the metrics file")
        chart["data"].append(_line(([], []), shown.title, shown.color, 1, number=number))
        return
    points = thinned(run.train["step"], values)
    # The schedule is no noise: it is drawn as it is.
    smooth = None if shown.column == "learning_rate" else trend(run.train["step"], values)
    if smooth is None:
        chart["data"].append(_line(points, shown.title, shown.color, 2, number=number))
    else:
        chart["data"].append(_line(points, shown.title, shown.color, 1, number=number, opacity=0.4))
        name = f"{shown.title} (smoothed)"
        chart["data"].append(_line(smooth, name, shown.color, 2.25, number=number))
    if shown.column == "learning_rate":
        chart["data"][-1] |= {"fill": "tozeroy", "fillcolor": faded(shown.color, 0.08)}
    if shown.column == "grad_norm" and run.clip is not None:
        line_shape(chart, number=number, color=RED, y=run.clip)
        axes = (f"{axis('x', number)} domain", axis("y", number))
        clip = f"clip {run.clip:g}"
        note(chart, clip, x=1, y=run.clip, color=RED, size=11.5, anchor="right", bottom=True, axes=axes)


def _line(points: Points, name: str, color: str, width: float, **more: Any) -> dict[str, Any]:
    hover = "%{y:.4~g}<br>step %{x:,}<extra>" + name + "</extra>"
    return line(points, name, color, width, hovertemplate=hover, **more)


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
    of = f" of {run.total_steps:,}" if run.end is None and run.total_steps else ""
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
