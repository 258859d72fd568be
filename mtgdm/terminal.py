"""The terminal: the only importer of rich. Text goes to stdout, warnings and progress to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from mtgdm.errors import MtgdmError

PLAIN_INTERVAL_S = 15.0
"""Without a terminal a line of progress is printed this often, and at the end."""


PIPE_COLUMNS = 1000
"""In a file or a pipe there is no edge to wrap a table at, and a path in two pieces is no path."""


class Terminal:
    """Everything the user sees."""

    def __init__(self, *, verbose: bool = False) -> None:
        self.verbose = verbose
        width = None if sys.stdout.isatty() else PIPE_COLUMNS
        self._out = Console(highlight=False, soft_wrap=True, width=width)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: RichProgress | None = None

    @property
    def live(self) -> bool:
        """Whether progress is drawn in place; otherwise it is a line now and then."""
        return self._err.is_terminal

    @property
    def _lines(self) -> Console:
        """Where lines go: standard output, or above the bars where those are drawn on the same terminal."""
        return self._err if self._live is not None and self._out.is_terminal else self._out

    def print(self, text: str = "", *, style: str = "") -> None:
        """A line on standard output."""
        self._lines.print(Text(text, style=style))

    def json(self, text: str) -> None:
        """JSON on standard output, byte for byte: no wrapping, no colour."""
        self._out.file.write(text + "\n")

    def warn(self, text: str) -> None:
        """A warning line on standard error."""
        self._err.print(Text.assemble(("warning: ", "yellow"), text))

    def error(self, error: MtgdmError) -> None:
        """One line that says what and where, and the hint under it."""
        self._err.print(Text.assemble(("error: ", "bold red"), str(error).replace("\n", " ")))
        if error.hint:
            self._err.print(Text.assemble(("hint: ", "cyan"), error.hint))

    def table(
        self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None
    ) -> None:
        """A table on standard output; columns whose name begins with `#` are numbers."""
        table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for column in columns:
            number = column.startswith("#")
            table.add_column(
                column.lstrip("#"), justify="right" if number else "left", no_wrap=number, overflow="fold"
            )
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self._lines.print(table, soft_wrap=False)

    @contextmanager
    def progress_view(self) -> Iterator[None]:
        """Draw the bars of several stages in one view, the finished ones above the running one."""
        if not self.live or self._live is not None:
            yield
            return
        with self._bars() as bars:
            self._live = bars
            try:
                yield
            finally:
                self._live = None

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Progress]:
        """A bar with rows done/total, rate and time left; off a terminal, a line now and then."""
        if not self.live:
            line = PlainProgress(self, title, total, unit, done)
            yield line
            line.finish()
            return
        with self.progress_view():
            bars = self._live
            assert bars is not None
            task = bars.add_task(title, total=total, completed=done, unit=unit, begun=done, note="")
            bar = LiveProgress(bars, task)
            yield bar
            bar.finish()

    def plain(self, text: str) -> None:
        """A line of progress on standard error where nothing can be drawn in place."""
        self._err.print(Text(text))

    def _bars(self) -> RichProgress:
        return RichProgress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(bar_width=28),
            _Count(),
            _Rate(),
            TimeElapsedColumn(),
            _Left(),
            TextColumn("{task.fields[note]}", markup=False),
            console=self._err,
            refresh_per_second=4,
            redirect_stdout=False,
        )


class Progress:
    """A bar in use: `advance` as work gets done, `note` for what stands beside it."""

    def advance(self, amount: int = 1) -> None:
        """So much more is done."""
        raise NotImplementedError

    def note(self, text: str) -> None:
        """Show a short text beside the bar."""
        raise NotImplementedError


class LiveProgress(Progress):
    """A bar drawn by rich."""

    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars = bars
        self._task = task

    def advance(self, amount: int = 1) -> None:
        """So much more is done."""
        self._bars.advance(self._task, amount)

    def note(self, text: str) -> None:
        """Show a short text beside the bar."""
        self._bars.update(self._task, note=text)

    def finish(self) -> None:
        """Leave the bar as it stands, without a clock that still runs."""
        self._bars.stop_task(self._task)


class PlainProgress(Progress):
    """A line of progress now and then, for logs and pipes."""

    def __init__(self, terminal: Terminal, title: str, total: int | None, unit: str, done: int) -> None:
        self._terminal = terminal
        self._title = title
        self._total = total
        self._unit = unit
        self._begun = self._done = done
        self._started = self._printed = time.monotonic()
        self._note = ""

    def advance(self, amount: int = 1) -> None:
        """So much more is done."""
        self._done += amount
        if time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self._print()

    def note(self, text: str) -> None:
        """Show a short text beside the count."""
        self._note = text

    def finish(self) -> None:
        """Print where it ended."""
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed_s = self._printed - self._started
        rate = (self._done - self._begun) / elapsed_s if elapsed_s > 0 else 0.0
        count = f"{self._done:,}" if self._total is None else f"{self._done:,}/{self._total:,}"
        parts = [
            f"{self._title}: {count} {self._unit}",
            f"{_rounded(rate)} {self._unit}/s",
            _clock(elapsed_s),
        ]
        if self._total is not None and rate > 0 and self._done < self._total:
            parts.append(f"{_clock((self._total - self._done) / rate)} left")
        if self._note:
            parts.append(self._note)
        self._terminal.plain(" · ".join(parts))


class _Count(ProgressColumn):
    def render(self, task: Task) -> Text:
        done = f"{int(task.completed):,}"
        total = "" if task.total is None else f"/{int(task.total):,}"
        return Text(f"{done}{total} {task.fields['unit']}")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed_s = task.finished_time if task.finished else task.elapsed
        done = task.completed - task.fields["begun"]
        return Text(f"{_rounded(done / elapsed_s)} {task.fields['unit']}/s" if elapsed_s and done else "")


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        if task.finished or task.time_remaining is None:
            return Text("")
        return Text(f"{_clock(task.time_remaining)} left")


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
