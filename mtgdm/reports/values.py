"""Figures as JSON takes them and as people read them."""

from __future__ import annotations

import math
from typing import Any


def finite(value: Any) -> Any:
    """JSON values with NaN and the infinities, which JSON has no word for, as null; floats to 6 digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def shown(value: Any, digits: int = 2) -> str:
    """A number for people: fixed digits, a dash where it is not known."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:,.{digits}f}".replace("-", "−")


def brief(value: Any) -> str:
    """A number for people with three digits that count, whatever its size."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}").replace("-", "−")


def span(bounds: Any, digits: int = 2) -> str:
    """An interval for people; nothing where it is not known."""
    low, high = bounds
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{shown(low, digits)} to {shown(high, digits)}"


def share(value: Any) -> str:
    """A share as signed per cent."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "–"
    return f"{value:+.0%}".replace("-", "−")


def clock(seconds: Any) -> str:
    """A duration: `1:52`, `3:02:11`."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
