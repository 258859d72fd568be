"""The terminal: the only importer of rich. Text goes to stdout, warnings and progress to stderr."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtgdm.errors import MtgdmError

PLAIN_INTERVAL_S = 15.0
"""Without a terminal a line of progress is printed this often, and at the end."""
REFRESHES_PER_S = 4
RECENT_S = 300.0
"""The pace is that of the last five minutes: a server that hung for an hour is forgotten soon after."""
BAR_WIDTH = 28
SHORTEST_BAR = 8
BETWEEN_NOTES = " · "
BYTES = "bytes"
"""The unit that is shown as kB, MB and GB."""

PIPE_COLUMNS = 1000
"""In a file or a pipe there is no edge to wrap a table at, and a path in two pieces is no path."""


class Terminal:
    """Everything the user sees."""

    def __init__(self, *, verbose: bool = False, silent: bool = False) -> None:
        """With `silent` nothing is said: another process speaks for this one."""
        self.verbose = verbose
        self._silent = silent
        self._speaker = ""
        width = None if sys.stdout.isatty() else PIPE_COLUMNS
        self._out = Console(highlight=False, soft_wrap=True, width=width, quiet=silent)
        self._err = Console(stderr=True, highlight=False, soft_wrap=True, quiet=silent)
        self._live: _Bars | None = None

    @property
    def live(self) -> bool:
        """Whether progress is drawn in place; otherwise it is a line now and then."""
        return self._err.is_terminal and not self._silent

    @property
    def _lines(self) -> Console:
        """Where lines go: standard output, or above the bars where those are drawn on the same terminal."""
        return self._err if self._live is not None and self._out.is_terminal else self._out

    def print(self, text: str = "", *, style: str = "") -> None:
        """A line on standard output."""
        self._lines.print(Text(text, style=style))

    def json(self, text: str) -> None:
        """JSON on standard output, byte for byte: no wrapping, no colour."""
        if not self._silent:
            self._out.file.write(text + "\n")

    def warn(self, text: str) -> None:
        """A warning line on standard error."""
        self._err.print(Text.assemble(("warning: ", "yellow"), text))

    def error(self, error: MtgdmError) -> None:
        """One line that says what and where, and the hint under it."""
        self._err.print(Text.assemble(("error: ", "bold red"), self._speaker, str(error).replace("\n", " ")))
        if error.hint:
            self._err.print(Text.assemble(("hint: ", "cyan"), error.hint))

    def speak(self, speaker: str) -> None:
        """Say an error after all, where one was to be silent, with who says it."""
        self._speaker = speaker
        self._err.quiet = False

    def leave(self) -> None:
        """Show the cursor again: the last before the process ends at once, from any thread, waiting for no lock."""
        if self.live and not self._err.legacy_windows:
            os.write(sys.stderr.fileno(), b"\x1b[?25h\n")

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
        bars = _Bars()
        with Live(bars, console=self._err, refresh_per_second=REFRESHES_PER_S, redirect_stdout=False):
            self._live = bars
            try:
                yield
            finally:
                self._live = None

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str, *, done: int = 0) -> Iterator[Progress]:
        """A bar with rows done/total, rate and time left; off a terminal, a line now and then.

        Where work is broken off the bar stays as it stood, or goes where nothing was done; a log has a line of
        it after Ctrl-C, and after an error the error alone.
        """
        if self._silent:
            yield Progress(title, total, unit, done)
            return
        if not self.live:
            line = PlainProgress(self, title, total, unit, done)
            try:
                yield line
            except KeyboardInterrupt:
                if line.moved:
                    line.finish()
                raise
            line.finish()
            return
        with self.progress_view():
            bars = self._live
            assert bars is not None
            bar = Progress(title, total, unit, done)
            bars.all.append(bar)
            try:
                yield bar
            except BaseException:
                if not bar.moved:
                    bars.all.remove(bar)
                raise
            finally:
                bar.finish()

    def plain(self, text: str) -> None:
        """A line of progress on standard error where nothing can be drawn in place."""
        self._err.print(Text(text))


class Progress:
    """A bar in use: `advance` as work gets done, `note` for what stands beside it.

    Both only remember, and the bar looks when it is drawn: they may be called for every row.
    """

    def __init__(self, title: str, total: int | None, unit: str, done: int) -> None:
        self.title = title
        self.total = total
        self.done = done
        self._unit = unit
        self._note = ""
        self.live: Callable[[], list[str]] = list
        """More notes, asked for whenever the bar is drawn: what they tell moves while no row gets done."""
        self._begun = done
        self._started = time.monotonic()
        self._ended: float | None = None
        self._seen = deque([(self._started, done)])
        """What was done when, a second apart, as far back as RECENT_S."""

    def advance(self, amount: int = 1) -> None:
        """So much more is done."""
        self.done += amount

    def note(self, text: str) -> None:
        """Show a short text beside the bar; its parts, divided by ` · `, go from the end where there is no room."""
        self._note = text

    def finish(self) -> None:
        """Leave it as it stands, without a clock that still runs."""
        self._ended = time.monotonic()

    @property
    def moved(self) -> bool:
        """Whether anything was done since it began."""
        return self.done != self._begun

    @property
    def ended(self) -> bool:
        """Whether the work is over."""
        return self._ended is not None

    @property
    def count(self) -> str:
        """`  12/600 rows`, `0.8/3.1 GB`."""
        if self._unit == BYTES:
            return _bytes(self.done, self.total)
        if self.total is None:
            return f"{self.done:,} {self._unit}"
        total = f"{self.total:,}"
        return f"{self.done:>{len(total)},}/{total} {self._unit}"

    @property
    def rate(self) -> str:
        """`3.1 rows/s`, of late or, when it is over, on the whole; empty where nothing is done yet."""
        pace = self._pace()
        if not pace:
            return ""
        if self._unit == BYTES:
            return f"{_bytes(round(pace), None)}/s"
        return (
            f"{_rounded(pace)} {self._unit}/s" if pace >= 0.1 else f"{_rounded(60 * pace)} {self._unit}/min"
        )

    @property
    def elapsed(self) -> str:
        """How long it has been going on."""
        return _clock((self._ended or time.monotonic()) - self._started)

    @property
    def left(self) -> str:
        """`3:20 left`, or nothing where nobody can know."""
        if self.ended or self.total is None or self.done >= self.total:
            return ""
        pace = self._pace()
        return f"{_clock((self.total - self.done) / pace)} left" if pace else ""

    @property
    def notes(self) -> list[str]:
        """The parts of the note."""
        return [*(self._note.replace("\n", " ").split(BETWEEN_NOTES) if self._note else []), *self.live()]

    def _pace(self) -> float:
        """Units a second."""
        if self._ended is not None:
            elapsed_s = self._ended - self._started
            return (self.done - self._begun) / elapsed_s if elapsed_s else 0.0
        now, seen = time.monotonic(), self._seen
        if now - seen[-1][0] >= 1.0:
            seen.append((now, self.done))
        while len(seen) > 2 and seen[1][0] < now - RECENT_S:
            seen.popleft()
        since, done = seen[0]
        return (self.done - done) / (now - since) if now > since else 0.0


class PlainProgress(Progress):
    """A line of progress now and then, for logs and pipes; also where nothing moves, which is what they must tell."""

    def __init__(self, terminal: Terminal, title: str, total: int | None, unit: str, done: int) -> None:
        super().__init__(title, total, unit, done)
        self._terminal = terminal
        self._printed = self._started
        self._over = threading.Event()
        self._speaker = threading.Thread(target=self._speak, name="progress", daemon=True)
        self._speaker.start()

    def advance(self, amount: int = 1) -> None:
        """So much more is done."""
        self.done += amount
        self._print_where_due()

    def finish(self) -> None:
        """Print where it ended."""
        super().finish()
        self._over.set()
        self._speaker.join()
        self._print()

    def _speak(self) -> None:
        while not self._over.wait(PLAIN_INTERVAL_S):
            self._print_where_due()

    def _print_where_due(self) -> None:
        if time.monotonic() - self._printed >= PLAIN_INTERVAL_S:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        parts = [f"{self.title}: {self.count.lstrip()}", self.rate, self.elapsed, self.left, *self.notes]
        self._terminal.plain(BETWEEN_NOTES.join(part for part in parts if part))


class _Bars:
    """Bars under each other, one line each, however narrow the terminal."""

    def __init__(self) -> None:
        self.all: list[Progress] = []

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        bars = list(self.all)
        if not bars:
            return
        lines = [
            [bar.title, bar.count, bar.rate, bar.elapsed, bar.left, BETWEEN_NOTES.join(bar.notes)]
            for bar in bars
        ]
        _shorten(lines, options.max_width)
        room = options.max_width - _width(lines) - 1
        grid = Table.grid(padding=(0, 1))
        shown = [column for column, width in enumerate(_widths(lines)) if width]
        for column in shown:
            grid.add_column(no_wrap=True, overflow="ellipsis")
            if column == _TITLE and room >= SHORTEST_BAR:
                grid.add_column(width=min(BAR_WIDTH, room))
        for bar, line in zip(bars, lines, strict=True):
            cells: list[Text | ProgressBar] = [Text(line[column], _STYLES[column]) for column in shown]
            if room >= SHORTEST_BAR:
                cells.insert(1, _drawn(bar))
            grid.add_row(*cells)
        yield grid


_TITLE, _COUNT, _RATE, _ELAPSED, _LEFT, _NOTE = range(6)
_STYLES = ("", "", "", "progress.elapsed", "progress.remaining", "")


def _drawn(bar: Progress) -> ProgressBar:
    if bar.total is None:
        return ProgressBar(total=1, completed=1) if bar.ended else ProgressBar(pulse=True)
    return ProgressBar(total=max(1, bar.total), completed=bar.done if bar.total else 1)


def _shorten(lines: list[list[str]], room: int) -> None:
    """Leave out what says least until every line fits: the time so far, the last notes, the rate, all notes."""
    if _width(lines) > room:
        _leave_out(_ELAPSED, lines)
    while _width(lines) > room:
        longest = max(lines, key=lambda line: cell_len(line[_NOTE]))
        if BETWEEN_NOTES not in longest[_NOTE]:
            break
        longest[_NOTE] = longest[_NOTE].rpartition(BETWEEN_NOTES)[0]
    for column in (_RATE, _NOTE):
        if _width(lines) > room:
            _leave_out(column, lines)


def _leave_out(column: int, lines: list[list[str]]) -> None:
    for line in lines:
        line[column] = ""


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(*lines, strict=True)]


def _width(lines: Sequence[Sequence[str]]) -> int:
    """Columns of the terminal the lines take, one between cells."""
    widths = [width for width in _widths(lines) if width]
    return sum(widths) + len(widths) - 1


def counted(number: int, noun: str) -> str:
    """`1 answer`, `1,200 answers`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _rounded(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 1 else f"{rate:.2f}"


def _bytes(done: int, total: int | None) -> str:
    """Both in the unit of the larger, so that a bar keeps its width."""
    largest = total or done
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if largest >= size:
            return f"{done / size:.1f}{'' if total is None else f'/{total / size:.1f}'} {unit}"
    return f"{done / 1e3:.0f}{'' if total is None else f'/{total / 1e3:.0f}'} kB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
