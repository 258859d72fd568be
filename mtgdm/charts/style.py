"""The visual language: figures as plotly JSON, built from panels that share colours, type and spacing.

Figures are plain dicts, so that building one imports nothing; a test lets plotly validate them. Sizes
are pixels of the figure at scale 1.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

Figure = dict[str, Any]
"""`{"data": [...], "layout": {...}}`, plotly's own JSON."""

WIDTH = 1100
LEFT, RIGHT, TOP, BOTTOM = 84, 40, 128, 64
FONTS = (
    "Inter, 'Open Sans', 'Liberation Sans', Arial, 'Noto Sans CJK SC', 'WenQuanYi Micro Hei', "
    "'Microsoft YaHei', 'PingFang SC', sans-serif"
)

INK = "#111827"
SOFT_INK = "#6b7280"
GRID = "#e5e7eb"
AXIS = "#b4b9c2"
PAPER = "#ffffff"
BLUE = "#2563eb"
ORANGE = "#ea580c"
GREEN = "#059669"
VIOLET = "#7c3aed"
TEAL = "#0d9488"
GREY = "#64748b"
PALE_GREY = "#94a3b8"
RED = "#dc2626"

DARK = {
    INK: "#f3f4f6",
    SOFT_INK: "#9ca3af",
    GRID: "#2c3340",
    AXIS: "#4b5563",
    PAPER: "#151a22",
    BLUE: "#60a5fa",
    ORANGE: "#fb923c",
    GREEN: "#34d399",
    VIOLET: "#a78bfa",
    TEAL: "#2dd4bf",
    GREY: "#a3b1c6",
    PALE_GREY: "#7b8798",
    RED: "#f87171",
}
"""What each colour becomes on a dark page."""

STUDENT, BASE = BLUE, PALE_GREY
"""The two models wear the same colours in every chart and table."""
SERIES = (BLUE, ORANGE, GREEN, VIOLET, TEAL, RED, GREY)
"""Things that are set side by side and have no colours of their own, in this order."""


def figure(title: str, subtitle: str, height: int, *, left: int = LEFT, top: int = TOP) -> Figure:
    """An empty figure with its title block."""
    layout = {
        "width": WIDTH,
        "height": height,
        "margin": {"l": left, "r": RIGHT, "t": top, "b": BOTTOM},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "font": {"family": FONTS, "size": 13, "color": INK},
        "title": {
            "text": f"<b>{escape(title)}</b>",
            "font": {"size": 21, "color": INK},
            "subtitle": {"text": escape(subtitle), "font": {"size": 13, "color": SOFT_INK}},
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "pad": {"l": 14, "t": 26},
        },
        "legend": {
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
            "font": {"size": 12.5},
            "itemsizing": "trace",
        },
        "hovermode": "closest",
        "hoverlabel": {"font": {"family": FONTS, "size": 12.5}},
        "annotations": [],
        "shapes": [],
    }
    return {"data": [], "layout": layout}


def stacked(heights: Sequence[float], gap: float) -> list[tuple[float, float]]:
    """Domains (bottom, top) from the top down for panels of these relative heights, `gap` between them."""
    unit = (1 - gap * (len(heights) - 1)) / sum(heights)
    domains = []
    top = 1.0
    for height in heights:
        bottom = top - height * unit
        domains.append((max(0.0, bottom), top))
        top = bottom - gap
    return domains


def beside(widths: Sequence[float], gap: float) -> list[tuple[float, float]]:
    """Domains (left, right) for panels side by side."""
    return [(1 - top, 1 - bottom) for bottom, top in stacked(widths, gap)]


def axis(name: str, number: int) -> str:
    """The n-th axis as traces name it: `x`, `x2`."""
    return name if number == 1 else f"{name}{number}"


def panel(
    chart: Figure,
    number: int,
    title: str,
    *,
    y: tuple[float, float],
    x: tuple[float, float] = (0.0, 1.0),
    x_axis: dict[str, Any] | None = None,
    y_axis: dict[str, Any] | None = None,
) -> None:
    """Add the n-th pair of axes with the panel's name above its left corner."""
    layout = chart["layout"]
    layout[f"xaxis{'' if number == 1 else number}"] = {
        "domain": list(x),
        "anchor": axis("y", number),
        "gridcolor": GRID,
        "zeroline": False,
        "showline": True,
        "linecolor": AXIS,
        "ticks": "outside",
        "tickcolor": AXIS,
        "ticklen": 5,
        "title": {"font": {"size": 12.5, "color": SOFT_INK}, "standoff": 8},
        "separatethousands": True,
        **(x_axis or {}),
    }
    layout[f"yaxis{'' if number == 1 else number}"] = {
        "domain": list(y),
        "anchor": axis("x", number),
        "gridcolor": GRID,
        "zeroline": False,
        "ticklabelstandoff": 6,
        "exponentformat": "power",
        "separatethousands": True,
        **(y_axis or {}),
    }
    if title:
        name_panel(chart, f"<b>{escape(title)}</b>", x=x[0], y=y[1])


def name_panel(chart: Figure, text: str, *, x: float, y: float) -> None:
    """Write a panel's name above its upper left corner."""
    note(chart, text, x=x, y=y, size=13, anchor="left", shift=(2, 8), bottom=True)


def note(
    chart: Figure,
    text: str,
    *,
    x: Any,
    y: Any,
    size: float = 12,
    color: str = INK,
    anchor: str = "center",
    shift: tuple[float, float] = (0, 0),
    bottom: bool = False,
    axes: tuple[str, str] = ("paper", "paper"),
    behind: str = "rgba(0,0,0,0)",
) -> None:
    """Put a text on the figure; `text` is plotly's markup, so escape what comes from data."""
    chart["layout"]["annotations"].append(
        {
            "text": text,
            "x": x,
            "y": y,
            "xref": axes[0],
            "yref": axes[1],
            "xanchor": anchor,
            "yanchor": "bottom" if bottom else "middle",
            "xshift": shift[0],
            "yshift": shift[1],
            "showarrow": False,
            "bgcolor": behind,
            "borderpad": 0,
            "font": {"size": size, "color": color},
            "align": anchor,
        }
    )


def line(
    points: tuple[Sequence[float], Sequence[float]],
    name: str,
    color: str,
    width: float,
    *,
    number: int = 1,
    opacity: float = 1.0,
    **more: Any,
) -> dict[str, Any]:
    """A line in panel n; one of few points has markers, for between them nothing is known."""
    x, y = points
    few, single = len(x) <= 40, len(x) <= 3
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "x": list(x),
        "y": list(y),
        "xaxis": axis("x", number),
        "yaxis": axis("y", number),
        "name": name,
        "opacity": opacity,
        "line": {"color": color, "width": width, "simplify": False},
        "marker": {"color": color, "size": 9 if single else 5.5},
        "cliponaxis": not few,
        **more,
    }


def line_shape(
    chart: Figure, *, number: int, color: str, x: Any = None, y: Any = None, dash: str = "dash"
) -> None:
    """A straight line across panel n: level at `y`, or upright at `x`."""
    across = (
        {"x0": 0, "x1": 1, "xref": f"{axis('x', number)} domain", "y0": y, "y1": y, "yref": axis("y", number)}
        if x is None
        else {
            "x0": x,
            "x1": x,
            "xref": axis("x", number),
            "y0": 0,
            "y1": 1,
            "yref": f"{axis('y', number)} domain",
        }
    )
    chart["layout"]["shapes"].append(
        {"type": "line", "layer": "below", "line": {"color": color, "width": 1.25, "dash": dash}, **across}
    )


def nothing_here(chart: Figure, number: int, text: str) -> None:
    """Say in the middle of panel n why it is empty; its axis would count what is not there."""
    chart["layout"][f"yaxis{'' if number == 1 else number}"]["showticklabels"] = False
    note(
        chart,
        escape(text),
        x=0.5,
        y=0.5,
        color=SOFT_INK,
        size=13,
        axes=(f"{axis('x', number)} domain", f"{axis('y', number)} domain"),
    )


def escape(text: str) -> str:
    """Text from data, made safe for plotly's markup."""
    return html.escape(text, quote=False)


def faded(color: str, opacity: float) -> str:
    """A fill of a colour: `#rrggbb` with its opacity, which keeps the colour findable for a dark page."""
    return f"{color}{round(opacity * 255):02x}"
