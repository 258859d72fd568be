"""Checkpoints of a run under way: which are whole, and which belong to this very run. Light."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtgdm.rows import replace

MARK = "mtgdm.json"
"""Written into a `checkpoint-N/` last of all: a folder without it was cut off by a kill."""
METRICS = "metrics.jsonl"

_FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Mark:
    """What a whole checkpoint knows of its run."""

    fingerprint: str
    step: int
    total_steps: int
    finished: bool
    """Nothing is left to train: the last step is done or the run stopped early."""
    seconds: float
    """How long the run had trained, earlier sittings included."""


@dataclass(frozen=True)
class WholeCheckpoint:
    """A `checkpoint-N/` with everything in it."""

    path: Path
    mark: Mark

    @property
    def is_usable(self) -> bool:
        """Whether the best checkpoint of its run, which would be the result, is still there too."""
        try:
            state = json.loads((self.path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        best = state.get("best_global_step")
        return not best or _mark(self.path.with_name(f"checkpoint-{best}")) is not None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The points of the run up to this checkpoint."""
        lines = (self.path / METRICS).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def whole_checkpoints(folder: Path) -> list[WholeCheckpoint]:
    """The whole checkpoints of a folder, the newest last."""
    if not folder.is_dir():
        return []
    found = []
    for child in folder.iterdir():
        if _FOLDER.fullmatch(child.name) and (mark := _mark(child)) is not None:
            found.append(WholeCheckpoint(child, mark))
    return sorted(found, key=lambda checkpoint: checkpoint.mark.step)


def write_mark(folder: Path, mark: Mark, metrics: list[dict[str, Any]]) -> None:
    """Declare a checkpoint whole, with the points of its run so far."""
    with replace(folder / METRICS) as file:
        file.writelines(json.dumps(point, ensure_ascii=False).encode("utf-8") + b"\n" for point in metrics)
    with replace(folder / MARK) as file:
        file.write(json.dumps(asdict(mark)).encode("utf-8"))


def remove_checkpoints(folder: Path, *, keep: frozenset[Path] = frozenset()) -> int:
    """Delete `checkpoint-N/` folders, broken ones too; returns how many went."""
    found = [child for child in folder.iterdir() if _FOLDER.fullmatch(child.name)] if folder.is_dir() else []
    gone = [child for child in found if child not in keep]
    # The newest goes first, and of each its mark: what a kill leaves must neither count as whole nor as finished.
    for child in sorted(gone, key=lambda child: int(child.name.rpartition("-")[2]), reverse=True):
        (child / MARK).unlink(missing_ok=True)
        shutil.rmtree(child)
    return len(gone)


def _mark(folder: Path) -> Mark | None:
    try:
        return Mark(**json.loads((folder / MARK).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
