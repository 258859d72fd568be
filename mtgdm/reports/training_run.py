"""A training run as its metrics tell it: our own file of events, or the trainer_state.json of transformers."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgdm.errors import UserError
from mtgdm.rows import read_lines

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


@dataclass
class TrainingRun:
    """The events of one run; columns of equal length hold what was logged at each step."""

    path: Path
    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] | None = None
    train: dict[str, array[float]] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})
    eval_steps: array[float] = field(default_factory=lambda: array("d"))
    eval_losses: array[float] = field(default_factory=lambda: array("d"))
    bad_norms: array[float] = field(default_factory=lambda: array("d"))
    """The steps whose gradient norm was logged as NaN or infinite, told apart from those that logged none."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    """Lines of the run's log that warn or report an error."""

    @property
    def name(self) -> str:
        """What people call the run: the name of its file, or of the folder that trainer_state.json lies in."""
        if self.path.name != STATE:
            return self.path.name.removesuffix(".jsonl").removesuffix(".metrics")
        return "/".join(self.path.parent.parts[-2:])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings the run wrote down at its start."""
        settings = self.start.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def has_points(self) -> bool:
        """Whether a step or an evaluation was logged."""
        return bool(self.train["step"] or self.eval_steps)

    @property
    def total_steps(self) -> int | None:
        """The steps that were planned."""
        total = number(self.start.get("total_steps"))
        return int(total) if 0 < total < math.inf else None

    @property
    def clip(self) -> float | None:
        """The gradient norm beyond which steps were clipped, where the run says."""
        for place in (self.start, self.settings):
            value = number(place.get("max_grad_norm"))
            if value > 0:
                return value
        return None

    @property
    def kept_step(self) -> int | None:
        """The step whose checkpoint is the result of the run."""
        step = number((self.end or {}).get("best_step"))
        return int(step) if math.isfinite(step) else None

    @property
    def last_step(self) -> int:
        """The last step anything is known of."""
        steps = [step for step in (*self.train["step"][-1:], *self.eval_steps[-1:]) if math.isfinite(step)]
        return int(max(steps, default=0))

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the lowest eval loss."""
        points = self.evaluations()
        if not points:
            return None
        step, loss = min(points, key=lambda point: point[1])
        return int(step), loss

    @property
    def bad_evaluations(self) -> list[int]:
        """The steps of the evaluations whose loss is NaN or infinite."""
        points = zip(self.eval_steps, self.eval_losses, strict=True)
        return [int(step) for step, loss in points if not math.isfinite(loss)]

    def evaluations(self) -> list[tuple[float, float]]:
        """Step and loss of every evaluation whose loss is a number."""
        points = zip(self.eval_steps, self.eval_losses, strict=True)
        return [(step, loss) for step, loss in points if math.isfinite(loss)]

    def add_train(self, point: dict[str, Any]) -> None:
        """Take what was logged at one step; a point without a step says nothing."""
        if not math.isfinite(number(point.get("step"))):
            return
        for name, column in self.train.items():
            value = point.get(name)
            # A million steps are eight million values, nearly all of them plain floats.
            column.append(value if type(value) is float else number(value))
        norm = point.get("grad_norm")
        if type(norm) is float and not math.isfinite(norm):
            self.bad_norms.append(self.train["step"][-1])
            if self.train["loss"][-1] == 0:
                # What transformers writes for a loss that is no number (logging_nan_inf_filter).
                self.train["loss"][-1] = math.nan

    def add_eval(self, step: Any, loss: Any) -> None:
        """Take one evaluation."""
        if math.isfinite(number(step)):
            self.eval_steps.append(number(step))
            self.eval_losses.append(number(loss))


STATE = "trainer_state.json"
"""What transformers' Trainer, and all that is built on it, keeps in a checkpoint."""


def read_run(path: Path) -> TrainingRun:
    """Read a metrics file or a trainer_state.json.

    What a kill left torn is noted. Raises UserError where no step was logged, or the file is no such file.
    """
    from mtgdm.reports.trainer_state import read_state

    run = read_state(path) if path.suffix == ".json" else _read_events(path)
    if not run.has_points:
        raise UserError(
            "no step was logged here",
            where=path,
            hint="the run stopped before its first step, its .log says why; name another with --metrics",
        )
    return run


def has_steps(path: Path) -> bool:
    """Whether a metrics file holds a step, by its first lines: for choosing the newest that tells something."""
    with path.open("rb") as file:
        head = file.read(1 << 18)
    return b'"event": "train"' in head or b'"event": "eval"' in head


def read_warnings(log: Path) -> list[str]:
    """The lines of a run's log with a warning or an error, the last twenty."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if " WARNING " in line or " ERROR " in line][-20:]


def number(value: Any) -> float:
    """A JSON value as a number; NaN where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:  # JSON may hold integers that no float does
        return math.nan


def known(values: Sequence[float]) -> list[float]:
    """The finite values, in order."""
    return [value for value in values if math.isfinite(value)]


def _read_events(path: Path) -> TrainingRun:
    runs = [TrainingRun(path)]
    unreadable: list[int] = []
    line_number = lines = events = 0
    for line_number, line in read_lines(path):
        lines += 1
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            unreadable.append(line_number)
            continue
        if isinstance(event, dict) and "event" in event:
            events += 1
            if event["event"] == "start" and runs[-1].has_points:
                runs.append(TrainingRun(path))
            _take(runs[-1], event)
    if lines > len(unreadable) and not events:
        raise UserError(
            "this holds no training metrics",
            where=path,
            hint="name a log/train-*.metrics.jsonl file, or a trainer_state.json of transformers",
        )
    told = [run for run in runs if run.has_points] or runs
    run = told[-1]
    if len(told) > 1:
        run.notes.append(f"the file holds {len(told):,} runs, one after the other: this is the last of them")
    if unreadable == [line_number]:
        run.notes.append(
            f"the last line ({line_number:,}) is torn and was left out: the run was killed while writing"
        )
    elif unreadable:
        some = ", ".join(f"{line:,}" for line in unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        run.notes.append(f"{len(unreadable):,} lines could not be read and were left out: {some}")
    return run


def _take(run: TrainingRun, event: dict[str, Any]) -> None:
    match event["event"]:
        case "start":
            run.start = {key: value for key, value in event.items() if key != "event"}
        case "train":
            run.add_train(event)
        case "eval" if "eval_loss" in event:
            run.add_eval(event.get("step"), event.get("eval_loss"))
        case "end":
            run.end = {key: value for key, value in event.items() if key != "event"}
