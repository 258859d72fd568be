"""What `mtgdm plan` says of a stage: quantities by name, the same in JSON and in words.

A name says what is counted: `prompt_tokens_at_most: 61204` is shown as `61,204 prompt tokens at most`.
Numbers stand before their name, texts behind it; None, which is not known, is left out. `hours` are shown as
minutes or days where that reads better, and `..._per_s` as a rate. A quantity in parts is a dictionary by part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Expected:
    """A quantity nobody knows yet: what is expected, and the range it may well lie in.

    `mean` is None where no more than the range can be said, the bounds are where nothing is known of it.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None

    def times(self, factor: float) -> Expected:
        """So many times as much."""
        values = (self.mean, self.low, self.high)
        return Expected(*(None if value is None else value * factor for value in values))

    def rounded(self, digits: int = 0) -> Expected:
        """The same to so many digits after the point."""
        values = (self.mean, self.low, self.high)
        return Expected(*(None if value is None else round(value, digits or None) for value in values))


def as_json(estimate: Mapping[str, Any]) -> dict[str, Any]:
    """The quantities as JSON holds them; what is expected as `mean`, `low` and `high`."""
    return {
        name: asdict(value)
        if isinstance(value, Expected)
        else as_json(value)
        if isinstance(value, Mapping)
        else value
        for name, value in estimate.items()
    }


def in_words(estimate: Mapping[str, Any]) -> list[str]:
    """The quantities as lines for a reader."""
    lines: list[str] = []
    for name, value in estimate.items():
        if value is None or value == {}:
            continue
        if isinstance(value, Mapping) and all(isinstance(part, Mapping) for part in value.values()):
            lines.extend(f"{part}: {', '.join(in_words(of_part))}" for part, of_part in value.items())
        elif isinstance(value, Mapping):
            lines.append(f"{_words(name)}: {', '.join(in_words(value))}")
        else:
            lines.append(_line(name, value))
    return lines


def _line(name: str, value: Any) -> str:
    if isinstance(value, str):
        return f"{_words(name)}: {value}"
    if name == "hours":
        return _time(value if isinstance(value, Expected) else Expected(value))
    unit = f"{_words(name.removesuffix('_per_s'))}/s" if name.endswith("_per_s") else _words(name)
    if isinstance(value, Expected):
        return _range(value, unit)
    return f"{value:,} {unit}" if isinstance(value, int) else _range(Expected(value), unit)


def _time(hours: Expected) -> str:
    longest_s = 3600 * max((value for value in (hours.mean, hours.low, hours.high) if value), default=0.0)
    if longest_s < 1:
        return "less than a second"
    for unit, seconds in (("days", 86400), ("h", 3600), ("min", 60)):
        if longest_s >= 2 * seconds:
            return _range(hours.times(3600 / seconds), unit)
    return _range(hours.times(3600), "s")


def _range(value: Expected, unit: str) -> str:
    """`5.2 h (4.1-6.4)`, or what of it is known."""
    between = None if value.low is None or value.high is None else f"{_about(value.low)}-{_about(value.high)}"
    if value.mean is None:
        return f"{between} {unit}"
    return f"{_about(value.mean)} {unit}" + (f" ({between})" if between else "")


def _about(value: float) -> str:
    """To three digits, and to no more than two places: the rest would be pretence."""
    size = abs(value)
    if isinstance(value, int) and size < 1000:
        return str(value)
    if size >= 1000:
        step = 10 ** (len(str(int(size))) - 3)
        return f"{round(value / step) * step:,}"
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 1 else f"{value:.2f}"


def _words(name: str) -> str:
    return name.replace("_", " ").replace("mib ", "MiB ").replace("gpu", "GPU")
