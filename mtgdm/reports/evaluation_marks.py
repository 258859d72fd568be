"""Marks that the charts of an evaluation share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mtgdm.charts.style import (
    BASE,
    STUDENT,
    Figure,
    axis,
    faded,
)
from mtgdm.reports.evaluation import Evaluation, Who
from mtgdm.terminal import counted

DRAWN: tuple[tuple[Who, str], ...] = (("base", BASE), ("student", STUDENT))
"""Who stands in the charts, in the order of drawing."""


def legend(chart: Figure, evaluation: Evaluation) -> None:
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


def bars(
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


def keep_axes(chart: Figure, number: int) -> None:
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


def subtitle_of(evaluation: Evaluation) -> str:
    """How many rows and spots a chart is about."""
    rows = counted(len(evaluation.rows), "row")
    return f"{rows} · {counted(evaluation.spots, 'spot')}" if evaluation.spots else rows
