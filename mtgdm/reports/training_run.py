"""A training run as its metrics file tells it, and whether it went well."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from mtgdm.errors import UserError
from mtgdm.reports.values import counted, share
from mtgdm.rows import read_lines
from mtgdm.scoring.statistics import percentile

COLUMNS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "step_seconds",
    "tokens_per_s",
    "peak_memory_mib",
)
RISE = 0.02
"""Eval loss this much (relative) over its best, for two evaluations or more, is over-fitting, not noise."""
FALL = 0.02
"""Eval loss that still falls by this much (relative) at the end says that training stopped early."""
SPIKE = 5.0
"""A gradient norm this many times the median is a spike."""


@dataclass
class TrainingRun:
    """The events of one metrics file; columns of equal length hold what was logged at each step."""

    path: Path
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    train: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    eval_steps: array[float] = field(default_factory=lambda: array("d"))
    eval_losses: array[float] = field(default_factory=lambda: array("d"))
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Lines of the run's log that warn or report an error."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings the run wrote down at its start."""
        settings = self.start.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def last_step(self) -> int:
        """The last step anything is known of."""
        steps = [step for step in (*self.train["step"][-1:], *self.eval_steps[-1:]) if math.isfinite(step)]
        return int(max(steps, default=0))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest eval loss."""
        points = [point for point in self.evaluations() if math.isfinite(point[1])]
        if not points:
            return None
        step, loss = min(points, key=lambda point: point[1])
        return int(step), loss

    def evaluations(self) -> list[tuple[float, float]]:
        """Step and eval loss of every evaluation."""
        return list(zip(self.eval_steps, self.eval_losses, strict=True))


def read_run(path: Path) -> TrainingRun:
    """Read a metrics file; what a kill left torn is noted, unknown events are passed over."""
    run = TrainingRun(path)
    unreadable: list[int] = []
    number = events = 0
    for number, line in read_lines(path):
        try:
            event = json.loads(line)
        except ValueError:
            unreadable.append(number)
            continue
        if isinstance(event, dict) and "event" in event:
            events += 1
            _take(run, event)
    if number and not events:
        raise UserError(
            "this holds no training metrics", where=path, hint="name a log/train-*.metrics.jsonl file"
        )
    if unreadable == [number] and number:
        run.notes.append(
            f"the last line ({number:,}) is torn and was left out: the run was killed while writing"
        )
    elif unreadable:
        some = ", ".join(f"{line:,}" for line in unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        run.notes.append(f"{len(unreadable):,} lines could not be read and were left out: {some}")
    if not run.train["step"] and not run.eval_steps:
        run.notes.append("no step was logged")
    return run


def read_warnings(log: Path) -> list[str]:
    """The lines of a run's log with a warning or an error, the last twenty."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if " WARNING " in line or " ERROR " in line][-20:]


def describe(run: TrainingRun) -> dict[str, Any]:
    """The figures of a run as plain JSON values; NaN where a value is not known."""
    verdict, reasons = judge(run)
    return {
        "verdict": verdict,
        "reasons": reasons,
        "complete": run.end is not None,
        "steps": {
            "last": run.last_step,
            "total": run.start.get("total_steps"),
            "logged": len(run.train["step"]),
        },
        "loss": _loss(run),
        "eval": _eval(run),
        "gradient_norm": _gradients(run),
        "step_seconds": _step_seconds(run),
        "tokens_per_s": _spread(_finite(run.train["tokens_per_s"])),
        "learning_rate": _learning_rate(run),
        "peak_memory_mib": max(_finite(run.train["peak_memory_mib"]), default=math.nan),
        "seconds": _seconds(run),
        "run": run.start,
        "end": run.end,
        "warnings": run.warnings,
        "notes": run.notes,
    }


def judge(run: TrainingRun) -> tuple[str, list[str]]:
    """One word for the run and the reasons.

    The words: `healthy`, `over-fitting`, `still improving`, `diverged`, `too little data`.
    """
    losses = run.train["loss"]
    reasons: list[str] = []
    verdict = "healthy"
    first, last = ends(losses)
    evaluations = [point for point in run.evaluations() if math.isfinite(point[1])]
    bad = [int(step) for step, loss in zip(run.train["step"], losses, strict=True) if not math.isfinite(loss)]
    if run.end is None and run.last_step:
        total = run.start.get("total_steps")
        of = f" of {total:,}" if isinstance(total, int) else ""
        reasons.append(f"the run did not end: the last step known is {run.last_step:,}{of}")
    if len(losses) < 2 or not math.isfinite(first):
        verdict = "too little data"
        reasons.append(f"{counted(len(losses), 'training step')} logged: there is no trend to judge")
    else:
        change = f" ({share(last / first - 1)})" if first else ""
        reasons.append(f"train loss went from {first:.3f} to {last:.3f}{change}")
    if bad:
        verdict = "diverged"
        reasons.append(
            f"the train loss is not a number at {counted(len(bad), 'step')}, first at step {bad[0]:,}"
        )
    elif math.isfinite(last) and last > first * 1.05:
        verdict = "diverged"
        reasons.append("the train loss rose: lower --lr")
    if evaluations:
        word, why = _generalisation(evaluations, ended=run.end is not None)
        reasons += why
        verdict = word if verdict == "healthy" and word else verdict
        kept = (run.end or {}).get("best_step")
        if isinstance(kept, int) and kept < run.last_step:
            reasons.append(f"the checkpoint kept is that of step {kept:,}, the best of the run")
    elif verdict == "healthy":
        reasons.append("nothing was evaluated: whether it generalises is not known")
    return verdict, reasons + _gradient_reasons(run)


def ends(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first and of the last twentieth of the finite losses (at most 50 each)."""
    known = _finite(losses)
    if not known:
        return math.nan, math.nan
    size = min(50, max(1, len(known) // 20))
    return fmean(known[:size]), fmean(known[-size:])


def perplexity(loss: float) -> float:
    """`exp(loss)`; infinite where it cannot be held."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _generalisation(evaluations: list[tuple[float, float]], *, ended: bool) -> tuple[str, list[str]]:
    """What the evaluations say of over- and under-fitting."""
    best = min(range(len(evaluations)), key=lambda place: evaluations[place][1])
    best_step, best_loss = evaluations[best]
    final_step, final_loss = evaluations[-1]
    after = len(evaluations) - 1 - best
    if len(evaluations) == 1:
        return "", [f"eval loss {best_loss:.3f} at step {best_step:,.0f}, measured once: no trend to judge"]
    if after >= 2 and final_loss > best_loss * (1 + RISE):
        return "over-fitting", [
            f"eval loss rose for {after} evaluations, from {best_loss:.3f} at step {best_step:,.0f} to "
            f"{final_loss:.3f} at step {final_step:,.0f}"
        ]
    before_loss = evaluations[-2][1]
    if after == 0 and before_loss > 0 and final_loss < before_loss * (1 - FALL):
        advice = ": more --epochs may help" if ended else ""
        return "still improving", [
            f"eval loss is lowest at the end ({final_loss:.3f} at step {final_step:,.0f}) and fell "
            f"by {1 - final_loss / before_loss:.1%} since the evaluation before{advice}"
        ]
    if after == 0:
        return "", [
            f"eval loss is lowest at the end ({best_loss:.3f} at step {best_step:,.0f}) and has levelled out"
        ]
    return "", [
        f"eval loss was lowest at step {best_step:,.0f} ({best_loss:.3f}) and ends at {final_loss:.3f}"
    ]


def _gradient_reasons(run: TrainingRun) -> list[str]:
    figures = _gradients(run)
    reasons = []
    if figures["spikes"]:
        reasons.append(
            f"gradient norm spiked {counted(figures['spikes'], 'time')} over {SPIKE:g} times its median, "
            f"most at step {figures['max_step']:,} ({figures['max']:.2f})"
        )
    if figures["clipped"] is not None and figures["clipped"] > 0.5:
        reasons.append(f"{figures['clipped']:.0%} of the logged steps were clipped at {figures['clip']:g}")
    return reasons


def _loss(run: TrainingRun) -> dict[str, Any]:
    first, last = ends(run.train["loss"])
    known = _finite(run.train["loss"])
    return {
        "first": first,
        "final": last,
        "min": min(known, default=math.nan),
        "reduction": 1 - last / first if first else math.nan,
        "not_finite": len(run.train["loss"]) - len(known),
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
        "gap_to_train": final - train,
    }


def _gradients(run: TrainingRun) -> dict[str, Any]:
    norms = run.train["grad_norm"]
    known = _finite(norms)
    middle = median(known) if known else math.nan
    top = max(known, default=math.nan)
    clip = clip_of(run)
    at = next((step for step, norm in zip(run.train["step"], norms, strict=True) if norm == top), math.nan)
    return {
        **_spread(known),
        "max": top,
        "max_step": int(at) if math.isfinite(at) else None,
        "spikes": sum(norm > SPIKE * middle for norm in known) if middle > 0 else 0,
        "clip": clip,
        "clipped": sum(norm > clip for norm in known) / len(known) if known and clip else None,
        "not_finite": sum(math.isinf(norm) for norm in norms),
    }


def clip_of(run: TrainingRun) -> float | None:
    """The gradient clipping of the run's settings, where it says."""
    for name in ("max_grad_norm", "grad_clip", "clip"):
        value = run.settings.get(name)
        if isinstance(value, int | float) and value > 0:
            return float(value)
    return None


def _step_seconds(run: TrainingRun) -> dict[str, Any]:
    known = _finite(run.train["step_seconds"])
    fifth = len(known) // 5
    drift = math.nan
    if fifth >= 2:
        # The first steps warm caches up and are no measure of drift.
        early, late = median(known[1 : 1 + fifth]), median(known[-fifth:])
        drift = late / early - 1 if early > 0 else math.nan
    return {**_spread(known), "drift": drift}


def _learning_rate(run: TrainingRun) -> dict[str, Any]:
    known = _finite(run.train["learning_rate"])
    return {"max": max(known, default=math.nan), "final": known[-1] if known else math.nan}


def _seconds(run: TrainingRun) -> float:
    if run.end is not None:
        return _number(run.end.get("seconds"))
    return math.nan


def _spread(known: list[float]) -> dict[str, Any]:
    return {
        "mean": fmean(known) if known else math.nan,
        "p50": percentile(known, 0.5),
        "p95": percentile(known, 0.95),
    }


def _take(run: TrainingRun, event: dict[str, Any]) -> None:
    if event["event"] in ("train", "eval") and not math.isfinite(_number(event.get("step"))):
        return
    match event["event"]:
        case "start":
            run.start = {key: value for key, value in event.items() if key != "event"}
        case "train":
            for name, column in run.train.items():
                column.append(_number(event.get(name)))
        case "eval":
            run.eval_steps.append(_number(event.get("step")))
            run.eval_losses.append(_number(event.get("eval_loss")))
        case "end":
            run.end = {key: value for key, value in event.items() if key != "event"}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]
