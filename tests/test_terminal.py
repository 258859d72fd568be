"""Progress as it is seen: one line a bar in every width, a line now and then in a log."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from rich.cells import cell_len
from rich.console import Console

from mtgdm import terminal
from mtgdm.terminal import Progress, Terminal

NOTE = "1,204 kept, 3 rejected · 412 tokens/s · 32 in flight"


class Clock:
    """Stands still until it is told otherwise."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(terminal, "time", clock)
    return clock


class Drawn(Terminal):
    """A terminal of some width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._err = Console(file=io.StringIO(), width=width, force_terminal=True)

    @property
    def lines(self) -> list[str]:
        """The bars as they stand."""
        paper = Console(
            file=io.StringIO(), width=self._err.width, force_terminal=True, color_system=None
        )  # another than `_err`, above whose bars everything it prints would go
        with paper.capture() as drawn:
            paper.print(self._live)
        return drawn.get().splitlines()


@contextmanager
def teaching(width: int, clock: Clock) -> Iterator[Drawn]:
    """A week's work, 98 seconds after its start."""
    drawn = Drawn(width)
    with drawn.progress("teacher", 60_000, "rows") as bar:
        clock.now += 98
        bar.advance(1207)
        bar.note(NOTE)
        yield drawn


@pytest.mark.parametrize("width", range(40, 180, 7))
def test_a_bar_is_one_line_however_narrow_the_terminal(width: int, clock: Clock) -> None:
    with teaching(width, clock) as drawn:
        (line,) = drawn.lines
    assert cell_len(line) <= width
    assert "1,207/60,000 rows" in line
    assert "1:19:33 left" in line
    assert "…" not in line, "what is shown is whole"


def test_what_says_least_goes_first(clock: Clock) -> None:
    with teaching(160, clock) as drawn:
        (wide,) = drawn.lines
    assert wide.split() == f"teacher ╸ 1,207/60,000 rows 12.3 rows/s 1:38 1:19:33 left {NOTE}".split()
    with teaching(112, clock) as drawn:
        (without_bar,) = drawn.lines
    assert without_bar.split() == wide.replace("╸", "").split()
    with teaching(80, clock) as drawn:
        (narrow,) = drawn.lines
    assert narrow == "teacher  1,207/60,000 rows 12.3 rows/s 1:19:33 left 1,204 kept, 3 rejected"


def test_the_bars_of_several_stages_stand_under_each_other(clock: Clock) -> None:
    drawn = Drawn(100)
    with drawn.progress_view():
        assert drawn.lines == []
        with drawn.progress("prompts", None, "spots") as bar:
            clock.now += 2
            bar.advance(21)
        with drawn.progress("eval-report", 10, "rows") as bar:
            bar.advance(10)
            first, second = drawn.lines
    assert (first.index("━"), first.split()[2:]) == (12, ["21", "spots", "10.5", "spots/s", "0:02"])
    assert (second.index("━"), first.index("21 spots")) == (12, second.index("10/10 rows"))


def test_work_that_fails_before_anything_is_done_leaves_no_bar(clock: Clock) -> None:
    drawn = Drawn(100)
    with drawn.progress_view():
        with pytest.raises(OSError, match="gone"), drawn.progress("teacher", 10, "rows"):
            raise OSError("gone")
        with pytest.raises(OSError, match="gone"), drawn.progress("train", 10, "steps") as bar:
            bar.advance()
            raise OSError("gone")
        assert [line.split()[0] for line in drawn.lines] == ["train"]


def test_the_pace_is_that_of_late_and_the_end_that_of_the_whole(clock: Clock) -> None:
    bar = Progress("teacher", 2000, "rows", 100)
    assert (bar.rate, bar.left) == ("", "")
    for _ in range(3600):  # an hour in which the server hung
        clock.now += 1
        assert bar.rate == ""
    for _ in range(600):
        clock.now += 1
        bar.advance()
        assert bar.rate
    assert (bar.count, bar.rate, bar.left) == ("  700/2,000 rows", "1.0 rows/s", "21:40 left")
    bar.finish()
    clock.now += 60
    assert (bar.rate, bar.elapsed, bar.left) == ("0.14 rows/s", "1:10:00", "")


def test_slow_work_is_told_by_the_minute_and_long_work_in_days(clock: Clock) -> None:
    bar = Progress("teacher", 20_000, "rows", 0)
    clock.now += 90
    bar.advance(3)
    assert (bar.rate, bar.left) == ("2.0 rows/min", "6 d 22 h left")


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Terminal().progress("teacher", 60, "rows", done=10) as bar:
        for _ in range(40):
            clock.now += 1
            bar.advance()
            bar.note(f"{NOTE} or so")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"teacher: 25/60 rows · 1.0 rows/s · 0:15 · 0:35 left · {NOTE} or so",
        f"teacher: 40/60 rows · 1.0 rows/s · 0:30 · 0:20 left · {NOTE} or so",
        f"teacher: 50/60 rows · 1.0 rows/s · 0:40 · {NOTE} or so",
    ]


def test_a_log_hears_of_work_that_does_not_move(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_INTERVAL_S", 0.02)
    with Terminal().progress("teacher", 60, "rows") as bar:
        bar.note("0 kept, 0 rejected · 3 asked again")
        time.sleep(0.5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) >= 3
    assert set(said) == {"teacher: 0/60 rows · 0:00 · 0 kept, 0 rejected · 3 asked again"}


def test_a_log_says_how_far_an_interrupted_work_came(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    for done in (0, 7):
        with pytest.raises(KeyboardInterrupt), Terminal().progress("teacher", 60, "rows") as bar:
            clock.now += 1
            bar.advance(done)
            raise KeyboardInterrupt
    assert capsys.readouterr().err.splitlines() == ["teacher: 7/60 rows · 7.0 rows/s · 0:01"]


@pytest.mark.parametrize(
    ("done", "total", "shown"),
    [
        (1_500, 9_900, "2/10 kB"),
        (0, 3_100_000, "0.0/3.1 MB"),
        (812_000_000, 3_100_000_000, "0.8/3.1 GB"),
        (2, None, "0 kB"),
    ],
)
def test_bytes_are_told_in_the_unit_of_the_whole(
    done: int, total: int | None, shown: str, clock: Clock
) -> None:
    bar = Progress("package", total, "bytes", done)
    assert bar.count == shown
    clock.now += 2
    bar.advance(3_000_000)
    assert bar.rate == "1.5 MB/s"
