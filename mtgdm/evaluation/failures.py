"""The answers with something wrong, in a file of their own, the worst first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mtgdm import rows
from mtgdm.scoring.failures import badness, why_bad


def failures_path(out: Path) -> Path:
    """Where the failures of an evaluation go: `eval_outputs.jsonl` has `eval_failures.jsonl` beside it."""
    stem = out.stem.replace("outputs", "failures") if "outputs" in out.stem else f"{out.stem}.failures"
    return out.with_name(f"{stem}{out.suffix}")


def write_failures(path: Path, evaluated: Iterable[Mapping[str, Any]]) -> int:
    """The rows with something wrong, the worst first, each with the reasons; returns how many there are."""
    bad = [(why, row) for row in evaluated if (why := why_bad(row["metrics"], row.get("reference_metrics")))]
    bad.sort(key=lambda pair: -badness(pair[1]["metrics"], pair[1].get("reference_metrics")))
    with rows.replace(path) as file:
        for why, row in bad:
            file.write(
                rows.encode({"id": row["id"], "why": why, **{k: v for k, v in row.items() if k != "id"}})
            )
    return len(bad)
