"""From what some answers took to what all of them will take: tokens and hours, with their ranges.

The hours follow from Little's law: C places that are always taken get C · w / s tokens a second, where a row
has w of them and holds its place for s seconds on average. Every type counts as often as it waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtgdm.estimates import Expected


@dataclass(frozen=True)
class Answer:
    """What one answer took, its correction included."""

    type: str
    output_tokens: int | None
    held_s: Expected
    """How long it held its place, or would have held it with every other place taken."""
    at_start: bool = False
    """Whether it was among the first, which found the server idle and its model perhaps not loaded."""


def output_tokens(waiting: Mapping[str, int], answers: Sequence[Answer]) -> Expected | None:
    """Tokens of all the answers that wait, counted by type."""
    counted = [one for one in answers if one.output_tokens is not None]
    return _total(waiting, counted, [float(one.output_tokens or 0) for one in counted])


def lengths(kind: str, answers: Sequence[Answer]) -> Expected | None:
    """Tokens of one answer of a type: the mean, and the shortest and longest that were seen."""
    tokens = [one.output_tokens for one in answers if one.type == kind and one.output_tokens is not None]
    if not tokens:
        return None
    bounds = (min(tokens), max(tokens)) if len(tokens) > 1 else (None, None)
    return Expected(sum(tokens) / len(tokens), *bounds)


def hours(
    waiting: Mapping[str, int], answers: Sequence[Answer], places: int, took_s: float = 0.0
) -> Expected | None:
    """How long all that wait take, `places` at once.

    Where all the answers were among the first, nobody has seen the server at work, and there are two bounds:
    each row goes on as fast as these, or no more gets done in a second than in the `took_s` of all these.
    """
    late = [one for one in answers if not one.at_start]
    if any(one.output_tokens is None for one in answers):
        answers = late or answers  # the seconds of the first would count the loading of the model
    sizes = _sizes(answers)
    total = _total(waiting, answers, sizes)
    if total is None or total.mean is None:
        return None
    if not late:
        least_s, most_s = (
            total.mean / _speed(answers, sizes, "low") / places,
            total.mean / sum(sizes) * took_s,
        )
        return Expected(None, least_s, max(least_s, most_s)).times(1 / 3600)
    return Expected(
        total.mean / _speed(answers, sizes, "mean"),
        (total.mean if total.low is None else total.low) / _speed(answers, sizes, "low"),
        (total.mean if total.high is None else total.high) / _speed(answers, sizes, "high"),
    ).times(1 / places / 3600)


def tokens_per_s(answers: Sequence[Answer], places: int) -> float | None:
    """Tokens a second over all places; of the first rows alone where there are no others."""
    if not answers or any(one.output_tokens is None for one in answers):
        return None
    return min(places, len(answers)) * _speed(answers, _sizes(answers), "mean")


def _sizes(answers: Sequence[Answer]) -> list[float]:
    """How much each answer is: its tokens, or where these are not counted the seconds it took."""
    if any(one.output_tokens is None for one in answers):
        return [one.held_s.low or 0.0 for one in answers]
    return [float(one.output_tokens or 0) for one in answers]


def _speed(answers: Sequence[Answer], sizes: Sequence[float], bound: str) -> float:
    """What one place gets done in a second, by the rows that found the others taken where there are such."""
    some = [place for place, one in enumerate(answers) if not one.at_start] or range(len(answers))
    held_s = sum(getattr(answers[place].held_s, bound) for place in some)
    return sum(sizes[place] for place in some) / held_s if held_s else math.inf


def _total(waiting: Mapping[str, int], answers: Sequence[Answer], sizes: Sequence[float]) -> Expected | None:
    """The sizes of all that wait, from those of some.

    The range is that of the mean of size / mean of its type: types differ, and that they do is no
    uncertainty. A type that was not seen is taken to be as the others.
    """
    if not answers:
        return None
    by_type: dict[str, list[float]] = {}
    for one, size in zip(answers, sizes, strict=True):
        by_type.setdefault(one.type, []).append(size)
    means = {kind: sum(some) / len(some) for kind, some in by_type.items()}
    middle = sum(sizes) / len(sizes)
    total = sum(count * means.get(kind, middle) for kind, count in waiting.items())
    ratios = [size / means[kind] for kind, some in by_type.items() for size in some if means[kind]]
    return _range(ratios, len(means)).times(total)


def _range(ratios: Sequence[float], types: int) -> Expected:
    """The 95 % range of a mean of 1; the means of so many types were taken from the same values."""
    from mtgdm.scoring.statistics import mean_interval

    spare = len(ratios) - types
    if spare < 1:
        return Expected(1.0)
    if max(ratios) - min(ratios) < 1e-9:
        return Expected(1.0, 1.0, 1.0)
    found = mean_interval(ratios, shares=False)
    wider = math.sqrt((len(ratios) - 1) / spare)
    return Expected(1.0, max(0.0, 1 - wider * (1 - found.low)), 1 + wider * (found.high - 1))
