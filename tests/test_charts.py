"""PNGs of figures: drawn in one browser start, and no report waits for a browser that does not answer."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtgdm.charts import style
from mtgdm.charts.export import PNG_SIGNATURE, find_browser, font_hint, install_hint, write_pngs

ROOM_S = 60.0


@pytest.fixture
def browser() -> str:
    """A browser to draw with; in CI a test that needs one fails without it."""
    found = find_browser()
    if found is None and os.environ.get("CI"):
        pytest.fail(f"no Chrome or Chromium on this machine: {install_hint()}")
    if found is None:
        pytest.skip(f"no Chrome or Chromium on this machine: {install_hint()}")
    return found


def small_figure(title: str = "故宫博物院") -> style.Figure:
    chart = style.figure(title, "a subtitle with <angle> & brackets", 400)
    style.panel(chart, 1, "Loss", y=(0.0, 1.0))
    chart["data"].append({"type": "scatter", "x": [1, 2, 3], "y": [3, None, 1]})
    return chart


def large_figure() -> style.Figure:
    """A figure that takes a browser a while, so that it can be killed meanwhile."""
    chart = small_figure()
    points = [number * number % 1009 for number in range(60_000)]
    chart["data"].append(style.line((range(len(points)), points), "long", style.BLUE, 1))
    return chart


def fake_browser(folder: Path, script: str) -> Path:
    path = folder / "browser"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8", newline="\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def running(text: str) -> list[str]:
    """Processes whose command line holds the text (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in command:
            found.append(command)
    return found


def test_every_figure_of_a_report_is_drawn_at_twice_its_size(tmp_path: Path, browser: str) -> None:
    pictures = [tmp_path / "out" / f"{number}.png" for number in range(2)]
    export = write_pngs({picture: small_figure() for picture in pictures}, limit_s=ROOM_S)
    assert (export.written, export.problem) == (pictures, None)
    for picture in pictures:
        content = picture.read_bytes()
        assert content.startswith(PNG_SIGNATURE)
        assert struct.unpack(">II", content[16:24]) == (style.WIDTH * 2, 800)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0.png", "1.png"]


def test_a_figure_that_cannot_be_drawn_leaves_no_picture(tmp_path: Path, browser: str) -> None:
    broken = small_figure()
    broken["layout"]["width"] = 200_000  # more than a canvas holds: the file that comes is no PNG
    pictures = {tmp_path / "good.png": small_figure(), tmp_path / "broken.png": broken}
    export = write_pngs(pictures, limit_s=ROOM_S)
    assert export.problem == "the browser failed: a picture is not whole"
    assert not list(tmp_path.glob("*.png"))


def test_without_a_browser_there_is_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nowhere"))
    export = write_pngs({tmp_path / "a.png": small_figure()}, limit_s=ROOM_S)
    assert export.written == []
    assert export.problem is not None and "nowhere" in export.problem
    assert export.hint == install_hint()


@pytest.mark.skipif(sys.platform == "win32", reason="the fake browser is a shell script")
def test_a_browser_that_never_answers_is_ended_at_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = fake_browser(tmp_path, f"sleep 300 # {tmp_path}")
    monkeypatch.setenv("BROWSER_PATH", str(sleeper))
    begun = time.monotonic()
    export = write_pngs({tmp_path / "a.png": small_figure()}, limit_s=4)
    assert time.monotonic() - begun < 12
    assert export.problem == "the browser did not finish within 4 s"
    assert export.hint is not None and "--chart-timeout-s" in export.hint
    assert not list(tmp_path.glob("*.png"))
    if sys.platform == "linux":
        assert running(str(sleeper)) == []


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_report_leaves_no_browser_behind(tmp_path: Path) -> None:
    sleeper = fake_browser(tmp_path, f"sleep 300 # {tmp_path}")
    script = (
        "from pathlib import Path\nfrom mtgdm.charts.export import write_pngs\n"
        "layout = {'width': 400, 'height': 300}\n"
        f"write_pngs({{Path({str(tmp_path)!r}) / 'a.png': {{'data': [], 'layout': layout}}}}, limit_s=120)\n"
    )
    environment = {**os.environ, "BROWSER_PATH": str(sleeper), "TMPDIR": str(tmp_path)}
    report = subprocess.Popen([sys.executable, "-c", script], env=environment)
    assert waited_for(lambda: len(running(str(sleeper))) > 0)
    report.kill()
    report.wait()
    assert waited_for(lambda: not running(str(sleeper)) and not list(tmp_path.glob("mtgdm-charts-*")))


def waited_for(condition: Callable[[], bool], limit_s: float = 30) -> bool:
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="the fake browser is a shell script")
def test_a_browser_that_dies_is_a_problem_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROWSER_PATH", str(fake_browser(tmp_path, "exit 1")))
    export = write_pngs({tmp_path / "a.png": small_figure()}, limit_s=ROOM_S)
    assert export.problem is not None
    assert export.problem.startswith("the browser failed: BrowserFailedError: ")
    assert "\n" not in export.problem and len(export.problem) < 200


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("seconds", ["0.5", "2.5"])
def test_a_browser_killed_on_the_way_costs_the_charts_and_leaves_nothing(
    tmp_path: Path,
    browser: str,
    monkeypatch: pytest.MonkeyPatch,
    seconds: str,
) -> None:
    killed = f'exec timeout -s KILL {seconds} "{browser}" "$@" # {tmp_path}'
    monkeypatch.setenv("BROWSER_PATH", str(fake_browser(tmp_path, killed)))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    begun = time.monotonic()
    pictures = {tmp_path / f"{number}.png": large_figure() for number in range(4)}
    export = write_pngs(pictures, limit_s=ROOM_S)
    assert time.monotonic() - begun < ROOM_S + 5
    assert export.problem is not None and export.problem.startswith("the browser ")
    assert export.hint and not list(tmp_path.glob("*.png"))
    assert waited_for(lambda: not running(str(tmp_path)) and not list(tmp_path.glob("mtgdm-charts-*")))


@pytest.mark.skipif(sys.platform != "linux", reason="the browser is killed by `timeout`")
def test_a_browser_killed_once_is_started_again(
    tmp_path: Path, browser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    script = (
        f'[ -e "{first}" ] && exec "{browser}" "$@"\n: > "{first}"\nexec timeout -s KILL 1 "{browser}" "$@"'
    )
    monkeypatch.setenv("BROWSER_PATH", str(fake_browser(tmp_path, script)))
    export = write_pngs({tmp_path / "a.png": small_figure()}, limit_s=2 * ROOM_S)
    assert (export.problem, len(export.written)) == (None, 1)
    assert first.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems come with a Chinese font")
@pytest.mark.parametrize(
    ("listed", "title", "hinted"), [("", "故宫", True), ("Noto", "故宫", False), ("", "Palace", False)]
)
def test_boxes_in_place_of_chinese_are_foretold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: str, title: str, hinted: bool
) -> None:
    fonts = tmp_path / "fc-list"
    fonts.write_text(f"#!/bin/sh\necho -n {listed}\n", encoding="utf-8")
    fonts.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    hint = font_hint({tmp_path / "a.png": small_figure(title)})
    assert (hint is not None and "no Chinese font" in hint) is hinted


def test_a_missing_temporary_folder_costs_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    export = write_pngs({tmp_path / "a.png": small_figure()}, limit_s=ROOM_S)
    assert export.problem is not None and "missing" in export.problem


def test_panels_fill_the_height_from_the_top() -> None:
    domains = style.stacked([2, 1, 1], 0.1)
    assert domains[0][1] == 1.0
    assert domains[-1][0] == pytest.approx(0.0)
    assert domains[0][0] - domains[1][1] == pytest.approx(0.1)
    assert style.beside([1, 1], 0.1)[0][0] == pytest.approx(0.0)


def test_every_colour_has_its_counterpart_in_the_dark() -> None:
    used = {
        value
        for name, value in vars(style).items()
        if name.isupper() and isinstance(value, str) and value.startswith("#")
    }
    assert used == set(style.DARK)
    assert len(set(style.DARK.values())) == len(style.DARK)


def test_a_faded_colour_keeps_its_digits() -> None:
    assert style.faded(style.BLUE, 0.5) == style.BLUE + "80"
