"""Several training runs beside each other: how each came out, which settings differ, their curves in one chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtgdm.charts.lines import Points, thinned, trend
from mtgdm.charts.style import (
    BOTTOM,
    PAPER,
    SERIES,
    TOP,
    Figure,
    escape,
    figure,
    line,
    nothing_here,
    panel,
    stacked,
)
from mtgdm.reports.training_figures import loss_axis
from mtgdm.reports.training_run import TrainingRun

FACTS = ("base_model", "train_rows", "val_rows", "trained_tokens", "device", "processes")
"""What a run says of itself beside its settings and what may differ as they do."""
LEGEND_LINE = 22
_DASHES = ("solid", "dash", "dot")


def compared(runs: Sequence[TrainingRun], figures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs in the order given, each with how it came out, and what differs between them.

    `figures` are what `describe` found of each. `settings` holds, for each setting that differs between runs
    that name it, its value in each; null where a run does not: of that nobody knows.
    """
    names = run_names(runs)
    return {
        "runs": [
            {"name": name, "metrics_file": run.path.as_posix(), **_outcome(found)}
            for name, run, found in zip(names, runs, figures, strict=True)
        ],
        "settings": differing([_settings(run) for run in runs]),
    }


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs that name them, with their value in each run."""
    found = {}
    for key in dict.fromkeys(key for some in settings for key in some):
        named = [some[key] for some in settings if key in some]
        if any(value != named[0] for value in named):
            found[key] = [some.get(key) for some in settings]
    return found


def run_names(runs: Sequence[TrainingRun]) -> list[str]:
    """What tells the runs apart: their names, with a number where two have the same."""
    names = [run.name for run in runs]
    seen: dict[str, int] = {}
    told = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        told.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return told


def comparison_figure(runs: Sequence[TrainingRun]) -> Figure:
    """Eval and train loss of all runs over the epochs, or over the steps where one of them names no epochs."""
    by_epoch = all(_epochs_a_step(run) for run in runs)
    names = run_names(runs)
    unit = "epochs" if by_epoch else "optimizer steps"
    # The legend takes a line for every hundred characters, above the name of the first panel.
    extra = LEGEND_LINE * math.ceil(sum(len(name) + 8 for name in names) / 100)
    chart = figure("Training runs", f"{len(runs)} runs over their {unit}", 780 + extra, top=TOP + extra)
    domains = stacked([1.25, 1], 0.13)
    end = max(run.last_step * (_epochs_a_step(run) if by_epoch else 1.0) for run in runs)
    losses = [run.eval_losses for run in runs], [run.train["loss"] for run in runs]
    for number, (what, some, domain) in enumerate(
        zip(("Eval", "Train"), losses, domains, strict=True), start=1
    ):
        title, y_axis = loss_axis(some)
        x_axis = {"range": [0, end], "showticklabels": number == 2} | (
            {"matches": "x"} if number == 2 else {}
        )
        panel(chart, number, f"{what} {title.lower()}", y=domain, x_axis=x_axis, y_axis=y_axis)
    for place, (name, run) in enumerate(zip(names, runs, strict=True)):
        _draw(chart, run, name, place, by_epoch=by_epoch)
    if not any(run.evaluations() for run in runs):
        nothing_here(chart, 1, "nothing was evaluated")
    chart["layout"]["xaxis2"]["title"]["text"] = "epoch" if by_epoch else "optimizer step"
    inside = chart["layout"]["height"] - TOP - extra - BOTTOM
    chart["layout"]["legend"] |= {"x": 0, "xanchor": "left", "y": 1 + 30 / inside}
    return chart


def _draw(chart: Figure, run: TrainingRun, name: str, place: int, *, by_epoch: bool) -> None:
    """Both curves of a run in its colour, the best evaluation as a star."""
    color, dash = SERIES[place % len(SERIES)], _DASHES[place // len(SERIES) % len(_DASHES)]
    scale = _epochs_a_step(run) if by_epoch else 1.0
    shown: dict[str, Any] = {
        "legendgroup": str(place),
        "hovertemplate": f"%{{y:.4f}}<extra>{escape(name)}</extra>",
    }
    for number, points in ((1, _evaluated(run)), (2, _train_curve(run))):
        x = [step * scale for step in points[0]]
        trace = line((x, points[1]), escape(name), color, 2.25, number=number, **shown)
        trace["line"]["dash"] = dash
        chart["data"].append(trace | {"showlegend": number == 2})
    if run.best is not None:
        step, loss = run.best
        star = {"symbol": "star", "size": 14, "color": color, "line": {"color": PAPER, "width": 1}}
        best = {"type": "scatter", "mode": "markers", "x": [step * scale], "y": [loss], "marker": star}
        chart["data"].append({**best, **shown, "showlegend": False, "cliponaxis": False})


def _evaluated(run: TrainingRun) -> Points:
    points = run.evaluations()
    return [step for step, _ in points], [loss for _, loss in points]


def _train_curve(run: TrainingRun) -> Points:
    steps, losses = run.train["step"], run.train["loss"]
    return trend(steps, losses) or thinned(steps, losses)


def _epochs_a_step(run: TrainingRun) -> float:
    """The share of an epoch that one step is; 0 where the run names no epochs."""
    if not run.train["step"]:
        return 0.0
    step, epoch = run.train["step"][-1], run.train["epoch"][-1]
    return epoch / step if step > 0 and math.isfinite(epoch) else 0.0


def _outcome(figures: Mapping[str, Any]) -> dict[str, Any]:
    evaluation = figures["eval"] or {}
    return {
        "verdict": figures["verdict"],
        "steps": figures["steps"],
        "final_train_loss": figures["loss"]["final"],
        "best_eval": evaluation.get("best"),
        "final_eval": evaluation.get("final"),
        "tokens_per_s": figures["tokens_per_s"]["overall"],
        "peak_memory_mib": figures["peak_memory_mib"],
        "seconds": figures["seconds"],
    }


def _settings(run: TrainingRun) -> dict[str, Any]:
    facts = {key: run.start[key] for key in FACTS if key in run.start}
    return {**facts, **run.settings}
