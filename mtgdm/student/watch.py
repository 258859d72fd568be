"""What stands beside the training loop: points of the metrics, the bar, best and whole checkpoints, early stop."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import TrainerControl, TrainerState

from mtgdm.errors import SettingError, UserError, nearest
from mtgdm.student import distributed
from mtgdm.student.base import memory_errors
from mtgdm.student.memory import MIB, peak_bytes
from mtgdm.student.packing import Item
from mtgdm.student.resume import Mark, write_mark

if TYPE_CHECKING:
    from mtgdm.student.trainer import LoopSettings, StudentTrainer
    from mtgdm.terminal import Progress

_SAID = ("loss", "val", "rate", "lr", "memory")
"""What stands beside the bar; the last goes first where there is no room."""


class Points:
    """The metrics file of a run: one JSON object a line, kept in memory too for the checkpoints.

    Without a path, as in all processes but the first, it is kept in memory alone.
    """

    def __init__(self, path: Path | None, earlier: Sequence[dict[str, Any]] = ()) -> None:
        """`earlier` are the points of the same run before it was interrupted."""
        self.path = path
        self.points: list[dict[str, Any]] = []
        if path is not None:
            path.write_bytes(b"")
        for point in earlier:
            self.add(point)

    def add(self, point: dict[str, Any]) -> None:
        """Write a point."""
        self.points.append(point)
        if self.path is None:
            return
        with self.path.open("ab") as file:
            file.write(json.dumps(point, ensure_ascii=False).encode("utf-8") + b"\n")


class Watch(TrainerCallback):
    """Points, progress, best checkpoint, early stop and the marks of whole checkpoints."""

    def __init__(
        self,
        settings: LoopSettings,
        points: Points,
        bar: Progress,
        fingerprint: str,
        before_s: float,
        held_bytes: int,
    ) -> None:
        """`before_s` are the seconds of earlier sittings, `held_bytes` what the peak of memory does not count."""
        self._settings = settings
        self._points = points
        self._bar = bar
        self._fingerprint = fingerprint
        self._before_s = before_s
        self._held_bytes = held_bytes
        self._started = time.monotonic()
        self.trainer: StudentTrainer
        self.stopped_early = False
        self._step_s = 0.0
        self._steps = 0
        self._tokens = self._trained = 0
        self._begun = 0.0
        self._notes: dict[str, str] = {}

    @property
    def seconds(self) -> float:
        """How long the run has trained, earlier sittings included."""
        return self._before_s + time.monotonic() - self._started

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell the batches which epoch it is, also that of a resumed run."""
        self.trainer.batches.set_epoch(state.global_step // self._settings.layout.steps_an_epoch)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock of a step."""
        self._begun = time.monotonic()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """No step is taken on a loss that is no number."""
        self.trainer.check_step_loss()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock; the last step is always measured and kept."""
        self._step_s += time.monotonic() - self._begun
        self._steps += 1
        self._bar.advance()
        if state.global_step >= state.max_steps:
            control.should_save = control.should_log = True
            control.should_evaluate = bool(self.trainer.eval_dataset)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A training point."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs or not self._steps:
            return
        if not math.isfinite(logs.get("grad_norm", 0.0)) and not args.fp16:
            raise UserError(
                f"the gradient became {logs['grad_norm']} at step {state.global_step}", hint="lower --lr"
            )
        tokens, trained = self.trainer.summed(
            self.trainer.tokens - self._tokens, self.trainer.trained_tokens - self._trained
        )
        peak = peak_bytes(args.device.type) - self._held_bytes
        point = {
            "event": "train",
            "step": state.global_step,
            "epoch": round(state.epoch or 0.0, 4),
            "loss": logs["loss"],
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "step_seconds": self._step_s / self._steps,
            "tokens_per_s": tokens / self._step_s if self._step_s else 0.0,
            "trained_tokens_per_s": trained / self._step_s if self._step_s else 0.0,
            "peak_memory_mib": round(peak / MIB),
        }
        self._points.add(point)
        self._say("loss", f"loss {logs['loss']:.4f}")
        self._say("lr", f"lr {point['learning_rate']:.1e}")
        self._say("rate", f"{point['tokens_per_s']:,.0f} tok/s")
        if args.device.type != "cpu":
            self._say("memory", f"{peak / 2**30:.1f} GiB")
        self._step_s, self._steps = 0.0, 0
        self._tokens, self._trained = self.trainer.tokens, self.trainer.trained_tokens

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A point of the loss on `val`: a new best is saved, too many without one stop the run."""
        metrics: dict[str, float] = kwargs["metrics"]
        loss = metrics["eval_loss"]
        self._points.add(
            {
                "event": "eval",
                "step": state.global_step,
                "eval_loss": loss,
                "perplexity": math.exp(min(loss, 700.0)),
                "seconds": metrics["eval_runtime"],
            }
        )
        self._say("val", f"val {loss:.4f}")
        if state.global_step == 0:
            return
        if state.best_metric is None or loss < state.best_metric:
            control.should_save = True
        if self._settings.early_stop and evals_without_gain(state.log_history, self._settings.threshold) >= (
            self._settings.patience
        ):
            self.stopped_early = state.global_step < state.max_steps
            control.should_training_stop = True
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Declare the checkpoint whole, when every process has written its part."""
        distributed.wait()
        if not state.is_world_process_zero:
            return
        finished = control.should_training_stop or state.global_step >= state.max_steps
        mark = Mark(self._fingerprint, state.global_step, state.max_steps, finished, round(self.seconds, 3))
        write_mark(Path(args.output_dir) / f"checkpoint-{state.global_step}", mark, self._points.points)

    def _say(self, key: str, text: str) -> None:
        self._notes[key] = text
        self._bar.note(" · ".join(self._notes[name] for name in _SAID if name in self._notes))


class TriesFirst(TrainerCallback):
    """Computes one batch before the first step, to see whether the memory holds."""

    def __init__(self, trainer: StudentTrainer, items: Sequence[Item], hint: str) -> None:
        self._trainer = trainer
        self._items = items
        self._hint = hint

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Try it on the model as it is wrapped for the processes."""
        with memory_errors(self._hint, doing="the largest batch does not fit"):
            self._trainer.try_batch(self._trainer.model_wrapped, self._items)


def evals_without_gain(history: Sequence[dict[str, Any]], threshold: float) -> int:
    """How many of the last measurements on `val` in a row did not beat the best before by the threshold.

    Counted from the history, which a checkpoint carries: a resumed run stops where it would have.
    """
    best = math.inf
    waited = 0
    for entry in history:
        if "eval_loss" not in entry or entry["step"] == 0:
            continue
        if entry["eval_loss"] < best - threshold:
            best = entry["eval_loss"]
            waited = 0
        else:
            waited += 1
    return waited


def reporters(names: Sequence[str], tensorboard: Path) -> tuple[str, ...]:
    """Names of trackers, each known to transformers and installed; `tensorboard` is where its files go.

    Raises SettingError for an unknown name, UserError for one that is not installed.
    """
    known = set(INTEGRATION_TO_CALLBACK)
    names = () if tuple(names) == ("none",) else names  # as transformers has it
    for name in names:
        if name not in known:
            raise SettingError(
                f"there is no tracker '{name}'", where="--report-to", hint=nearest(name, known)
            )
        if name == "tensorboard":
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(tensorboard))
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (RuntimeError, ImportError) as error:
            raise UserError(
                f"{name} is not installed", where="--report-to", hint=f"pip install {name}"
            ) from error
    return tuple(names)
