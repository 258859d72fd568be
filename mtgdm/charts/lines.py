"""Lines of any length as a chart can hold them: thinned so that extremes survive, and smoothed without lag."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

MOST_POINTS = 3000
"""A line of more points is drawn by the lowest and highest of each bucket, so that extremes survive."""

Points = tuple[list[float], list[float]]


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> Points:
    """The line with at most about `most` points: of each bucket its lowest and highest, in order."""
    if len(x) <= most:
        return list(x), [value if math.isfinite(value) else math.nan for value in y]
    values = _buckets(y, most // 2)
    finite = np.isfinite(values)
    lows = np.where(finite, values, np.inf).argmin(axis=1)
    highs = np.where(finite, values, -np.inf).argmax(axis=1)
    begins = np.arange(len(values)) * values.shape[1]
    some = finite.any(axis=1)
    kept = np.unique(np.concatenate([(begins + lows)[some], (begins + highs)[some]]))
    return [float(x[place]) for place in kept], [float(y[place]) for place in kept]


def trend(x: Sequence[float], y: Sequence[float]) -> Points | None:
    """The smoothed line over a window of a fortieth of the run; None where there is nothing to smooth.

    A line longer than a chart can hold is averaged by bucket before.
    """
    if len(x) > MOST_POINTS:
        x, y = averaged(x, MOST_POINTS // 2), averaged(y, MOST_POINTS // 2)
    window = min(len(x) / 40, 50)
    return (list(x), smoothed(y, 1 - 1 / window)) if window >= 2 else None


def averaged(values: Sequence[float], count: int) -> list[float]:
    """The mean of the finite values of each of at most `count` buckets; NaN where a bucket has none."""
    buckets = _buckets(values, count)
    finite = np.isfinite(buckets)
    sums, sizes = np.where(finite, buckets, 0.0).sum(axis=1), finite.sum(axis=1)
    means: list[float] = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan).tolist()
    return means


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


def _buckets(values: Sequence[float], count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The values in at most `count` rows of one length, the last filled up with NaN."""
    size = math.ceil(len(values) / count)
    rows = math.ceil(len(values) / size)
    filled = np.full(rows * size, np.nan)
    filled[: len(values)] = values
    return filled.reshape(rows, size)
