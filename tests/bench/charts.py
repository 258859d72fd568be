"""PNGs of charts: four in one browser start against one, side by side; both wait for the same start of the browser."""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from pathlib import Path

from mtgdm.charts import style
from mtgdm.charts.export import find_browser, install_hint, write_pngs

MANY = 4
POINTS = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    given = parser.parse_known_args()[0]
    if find_browser() is None:
        print(f"charts: not measured, there is no Chrome or Chromium: {install_hint()}")
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds(Path(folder), 1)  # the browser's files are in the cache now
        pairs = [(seconds(Path(folder), 1), seconds(Path(folder), MANY)) for _ in range(given.runs)]
    ratios = [many / one for one, many in pairs]
    print(
        f"{MANY} charts of 3 x {POINTS:,} points at twice their size take {statistics.median(ratios):.2f} times as "
        f"long as one ({', '.join(f'{ratio:.2f}' for ratio in ratios)}): "
        f"{statistics.median(many for _, many in pairs):.1f} s against "
        f"{statistics.median(one for one, _ in pairs):.1f} s"
    )


def seconds(folder: Path, count: int) -> float:
    """The time to draw so many charts, the start of the process and the browser included."""
    figures = {folder / f"{number}.png": made(number) for number in range(count)}
    started = time.monotonic()
    export = write_pngs(figures, limit_s=120)
    taken = time.monotonic() - started
    if export.problem is not None:
        raise SystemExit(f"the charts were not drawn: {export.problem}")
    return taken


def made(seed: int) -> style.Figure:
    """A chart as long as a report's: three panels with a line of as many points as a line may have."""
    source = random.Random(seed)
    chart = style.figure("训练曲线", "三条线", 800)
    x = list(range(POINTS))
    for number, domain in enumerate(style.stacked([2, 1, 1], 0.1), start=1):
        style.panel(chart, number, f"panel {number}", y=domain)
        y = [math.exp(-step / 700) + source.gauss(0, 0.05) for step in x]
        chart["data"].append(style.line((x, y), f"line {number}", style.BLUE, 1, number=number))
    return chart


if __name__ == "__main__":
    main()
