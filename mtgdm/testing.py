"""Public helpers for tests of a stage plugin: run it as `mtgdm` would, without a command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgdm.errors import MtgdmError
from mtgdm.manifest import Manifest, read
from mtgdm.pipeline import locked, run_stage
from mtgdm.profiles import Profile, Sourced, settings_for
from mtgdm.stage import Result, Stage
from mtgdm.terminal import Terminal

__all__ = ["QuietTerminal", "StageRun", "run"]


@dataclass
class StageRun:
    """What a stage did: its result, the lines it printed, its warnings, the manifests it left."""

    result: Result
    printed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    manifests: list[Manifest] = field(default_factory=list)


class QuietTerminal(Terminal):
    """A terminal that keeps its lines instead of showing them."""

    def __init__(self) -> None:
        super().__init__()
        self.printed: list[str] = []
        self.warnings: list[str] = []

    @property
    def live(self) -> bool:
        """Nothing is drawn."""
        return False

    def print(self, text: str = "", *, style: str = "") -> None:
        """Keep a line."""
        self.printed.append(text)

    def warn(self, text: str) -> None:
        """Keep a warning."""
        self.warnings.append(text)

    def error(self, error: MtgdmError) -> None:
        """Keep an error."""
        self.warnings.append(str(error))

    def plain(self, text: str) -> None:
        """Drop a line of progress."""

    def table(self, columns: Any, rows: Any, *, title: str | None = None) -> None:
        """Keep a table as one line a row."""
        self.printed.extend("  ".join(row) for row in rows)


def run(
    stage: Stage[Any], workspace: Path, *, domain: str = "tourism", stage_name: str = "", **settings: Any
) -> StageRun:
    """Run a stage in a workspace with these settings (`in_=...` for `--in`); raises what the stage raises."""
    stage.name = stage_name or stage.name or stage.function.__module__.rsplit(".", 1)[-1].replace("_", "-")
    profile = Profile(
        name="testing",
        path=None,
        top={"workspace": Sourced(str(workspace), "test"), "domain": Sourced(domain, "test")},
    )
    given = {key.removesuffix("_"): Sourced(value, "test") for key, value in settings.items()}
    resolved = settings_for(stage, profile, given, environment={})
    terminal = QuietTerminal()
    with locked(profile.workspace, f"test of {stage.name}"):
        result = run_stage(stage, resolved, profile, terminal)
    outputs = result.outputs or resolved.config.resolved(profile.workspace).outputs()
    manifests = [made for output in outputs if (made := read(output)) is not None]
    return StageRun(result, terminal.printed, terminal.warnings, manifests)
