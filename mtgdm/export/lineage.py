"""Where a student comes from: the manifests followed back, from its checkpoint to the records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from mtgdm import manifest


def lineage(output: Path, workspace: Path) -> list[dict[str, Any]]:
    """One step for each output on the way, the newest first: its stage, its digest, what it was made from.

    A step whose file is no longer the one that the later step read carries `changed_since: true`, and what lies
    behind it is not told: its manifest speaks of another file. An input without a manifest is where it all began.
    """
    return list(_steps(output, None, workspace, set()))


def told(path: str) -> str:
    """A path as it may leave this machine: under the workspace whole, from elsewhere its name alone."""
    elsewhere = Path(path).is_absolute() or PureWindowsPath(path).is_absolute() or path.startswith("..")
    return PureWindowsPath(path).name if elsewhere else path


def _steps(output: Path, read_as: str | None, workspace: Path, seen: set[Path]) -> Iterator[dict[str, Any]]:
    """`read_as` is the digest that the later step read."""
    made = manifest.read(output)
    if made is None or output in seen:
        return
    seen.add(output)
    step: dict[str, Any] = {
        "stage": made.stage,
        "output": told(made.output.path),
        "sha256": made.output.sha256,
        "finished": made.finished.isoformat(timespec="seconds"),
        "mtgdm": made.versions.get("mtgdm"),
    }
    if read_as not in (None, made.output.sha256):
        yield {**step, "sha256": read_as, "changed_since": True}
        return
    yield {**step, "inputs": [{"path": told(one.path), "sha256": one.sha256} for one in made.inputs]}
    for one in made.inputs:
        yield from _steps(workspace / one.path, one.sha256, workspace, seen)
