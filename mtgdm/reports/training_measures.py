"""The figures of a training run: loss, gradients, speed, memory, time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from statistics import fmean, median
from typing import Any

from mtgdm.reports.training_run import TrainingRun, known, number
from mtgdm.scoring.statistics import percentile

SPIKE = 5.0
"""A gradient norm this many times the median is a spike."""


def loss(run: TrainingRun) -> dict[str, Any]:
    """The train loss at both ends of the run."""
    first, last = ends(run.train["loss"])
    finite = known(run.train["loss"])
    return {
        "first": first,
        "final": last,
        "min": min(finite, default=math.nan),
        "reduction": 1 - last / first if first else math.nan,
        "not_finite": len(run.train["loss"]) - len(finite),
    }


def evaluation(run: TrainingRun) -> dict[str, Any] | None:
    """The eval loss over the run; None where nothing was evaluated."""
    if not run.eval_steps:
        return None
    best = run.best
    first, final = run.eval_losses[0], run.eval_losses[-1]
    _, train = ends(run.train["loss"])
    return {
        "evaluations": len(run.eval_steps),
        "first": {"step": int(run.eval_steps[0]), "loss": first, "perplexity": perplexity(first)},
        "best": None
        if best is None
        else {"step": best[0], "loss": best[1], "perplexity": perplexity(best[1])},
        "final": {"step": int(run.eval_steps[-1]), "loss": final, "perplexity": perplexity(final)},
        "kept_step": run.kept_step,
        "gap_to_train": final - train,
    }


def gradients(run: TrainingRun) -> dict[str, Any]:
    """The gradient norms, their highest, and how many were clipped or no finite number."""
    norms = run.train["grad_norm"]
    finite = known(norms)
    over_steps = spread(finite)
    top = max(finite, default=math.nan)
    at = run.train["step"][norms.index(top)] if finite else math.nan
    return {
        **over_steps,
        "max": top,
        "max_step": int(at) if math.isfinite(at) else None,
        "spikes": sum(norm > SPIKE * over_steps["p50"] for norm in finite) if finite else 0,
        "clip": run.clip,
        "clipped": sum(norm > run.clip for norm in finite) / len(finite) if finite and run.clip else None,
        "not_finite": len(run.bad_norms),
    }


def step_seconds(run: TrainingRun) -> dict[str, Any]:
    """The time of a step; `drift` says how much longer the last fifth of them took than the first."""
    finite = known(run.train["step_seconds"])
    fifth = len(finite) // 5
    early = late = drift = math.nan
    if fifth >= 2:
        # The first steps warm caches up and are no measure of drift.
        early, late = median(finite[1 : 1 + fifth]), median(finite[-fifth:])
        drift = late / early - 1 if early > 0 else math.nan
    return {**spread(finite), "early": early, "late": late, "drift": drift}


def learning_rate(run: TrainingRun) -> dict[str, Any]:
    """The highest learning rate and the last."""
    rates = run.train["learning_rate"]
    finite = known(rates)
    top = max(finite, default=math.nan)
    at = run.train["step"][rates.index(top)] if finite else math.nan
    return {
        "max": top,
        "max_step": int(at) if math.isfinite(at) else None,
        "final": finite[-1] if finite else math.nan,
    }


def seconds(run: TrainingRun) -> float:
    """How long the run took; of one without an end the time of its steps alone."""
    if run.end is not None or not known(run.train["step_seconds"]):
        return number((run.end or {}).get("seconds"))
    return math.fsum(filter(math.isfinite, _times(run)))


def speed(run: TrainingRun) -> dict[str, Any]:
    """Tokens a second: over the points logged, and `overall`, all tokens by the time of all steps."""
    rates = run.train["tokens_per_s"]
    time = math.fsum(
        time for rate, time in zip(rates, _times(run), strict=True) if math.isfinite(rate * time)
    )
    tokens = math.fsum(
        filter(math.isfinite, (rate * time for rate, time in zip(rates, _times(run), strict=True)))
    )
    return {**spread(known(rates)), "overall": tokens / time if time > 0 else math.nan}


def peak_memory(run: TrainingRun) -> float:
    """The most memory in MiB that a point or the end of the run tells of."""
    logged = max(known(run.train["peak_memory_mib"]), default=math.nan)
    return max(known([logged, number((run.end or {}).get("peak_memory_mib"))]), default=math.nan)


def _times(run: TrainingRun) -> Iterator[float]:
    """The seconds behind each point, which tells the mean of the steps since the one before it."""
    steps = pairwise(chain((0.0,), run.train["step"]))
    for mean, (before, step) in zip(run.train["step_seconds"], steps, strict=True):
        # A run that went on from an older checkpoint takes steps anew; how many is not told.
        yield mean * max(0.0, step - before)


def spread(finite: list[float]) -> dict[str, Any]:
    """Mean, median and 95th percentile; NaN where there is no value."""
    ordered = sorted(finite)  # once: sorting what is sorted costs next to nothing
    return {
        "mean": fmean(ordered) if ordered else math.nan,
        "p50": percentile(ordered, 0.5),
        "p95": percentile(ordered, 0.95),
    }


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last of the finite losses."""
    finite = known(losses)
    if not finite:
        return math.nan, math.nan
    size = end_size(len(finite))
    return fmean(finite[:size]), fmean(finite[-size:])


def end_size(count: int) -> int:
    """How many of `count` points make an end of a run: a twentieth, of short runs a fifth, but never one alone."""
    return max(1, min(count // 2, max(3, min(10, count // 5), min(50, count // 20))))


def ends_error(losses: Sequence[float]) -> float:
    """Standard error of the difference between the two means of `ends`, from two finite losses on.

    The noise of a point is taken from the jumps between neighbours, which a trend hardly enters.
    """
    finite = known(losses)
    noise = math.sqrt(fmean((later - before) ** 2 for before, later in pairwise(finite)) / 2)
    return noise * math.sqrt(2 / end_size(len(finite)))


def perplexity(loss: float) -> float:
    """`exp(loss)`; infinite where it cannot be held."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
