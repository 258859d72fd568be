"""`mtgdm --help` against a bare Typer app with as many commands, in turns, in one run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 15
BARE = """
import typer
app = typer.Typer(help="Bare.")
{commands}
app()
"""
COMMAND = '''
@app.command("command{n}")
def command{n}(limit: int = 0, name: str = "x") -> None:
    """Do the work of number {n}."""
'''


def seconds(command: list[str], environment: dict[str, str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return time.perf_counter() - started


def main() -> None:
    from mtgdm.cli import app
    from mtgdm.registry import discover

    count = len(app.registered_commands) + len(app.registered_groups) + len(discover().stages)
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(
            BARE.format(commands="".join(COMMAND.format(n=n) for n in range(count))), encoding="utf-8"
        )
        ours = [sys.executable, "-m", "mtgdm", "--help"]
        theirs = [sys.executable, str(bare), "--help"]
        # Byte code is cached for both sides, as after an ordinary install.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "pycache")
        for command in (ours, theirs):
            seconds(command, environment)
        pairs = [(seconds(ours, environment), seconds(theirs, environment)) for _ in range(RUNS)]
    ratio = statistics.median(a / b for a, b in pairs)
    mtgdm_s, bare_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(
        f"start-up, {count} commands, {RUNS} pairs: mtgdm --help {mtgdm_s:.3f} s, bare Typer {bare_s:.3f} s"
    )
    print(f"ratio (median of pairs): {ratio:.2f}")


if __name__ == "__main__":
    main()
