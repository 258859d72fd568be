"""The trainer_state.json of transformers' Trainer (TRL, axolotl, LLaMA-Factory write it too) as a training run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mtgdm.errors import UserError
from mtgdm.reports.training_run import STATE, TrainingRun, number

_SETTINGS = {
    "train_batch_size": "batch",
    "logging_steps": "logging_steps",
    "eval_steps": "eval_steps",
    "save_steps": "save_steps",
}
"""What a state tells of the run's settings, and what `mtgdm train` calls them.

Not its epochs: they are rounded up, and counted from the steps where those were asked for.
"""
_EVAL_LOSS = re.compile(r"eval_(?:.+_)?loss")


def newest_state(path: Path) -> Path:
    """The state in a checkpoint, or in the last of a folder of checkpoints; any other path as it is."""
    if not path.is_dir() or (path / STATE).is_file():
        return path / STATE if path.is_dir() else path
    found = [state for state in path.glob(f"checkpoint-*/{STATE}") if _step_of(state) >= 0]
    return max(found, key=_step_of, default=path / STATE)


def read_state(path: Path) -> TrainingRun:
    """Read a state; the loss of an evaluation on several sets is that of the first, and a note says so."""
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        hint = "name a metrics file, or a checkpoint of transformers"
        raise UserError("there is no such file", where=path, hint=hint) from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"not JSON: {error}", where=path, hint="was it torn by a kill? take an older checkpoint"
        ) from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list):
        raise UserError("this is no trainer_state.json: it has no log_history", where=path)
    run = TrainingRun(path)
    run.start = {
        "written_by": "transformers",
        "total_steps": state.get("max_steps"),
        "settings": {
            ours: state[theirs] for theirs, ours in _SETTINGS.items() if state.get(theirs) is not None
        },
    }
    losses: dict[str, None] = {}
    for entry in history:
        if isinstance(entry, dict):
            _take(run, entry, losses)
    if len(losses) > 1:
        first, *others = losses
        run.notes.append(f"the eval loss is {first}; not shown: {', '.join(others)}")
    if run.end is not None:
        run.end |= _kept(state)
    elif run.total_steps and run.last_step >= run.total_steps:
        run.end = {"steps": run.last_step, **_kept(state)}
    return run


def _take(run: TrainingRun, entry: dict[str, Any], losses: dict[str, None]) -> None:
    """One entry of log_history; `losses` are the keys of eval losses met so far, in order."""
    if "loss" in entry:
        run.add_train(entry)
    elif "train_runtime" in entry:
        run.end = {"steps": entry.get("step"), "seconds": entry["train_runtime"]}
    evaluated = [key for key in entry if _EVAL_LOSS.fullmatch(key)]
    losses.update(dict.fromkeys(evaluated))
    first = next(iter(losses), None)
    if first in evaluated:
        run.add_eval(entry.get("step"), entry[first])


def _kept(state: dict[str, Any]) -> dict[str, Any]:
    """The best checkpoint, where the Trainer kept one; older versions name its folder alone."""
    folder = state.get("best_model_checkpoint")
    if not isinstance(folder, str):
        return {}
    step = number(state.get("best_global_step"))
    best = int(step) if step > 0 else _step_of(Path(folder) / STATE)
    return {"best_model_checkpoint": folder} | ({"best_step": best} if best >= 0 else {})


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint's folder; -1 where it has none."""
    step = path.parent.name.rpartition("-")[2]
    return int(step) if step.isdecimal() else -1
