"""PNGs of figures: one browser start for all of them, in a child process with a wall-clock limit.

Chrome may be missing, hang, or die half-way; a report never waits for it longer than the limit and
never fails because of it. What came of it is an `Export`: the pictures that are whole, or the reason
and the command that mends it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgdm.charts.style import Figure
from mtgdm.rows import replace

SCALE = 2
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
NO_BROWSER = 3
"""Exit code of the child where kaleido finds no browser."""
FOLDER = "mtgdm-charts-"
ATTEMPTS = 2
"""A browser that dies half-way (killed for memory, say) is started once more."""


@dataclass(frozen=True)
class Export:
    """What came of drawing: the PNGs written, or why there are none and what to do about it."""

    written: list[Path] = field(default_factory=list)
    problem: str | None = None
    hint: str | None = None


def write_pngs(figures: Mapping[Path, Figure], *, limit_s: float) -> Export:
    """Draw every figure into its file; all are written, or none."""
    deadline = time.monotonic() + limit_s
    try:
        # Chromium leaves its profile behind when it is killed: with all of it in one folder nothing stays.
        with tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as folder:
            return _draw(figures, Path(folder), deadline, limit_s)
    except OSError as error:
        return Export(problem=f"the charts could not be drawn: {error}", hint=install_hint())


def plotly_source() -> str:
    """The JavaScript of plotly, for a page that works without the network."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def find_browser() -> str | None:
    """The browser kaleido would start, or None."""
    from choreographer.browsers.chromium import Chromium

    named = os.environ.get("BROWSER_PATH")
    if named:
        return named if Path(named).is_file() else None
    try:
        return Chromium.find_browser(skip_local=False)
    except OSError:  # a HOME that may not be read, for one
        return None


def install_hint() -> str:
    """The command that brings a browser to this machine."""
    if sys.platform.startswith("linux") and shutil.which("apt-get") and "ubuntu" not in _os_release():
        sudo = "" if os.geteuid() == 0 else "sudo "
        return f"{sudo}apt-get install -y chromium fonts-noto-cjk fonts-inter"
    if sys.platform == "darwin":
        return "brew install --cask google-chrome   (or: plotly_get_chrome -y)"
    return "plotly_get_chrome -y"


def font_hint(figures: Mapping[Path, Figure]) -> str | None:
    """What to install where a figure holds Chinese and the system has no font: boxes would be drawn."""
    if not sys.platform.startswith("linux") or shutil.which("fc-list") is None:
        return None
    text = json.dumps(list(figures.values()), ensure_ascii=False)
    if not any("\u4e00" <= character <= "\u9fff" for character in text):
        return None
    found = subprocess.run(["fc-list", ":lang=zh"], capture_output=True, check=False, timeout=30)
    if found.returncode != 0 or found.stdout.strip():
        return None
    command = "apt-get install -y fonts-noto-cjk" if shutil.which("apt-get") else "install Noto Sans CJK SC"
    return f"no Chinese font is installed, the charts show boxes instead: {command}"


def _draw(figures: Mapping[Path, Figure], folder: Path, deadline: float, limit_s: float) -> Export:
    drawn = {path: folder / f"{number}.png" for number, path in enumerate(figures)}
    jobs = [{"fig": figures[path], "path": str(drawn[path])} for path in figures]
    request = json.dumps(jobs).encode("utf-8")
    problem = ""
    for attempt in range(ATTEMPTS):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            break
        # A browser that dies as it starts can leave kaleido waiting for it: another try needs time too.
        code, said = _run_child(request, folder, left_s / (ATTEMPTS - attempt))
        if code is None:
            problem = ""
            continue
        if code == NO_BROWSER:
            return Export(problem=_no_browser(), hint=install_hint())
        if code == 0 and all(_is_png(path) for path in drawn.values()):
            for path, picture in drawn.items():
                with replace(path) as file:
                    file.write(picture.read_bytes())
            return Export(written=list(drawn))
        problem = "a picture is not whole" if code == 0 else said or f"it ended with code {code}"
    if not problem:
        hint = f"give it longer with --chart-timeout-s, or another browser: {install_hint()}"
        return Export(problem=f"the browser did not finish within {limit_s:g} s", hint=hint)
    return Export(problem=f"the browser failed: {problem}", hint=install_hint())


def _run_child(request: bytes, folder: Path, limit_s: float) -> tuple[int | None, str]:
    """Exit code and last words of the drawing process; no code where it had to be killed at the limit."""
    with (folder / "stderr").open("w+b") as errors:
        child = subprocess.Popen(
            # -P: nothing of the workspace is imported
            [sys.executable, "-P", "-m", "mtgdm.charts", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=errors,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(folder)},
        )
        try:
            child.communicate(request, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            _end_tree(child)
        errors.seek(0)
        lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return child.returncode, _last_words(lines[-1].strip() if lines else "")


def _last_words(line: str) -> str:
    """The last line of a traceback without the module of the error and without advice for programmers."""
    if line.endswith("CancelledError"):  # all that kaleido says of a browser killed while it draws
        return "it ended before the charts were drawn"
    text = re.sub(r"^(?:\w+\.)+(\w+:)", r"\1", line)
    text = re.sub(r"^(\w+: )\('(.*?)', '.*\)$", r"\1\2", text)
    return text if len(text) <= 160 else text[:159] + "…"


def _no_browser() -> str:
    named = os.environ.get("BROWSER_PATH")
    if named:
        return f"BROWSER_PATH is {named}, where no browser lies"
    return "there is no Chrome or Chromium to draw the charts with"


def _is_png(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE and path.stat().st_size > 1000


def _end_tree(child: subprocess.Popen[bytes]) -> None:
    """Kill a child that still runs, and the browser under it, which lives in a session of its own."""
    if child.poll() is not None:
        return
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(child.pid)], capture_output=True, check=False)
    else:
        _kill([*_descendants(child.pid), child.pid])
    child.wait()


def _kill(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _end_with(parent: int) -> None:
    """Wait until the parent is gone (killed, say); then nobody is left to end the browser and to tidy up."""
    while os.getppid() == parent:
        time.sleep(1)
    _kill(_descendants(os.getpid()))
    folder = Path(tempfile.gettempdir())
    if folder.name.startswith(FOLDER):
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _descendants(root: int) -> list[int]:
    """Every process under `root`."""
    parents = _parents()
    found: list[int] = []
    below = [root]
    while below:
        parent = below.pop()
        children = [pid for pid, above in parents.items() if above == parent]
        found += children
        below += children
    return found


def _parents() -> dict[int, int]:
    """The parent of every process: from /proc, or from `ps` where there is none (macOS)."""
    parents: dict[int, int] = {}
    if Path("/proc/self/stat").exists():
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                # The name in the second field may hold anything, blanks and brackets too.
                fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(stat.parent.name)] = int(fields[1])
        return parents
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False)
    for line in listing.stdout.splitlines():
        pid, above = line.split()
        parents[int(pid)] = int(above)
    return parents


def _os_release() -> str:
    path = Path("/etc/os-release")
    return path.read_text(encoding="utf-8", errors="replace").lower() if path.is_file() else ""


def draw_requested(parent: int) -> int:
    """The child's part: figures as JSON on standard input, PNGs into the paths they name."""
    browser = find_browser()
    if browser is None:
        return NO_BROWSER
    if os.name != "nt":  # Windows keeps the number of a parent that is gone
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    import kaleido

    jobs: list[dict[str, Any]] = json.loads(sys.stdin.buffer.read())
    for job in jobs:
        layout = job["fig"]["layout"]
        job["opts"] = {
            "format": "png",
            "width": layout["width"],
            "height": layout["height"],
            "scale": SCALE,
        }
    # MathJax would be asked from the internet: where packets vanish that costs a minute.
    kaleido.write_fig_from_object_sync(
        jobs, kopts={"n": 1, "mathjax": False, "path": browser}, cancel_on_error=True
    )
    return 0
