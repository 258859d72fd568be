"""Whether a training run went well: its figures, one word for it, and the reasons."""

from __future__ import annotations

import math
from itertools import takewhile
from typing import Any

from mtgdm.reports import training_measures as measures
from mtgdm.reports.training_measures import SPIKE
from mtgdm.reports.training_run import TrainingRun, number
from mtgdm.reports.values import brief, share
from mtgdm.terminal import counted

RISE = 0.02
"""Eval loss this much (relative) over its best, for two evaluations or more, is over-fitting, not noise."""
FALL = 0.02
"""Eval loss that still falls by this much (relative) at the end says that training stopped early."""
LEARNT = 0.05
"""Train loss that fell by less than this (relative) says that next to nothing was learnt."""
ENOUGH = 20
"""So many logged steps make a trend to judge that by."""
CLIMB = 0.05
"""Train loss that rose by more than this (relative), and beyond its noise, has diverged."""
BEYOND_NOISE = 2.0
"""So many standard errors of the difference of two means are more than the noise of their points."""
LOST = 2
"""So many logged steps to the end of a run without a finite gradient norm: it learns no more."""
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
        "loss": measures.loss(run),
        "eval": measures.evaluation(run),
        "gradient_norm": measures.gradients(run),
        "step_seconds": measures.step_seconds(run),
        "tokens_per_s": measures.speed(run),
        "learning_rate": measures.learning_rate(run),
        "peak_memory_mib": measures.peak_memory(run),
        "seconds": measures.seconds(run),
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


# --- the verdict ---------------------------------------------------------------------------------


def _unfinished(run: TrainingRun) -> list[str]:
    if run.end is not None:
        return []
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    return [f"the run did not end: the last step known is {run.last_step:,}{of}"]


def _learning(run: TrainingRun) -> Verdict:
    """What the train loss says, and every loss and gradient that is no number."""
    losses = run.train["loss"]
    if broken := _no_numbers(run):
        return "diverged", broken
    if len(losses) < 2:
        return "too little data", [
            f"{counted(len(losses), 'training step')} logged: there is no trend to judge"
        ]
    first, last = measures.ends(losses)
    change = f" ({share(last / first - 1)})" if first else ""
    reasons = [f"train loss went from {first:.3f} to {last:.3f}{change}"]
    fell = _eval_fell(run)
    if last - first > CLIMB * abs(first):
        if fell > 0:
            return "healthy", [*reasons, "the train loss rose, but eval loss falls"]
        if last - first > BEYOND_NOISE * measures.ends_error(losses):
            return "diverged", [*reasons, "the train loss rose: lower --lr"]
        if len(losses) < ENOUGH:
            return "too little data", [*reasons, "so few points scatter as much as that: no trend to judge"]
    if len(losses) >= ENOUGH and last >= first * (1 - LEARNT) and fell < LEARNT:
        return "under-fitting", [
            *reasons,
            f"next to nothing was learnt: a higher --lr, a higher --lora-r or {_longer(run)} may help",
        ]
    return "healthy", reasons


def _no_numbers(run: TrainingRun) -> list[str]:
    """Where losses or gradients stopped being finite numbers; nothing where training is not lost by it."""
    losses = zip(run.train["step"], run.train["loss"], strict=True)
    reasons = [
        f"{what} is not a finite number at {counted(len(steps), unit)}, first at step {steps[0]:,}"
        for what, unit, steps in (
            ("the train loss", "step", [int(step) for step, value in losses if not math.isfinite(value)]),
            ("the eval loss", "evaluation", run.bad_evaluations),
        )
        if steps
    ]
    if (since := _lost_gradients(run)) is not None:
        reasons.append(f"the gradient norm is not a finite number from step {since:,} to the end")
    return [*reasons, "lower --lr, or compute in wider numbers"] if reasons else []


def _lost_gradients(run: TrainingRun) -> int | None:
    """The step from which on no logged gradient norm is finite.

    None where they are all well, or only a few were not: in float16 the scale of the loss is found that way.
    """
    bad = set(run.bad_norms)
    backwards = zip(reversed(run.train["step"]), reversed(run.train["grad_norm"]), strict=True)
    logged = (step for step, norm in backwards if math.isfinite(norm) or step in bad)
    tail = list(takewhile(bad.__contains__, logged))
    return int(tail[-1]) if len(tail) >= LOST else None


def _eval_fell(run: TrainingRun) -> float:
    """The share that eval loss fell by over the run, where its last is its lowest; else 0."""
    losses = [loss for _, loss in run.evaluations()]
    if len(losses) < 2 or losses[-1] > min(losses) or losses[0] <= 0:
        return 0.0
    return 1 - losses[-1] / losses[0]


def _longer(run: TrainingRun) -> str:
    """The setting that makes this run longer: of the two the one that decided."""
    return "more --max-steps" if number(run.settings.get("max_steps")) > 0 else "more --epochs"


def _generalisation(run: TrainingRun) -> Verdict:
    """What the evaluations say of over- and under-fitting."""
    evaluations = run.evaluations()
    if not run.eval_steps:
        return "", ["nothing was evaluated: whether it generalises is not known"]
    if not evaluations:
        return "", []
    best = min(range(len(evaluations)), key=lambda place: evaluations[place][1])
    best_step, best_loss = evaluations[best]
    final_step, final_loss = evaluations[-1]
    after = len(evaluations) - 1 - best
    if run.bad_evaluations:
        return "", [
            f"eval loss was lowest at step {best_step:,.0f} ({best_loss:.3f}): "
            f"{_which_checkpoint(run, int(best_step))}"
        ]
    if len(evaluations) == 1:
        return "", [f"eval loss {best_loss:.3f} at step {best_step:,.0f}, measured once: no trend to judge"]
    if after == 0:
        return _lowest_at_the_end(run, evaluations)
    if after >= 2 and final_loss > best_loss * (1 + RISE):
        return "over-fitting", [
            f"eval loss has stood above its lowest ({best_loss:.3f} at step {best_step:,.0f}) for {after} "
            f"evaluations and ends at {final_loss:.3f} at step {final_step:,.0f}: "
            f"{_which_checkpoint(run, int(best_step))}"
        ]
    reason = f"eval loss was lowest at step {best_step:,.0f} ({best_loss:.3f}) and ends at {final_loss:.3f}"
    if run.kept_step is not None:
        reason += f": {_which_checkpoint(run, int(best_step))}"
    return "", [reason]


def _lowest_at_the_end(run: TrainingRun, evaluations: list[tuple[float, float]]) -> Verdict:
    (_, before), (step, final) = evaluations[-2:]
    where = f"{final:.3f} at step {step:,.0f}"
    if before > 0 and final < before * (1 - FALL):
        advice = f": {_longer(run)} may help" if run.end is not None else ""
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
    figures = measures.gradients(run)
    reasons = []
    if figures["spikes"]:
        reasons.append(
            f"gradient norm spiked {counted(figures['spikes'], 'time')} over {SPIKE:g} times its median, "
            f"most at step {figures['max_step']:,} ({figures['max']:.2f})"
        )
    if figures["not_finite"] and _lost_gradients(run) is None:
        reasons.append(
            f"the gradient norm was not a finite number at {counted(figures['not_finite'], 'logged step')}, "
            f"first at step {run.bad_norms[0]:,.0f}"
        )
    if figures["clipped"] is not None and figures["clipped"] > 0.5:
        reasons.append(f"{figures['clipped']:.0%} of the logged steps were clipped at {figures['clip']:g}")
    return reasons


def _speed_reasons(run: TrainingRun) -> list[str]:
    figures = measures.step_seconds(run)
    drift = figures["drift"]
    if not (math.isfinite(drift) and drift > DRIFT):
        return []
    return [
        f"a step took {drift:.0%} longer at the end ({brief(figures['late'])} s) than at the start "
        f"({brief(figures['early'])} s): the machine was shared or hot, or the rows grew longer"
    ]
