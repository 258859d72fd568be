"""What a training run will take, for `mtgdm plan`: tokens, steps, memory, disk, and hours where they were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mtgdm.estimates import Expected
from mtgdm.student.examples import Example
from mtgdm.student.memory import MIB, Memory, Shape, checkpoint_bytes
from mtgdm.student.packing import Layout

KEPT = 3
"""Checkpoints on the disk at once: the best, the newest, and the one being written."""


def forecast(
    train: Sequence[Example],
    val: Sequence[Example],
    *,
    too_long: Mapping[str, Any],
    layout: Layout,
    steps: int,
    memory: Memory | None,
    shape: Shape | None,
    on_cpu: bool,
    tokens_per_s: Sequence[float],
) -> dict[str, Any]:
    """Quantities by name, as `mtgdm plan` shows them; `tokens_per_s` are those of an earlier run, if there was one."""
    tokens_an_epoch = sum(example.length for example in train)
    tokens = round(tokens_an_epoch * steps / layout.steps_an_epoch)
    found: dict[str, Any] = {
        "train_rows": len(train),
        "val_rows": len(val),
        **too_long,
        "tokens_an_epoch": tokens_an_epoch,
        "trained_tokens_an_epoch": sum(example.tokens.trained for example in train),
        "tokens_in_the_longest_row": max(example.length for example in train),
        "tokens_in_all": tokens,
        "layout": str(layout),
        "steps": steps,
    }
    if memory is not None and shape is not None:
        found["mib_of_memory" if on_cpu else "mib_of_gpu_memory"] = memory.in_mib()
        found["mib_of_disk"] = round((KEPT * checkpoint_bytes(shape) + memory.adapter) / MIB) or 1
    if tokens_per_s:
        ordered = sorted(tokens_per_s)
        slow, fast = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        hours = tokens / median(ordered) / 3600
        found["hours"] = Expected(hours, tokens / fast / 3600, tokens / slow / 3600)
    return found


def earlier_pace(log_folder: Path, *, base_model: str, on_cpu: bool, settings: dict[str, Any]) -> list[float]:
    """Tokens a second at the points of the newest run that trained the same base the same way; none where none did."""
    alike = ("load_in_4bit", "gradient_checkpointing", "precision")
    for path in sorted(log_folder.glob("train-*.metrics.jsonl"), reverse=True):
        points = _points(path)
        start = points[0] if points and points[0].get("event") == "start" else {}
        made = start.get("settings", {})
        if start.get("base_model") != base_model or (start.get("device") == "cpu") != on_cpu:
            continue
        if any(made.get(key) != settings.get(key) for key in alike):
            continue
        if rates := [point["tokens_per_s"] for point in points if point.get("event") == "train"][1:]:
            return rates
    return []


def _points(path: Path) -> list[dict[str, Any]]:
    """The points of a metrics file up to the first line that is cut off."""
    found: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                point = json.loads(line)
            except ValueError:
                break
            if isinstance(point, dict):
                found.append(point)
    return found
