"""Whether a training run went well: its figures, one word for it, and the reasons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from mtgdm.reports.training_run import TrainingRun, known
from mtgdm.reports.values import brief, share
from mtgdm.scoring.statistics import percentile
from mtgdm.terminal import counted

RISE = 0.02
"""Eval loss this much (relative) over its best, for two evaluations or more, is over-fitting, not noise."""
FALL = 0.02
"""Eval loss that still falls by this much (relative) at the end says that training stopped early."""
LEARNT = 0.05
"""Train loss that fell by less than this (relative) says that next to nothing was learnt."""
ENOUGH = 20
"""So many logged steps make a trend to judge that by."""
SPIKE = 5.0
"""A gradient norm this many times the median is a spike."""
DRIFT = 0.25
"""Steps that take this much longer (relative) at the end than at the start are worth a look."""

Verdict = tuple[str, list[str]]


def describe(run: TrainingRun) -> dict[str, Any]:
    """The figures of a run as plain JSON values; NaN where a value is not known."""
    verdict, reasons = judge(run)
    return {
        "verdict": verdict,
        "reasons": reasons,
        "complete": run.end is not None,
        "steps": {
            "last": run.last_step,
            "total": run.total_steps,
            "logged": len(run.train["step"]),
        },
        "loss": _loss(run),
        "eval": _eval(run),
        "gradient_norm": _gradients(run),
        "step_seconds": _step_seconds(run),
        "tokens_per_s": _spread(known(run.train["tokens_per_s"])),
        "learning_rate": _learning_rate(run),
        "peak_memory_mib": max(known(run.train["peak_memory_mib"]), default=math.nan),
        "seconds": _seconds(run),
        "run": run.start,
        "end": run.end,
        "warnings": run.warnings,
        "notes": run.notes,
    }


def judge(run: TrainingRun) -> Verdict:
    """One word for the run and the reasons.

    The words: `healthy`, `over-fitting`, `under-fitting`, `still improving`, `diverged`, `too little data`.
    """
    word, reasons = _learning(run)
    general, why = _generalisation(run)
    if word == "healthy":
        word = general or word
    return word, [*_unfinished(run), *reasons, *why, *_gradient_reasons(run), *_speed_reasons(run)]


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last twentieth of the finite losses (at most 50 each)."""
    finite = known(losses)
    if not finite:
        return math.nan, math.nan
    size = min(50, max(1, len(finite) // 20))
    return fmean(finite[:size]), fmean(finite[-size:])


def perplexity(loss: float) -> float:
    """`exp(loss)`; infinite where it cannot be held."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


# --- the verdict ---------------------------------------------------------------------------------


def _unfinished(run: TrainingRun) -> list[str]:
    if run.end is not None:
        return []
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    return [f"the run did not end: the last step known is {run.last_step:,}{of}"]


def _learning(run: TrainingRun) -> Verdict:
    """What the train loss says."""
    losses = run.train["loss"]
    first, last = ends(losses)
    lost = [
        int(step) for step, loss in zip(run.train["step"], losses, strict=True) if not math.isfinite(loss)
    ]
    if lost:
        return "diverged", [
            f"the train loss is not a number at {counted(len(lost), 'step')}, first at step {lost[0]:,}: "
            "lower --lr"
        ]
    if len(losses) < 2:
        return "too little data", [
            f"{counted(len(losses), 'training step')} logged: there is no trend to judge"
        ]
    change = f" ({share(last / first - 1)})" if first else ""
    reasons = [f"train loss went from {first:.3f} to {last:.3f}{change}"]
    if last > first * 1.05:
        return "diverged", [*reasons, "the train loss rose: lower --lr"]
    if len(losses) >= ENOUGH and last > first * (1 - LEARNT):
        return "under-fitting", [
            *reasons,
            "next to nothing was learnt: a higher --lr, a higher --lora-r or more --epochs may help",
        ]
    return "healthy", reasons


def _generalisation(run: TrainingRun) -> Verdict:
    """What the evaluations say of over- and under-fitting."""
    evaluations = run.evaluations()
    if not evaluations:
        return "", ["nothing was evaluated: whether it generalises is not known"]
    best = min(range(len(evaluations)), key=lambda place: evaluations[place][1])
    best_step, best_loss = evaluations[best]
    final_step, final_loss = evaluations[-1]
    after = len(evaluations) - 1 - best
    if len(evaluations) == 1:
        return "", [f"eval loss {best_loss:.3f} at step {best_step:,.0f}, measured once: no trend to judge"]
    if after == 0:
        return _lowest_at_the_end(run, evaluations)
    if after >= 2 and final_loss > best_loss * (1 + RISE):
        return "over-fitting", [
            f"eval loss rose for {after} evaluations after step {best_step:,.0f}, from {best_loss:.3f} to "
            f"{final_loss:.3f} at step {final_step:,.0f}: {_which_checkpoint(run, int(best_step))}"
        ]
    reason = f"eval loss was lowest at step {best_step:,.0f} ({best_loss:.3f}) and ends at {final_loss:.3f}"
    if run.kept_step is not None:
        reason += f": {_which_checkpoint(run, int(best_step))}"
    return "", [reason]


def _lowest_at_the_end(run: TrainingRun, evaluations: list[tuple[float, float]]) -> Verdict:
    (_, before), (step, final) = evaluations[-2:]
    where = f"{final:.3f} at step {step:,.0f}"
    if before > 0 and final < before * (1 - FALL):
        advice = ": more --epochs may help" if run.end is not None else ""
        return "still improving", [
            f"eval loss is lowest at the end ({where}) and fell "
            f"by {1 - final / before:.1%} since the evaluation before{advice}"
        ]
    return "", [f"eval loss is lowest at the end ({where}) and has levelled out"]


def _which_checkpoint(run: TrainingRun, best_step: int) -> str:
    """What to do about a run whose best is not its end."""
    if run.kept_step == best_step:
        return "use that checkpoint, it is the one kept"
    if run.kept_step is not None:
        return f"the checkpoint kept is that of step {run.kept_step:,}"
    return "use the checkpoint of that step, if it was kept"


def _gradient_reasons(run: TrainingRun) -> list[str]:
    figures = _gradients(run)
    reasons = []
    if figures["spikes"]:
        reasons.append(
            f"gradient norm spiked {counted(figures['spikes'], 'time')} over {SPIKE:g} times its median, "
            f"most at step {figures['max_step']:,} ({figures['max']:.2f})"
        )
    if figures["not_finite"]:
        reasons.append(f"the gradient norm was infinite at {counted(figures['not_finite'], 'logged step')}")
    if figures["clipped"] is not None and figures["clipped"] > 0.5:
        reasons.append(f"{figures['clipped']:.0%} of the logged steps were clipped at {figures['clip']:g}")
    return reasons


def _speed_reasons(run: TrainingRun) -> list[str]:
    figures = _step_seconds(run)
    drift = figures["drift"]
    if not (math.isfinite(drift) and drift > DRIFT):
        return []
    return [
        f"a step took {drift:.0%} longer at the end ({brief(figures['late'])} s) than at the start "
        f"({brief(figures['early'])} s): the machine was shared or hot, or the rows grew longer"
    ]


# --- the figures ---------------------------------------------------------------------------------


def _loss(run: TrainingRun) -> dict[str, Any]:
    first, last = ends(run.train["loss"])
    finite = known(run.train["loss"])
    return {
        "first": first,
        "final": last,
        "min": min(finite, default=math.nan),
        "reduction": 1 - last / first if first else math.nan,
        "not_finite": len(run.train["loss"]) - len(finite),
    }


def _eval(run: TrainingRun) -> dict[str, Any] | None:
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


def _gradients(run: TrainingRun) -> dict[str, Any]:
    norms = run.train["grad_norm"]
    finite = known(norms)
    spread = _spread(finite)
    top = max(finite, default=math.nan)
    at = run.train["step"][norms.index(top)] if finite else math.nan
    return {
        **spread,
        "max": top,
        "max_step": int(at) if math.isfinite(at) else None,
        "spikes": sum(norm > SPIKE * spread["p50"] for norm in finite) if spread["p50"] > 0 else 0,
        "clip": run.clip,
        "clipped": sum(norm > run.clip for norm in finite) / len(finite) if finite and run.clip else None,
        "not_finite": sum(math.isinf(norm) for norm in norms),
    }


def _step_seconds(run: TrainingRun) -> dict[str, Any]:
    """The time of a step; `drift` says how much longer the last fifth of them took than the first."""
    finite = known(run.train["step_seconds"])
    fifth = len(finite) // 5
    early = late = drift = math.nan
    if fifth >= 2:
        # The first steps warm caches up and are no measure of drift.
        early, late = median(finite[1 : 1 + fifth]), median(finite[-fifth:])
        drift = late / early - 1 if early > 0 else math.nan
    return {**_spread(finite), "early": early, "late": late, "drift": drift}


def _learning_rate(run: TrainingRun) -> dict[str, Any]:
    rates = run.train["learning_rate"]
    finite = known(rates)
    top = max(finite, default=math.nan)
    at = run.train["step"][rates.index(top)] if finite else math.nan
    return {
        "max": top,
        "max_step": int(at) if math.isfinite(at) else None,
        "final": finite[-1] if finite else math.nan,
    }


def _seconds(run: TrainingRun) -> float:
    """How long the run took; of one without an end the time of its steps alone."""
    seconds = (run.end or {}).get("seconds")
    if run.end is not None or not known(run.train["step_seconds"]):
        return float(seconds) if isinstance(seconds, int | float) else math.nan
    steps = run.train["step"]
    since = (step - before for before, step in zip((0.0, *steps[:-1]), steps, strict=True))
    # A point tells the mean of the steps since the one before it.
    return math.fsum(
        known([mean * count for mean, count in zip(run.train["step_seconds"], since, strict=True)])
    )


def _spread(finite: list[float]) -> dict[str, Any]:
    ordered = sorted(finite)  # once: sorting what is sorted costs next to nothing
    return {
        "mean": fmean(ordered) if ordered else math.nan,
        "p50": percentile(ordered, 0.5),
        "p95": percentile(ordered, 0.95),
    }
