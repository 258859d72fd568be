"""What a mean over rows says, and how sure it is.

Rows about one spot rise and fall together, so that 63 rows of 21 spots tell less than 63 rows of 63
spots. Where `groups` names each row's spot, whole spots are resampled. Everything is seeded: the same
values give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy

Verdict = Literal["better", "worse", "too few rows to tell"]

RESAMPLES = 2000
SEED = 20240521
SMALLEST_PAIRS = 6
"""With fewer spots even an unbroken row of wins is chance: 2 · 0.5^5 is 0.06, 2 · 0.5^6 is 0.03."""
ROUNDING = 1e-12
"""An interval no wider than this is of values that are all the same."""
FEW = 8
"""With fewer spots resampling cannot reach as far as it should: its means stay within those that were seen."""
PLENTY = 2000
"""From so many spots on, resampling only repeats the normal approximation, at some cost."""


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; `nan` where rows are too few to know."""

    mean: float
    low: float
    high: float
    rows: int


@dataclass(frozen=True)
class Difference:
    """The mean of student - base over the same rows, its interval, and what may be said of it."""

    mean: float
    low: float
    high: float
    rows: int
    verdict: Verdict


def mean_interval(
    values: Sequence[float],
    confidence: float = 0.95,
    *,
    groups: Sequence[Hashable] | None = None,
    shares: bool = True,
) -> Interval:
    """The mean and its bootstrap interval, resampled by group where groups are given.

    `shares`: the values cannot leave 0..1, as every metric but counts, lengths and times.

    No values: all `nan`. One value or one group: the mean, with bounds `nan`. Where every group has the same
    mean, resampling sees no spread, which does not mean that there is none (0 of 21 does not mean never):

    - of values between 0 and 1, whose spread is at most that of a share, the bounds are Wilson's, with a
      group as the unit;
    - of counts that are all 0, the upper bound is that of a Poisson rate seen `groups` times, -ln(alpha/2) / groups;
    - of anything else nothing is known: `nan`.
    """
    totals, counts = _totals(values, groups)
    mean = float(sum(values)) / len(values) if len(values) else math.nan
    if len(totals) < 2:
        return Interval(mean, math.nan, math.nan, len(values))
    low, high = _bootstrap(totals, counts, confidence)
    if high - low <= ROUNDING * max(1.0, abs(mean)):
        low, high = _without_spread(values, mean, len(totals), confidence, shares=shares)
        if math.isnan(low):
            return Interval(mean, low, high, len(values))
    if shares:
        low, high = max(0.0, low), min(1.0, high)
    return Interval(mean, min(low, mean), max(high, mean), len(values))


def paired_difference(
    student: Sequence[float],
    base: Sequence[float],
    confidence: float = 0.95,
    *,
    groups: Sequence[Hashable] | None = None,
    lower_is_better: bool = False,
) -> Difference:
    """What the student gains over the base, row by row, with a paired bootstrap interval.

    The verdict is `better` or `worse` where the interval leaves 0 out and there are at least
    `SMALLEST_PAIRS` groups (rows, without groups); else the rows are too few to tell.
    """
    gains = [float(one) - float(other) for one, other in zip(student, base, strict=True)]
    totals, counts = _totals(gains, groups)
    mean = sum(gains) / len(gains) if gains else math.nan
    if len(totals) < 2:
        return Difference(mean, math.nan, math.nan, len(gains), "too few rows to tell")
    low, high = _bootstrap(totals, counts, confidence)
    if high - low <= ROUNDING * max(1.0, abs(mean)):
        # All gain the same: which way they go is known, and not how far others would.
        low = high = math.nan
    gained = low > 0 or (math.isnan(low) and mean > ROUNDING)
    lost = high < 0 or (math.isnan(high) and mean < -ROUNDING)
    verdict: Verdict = "too few rows to tell"
    if len(totals) >= SMALLEST_PAIRS and (gained or lost):
        verdict = "better" if gained is not lower_is_better else "worse"
    return Difference(mean, low, high, len(gains), verdict)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0..1) of the values lie, interpolated; `nan` where there are none."""
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return float(ordered[below] + (ordered[above] - ordered[below]) * (place - below))


def _totals(values: Sequence[float], groups: Sequence[Hashable] | None) -> tuple[list[float], list[int]]:
    """Sum and number of the values of each group, in order of appearance; each value alone without groups."""
    if groups is None:
        return [float(value) for value in values], [1] * len(values)
    sums: dict[Hashable, float] = {}
    counts: dict[Hashable, int] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + float(value)
        counts[group] = counts.get(group, 0) + 1
    return list(sums.values()), list(counts.values())


def _bootstrap(totals: list[float], counts: list[int], confidence: float) -> tuple[float, float]:
    """Percentile bootstrap of sum(totals) / sum(counts), widened for few units as a t interval is."""
    import numpy

    units = len(totals)
    sums, sizes = numpy.asarray(totals), numpy.asarray(counts, dtype=float)
    if units >= PLENTY or units < FEW:
        return _normal(sums, sizes, confidence)
    picks = numpy.random.default_rng(SEED).integers(0, units, size=(RESAMPLES, units))
    means = sums[picks].sum(axis=1) / sizes[picks].sum(axis=1)
    # A plain percentile interval is too narrow for few units, by the n - 1 and by the t quantile
    # (Hesterberg 2015, section 5.3): a little further out are the points that cover as promised.
    reach = _t_quantile((1 + confidence) / 2, units - 1) * math.sqrt(units / (units - 1))
    tail = NormalDist().cdf(-reach)
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _normal(
    sums: numpy.ndarray[Any, Any], sizes: numpy.ndarray[Any, Any], confidence: float
) -> tuple[float, float]:
    """A t interval around a ratio of sums, its spread from the residuals of the units (Cochran 1977, section 6.4)."""
    units = len(sums)
    mean = float(sums.sum() / sizes.sum())
    residuals = float(((sums - mean * sizes) ** 2).sum()) * units / (units - 1)
    reach = _t_quantile((1 + confidence) / 2, units - 1) * residuals**0.5 / float(sizes.sum())
    return mean - reach, mean + reach


def _without_spread(
    values: Sequence[float], mean: float, units: int, confidence: float, *, shares: bool
) -> tuple[float, float]:
    """Bounds of a mean where every unit has the same."""
    if shares:
        return _wilson(mean, units, confidence)
    if not any(values):
        return 0.0, -math.log((1 - confidence) / 2) / units
    return math.nan, math.nan


def _wilson(share: float, units: int, confidence: float) -> tuple[float, float]:
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z * z / (2 * units)) / (1 + z * z / units)
    reach = z / (1 + z * z / units) * math.sqrt(share * (1 - share) / units + z * z / (4 * units * units))
    return max(0.0, middle - reach), min(1.0, middle + reach)


def _t_quantile(share: float, freedom: int) -> float:
    """Student's t quantile: in closed form for 1 and 2 degrees of freedom, else by the Cornish-Fisher expansion.

    The expansion is within 2 % from 3 degrees of freedom on.
    """
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(2 / (4 * share * (1 - share)))
    z = NormalDist().inv_cdf(share)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
