"""What both report stages can be told."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mtgdm.stage import Runtime, StageConfig


class ReportSettings(StageConfig):
    """Where the charts go, how long they may take, and the one metrics file a report is made from."""

    diagrams_dir: Path = Path("data/diagrams")
    """Folder of the charts."""
    require_png: Annotated[bool, Runtime()] = False
    """Fail where the charts cannot be drawn as PNG (no browser, say); otherwise it is a hint."""
    chart_timeout_s: Annotated[float, Runtime()] = Field(120.0, gt=0)
    """Longest time the browser may take to draw the charts."""

    def inputs(self) -> list[Path]:
        """The one metrics file the report is made from."""
        return [self.chosen()]

    @abstractmethod
    def chosen(self) -> Path:
        """The metrics file that is meant."""
