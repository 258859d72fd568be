"""`mtgdm report` over a run of a million logged steps: its time without the browser, and its peak memory."""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEASURED = """\
import os, sys
from mtgdm.cli import main
try:
    main()
finally:
    status = open("/proc/self/status", encoding="utf-8").read() if os.path.exists("/proc/self/status") else ""
    peak = status.split("VmHWM:")[1].split()[0] if status else "0"
    print("MEASURED", os.times().user + os.times().system, peak)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    steps = parser.parse_known_args()[0].steps
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "log" / "train-20260101-000000.metrics.jsonl"
        write_metrics(metrics, steps)
        size = metrics.stat().st_size
        environment = {**os.environ, "BROWSER_PATH": str(Path(folder) / "none")}
        started = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-c", MEASURED, "report"],
            cwd=folder,
            env=environment,
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        taken = time.monotonic() - started
    cpu_s, peak_kib = ended.stdout.decode("utf-8").rpartition("MEASURED")[2].split()
    memory = f", at most {int(peak_kib) / 1024:.0f} MiB" if int(peak_kib) else ""
    print(
        f"mtgdm report over {steps:,} logged steps ({size / 1e6:,.0f} MB), PNGs left out: {taken:.1f} s, "
        f"{float(cpu_s):.1f} s of CPU{memory}"
    )


def write_metrics(path: Path, steps: int) -> None:
    """A run as `mtgdm train` writes it, evaluated two hundred times."""
    source = random.Random(5)
    path.parent.mkdir(parents=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:

        def write(**event: object) -> None:
            file.write(json.dumps(event) + "\n")

        write(event="start", base_model="bench", total_steps=steps, max_grad_norm=1.0, settings={"lr": 2e-4})
        for step in range(1, steps + 1):
            share = step / steps
            write(
                event="train",
                step=step,
                epoch=round(3 * share, 4),
                loss=1 + math.exp(-9 * share) + source.gauss(0, 0.06),
                learning_rate=2e-4 * (1 - share),
                grad_norm=0.6 + abs(source.gauss(0, 0.1)),
                step_seconds=2 + abs(source.gauss(0, 0.05)),
                tokens_per_s=7000 + source.gauss(0, 90),
                trained_tokens_per_s=3000.0,
                peak_memory_mib=21000,
            )
            if step % max(1, steps // 200) == 0:
                loss = 1.05 + math.exp(-9 * share)
                write(event="eval", step=step, eval_loss=loss, perplexity=math.exp(loss), seconds=8.0)
        write(event="end", steps=steps, best_step=steps, seconds=2.0 * steps)


if __name__ == "__main__":
    main()
