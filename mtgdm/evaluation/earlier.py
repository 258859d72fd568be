"""What an earlier run of an evaluation left, and what of it still holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtgdm import rows
from mtgdm.errors import BadRow, UserError
from mtgdm.rows import Journal

WAYS_OUT = "--overwrite replaces them; --out keeps them and writes another file"


def read_outputs(out: Path) -> list[dict[str, Any]]:
    """The rows of an output file but a last line that a kill cut off; UserError where they are no evaluation's."""
    found: list[dict[str, Any]] = []
    torn: BadRow | None = None
    for number, line in rows.read_lines(out):
        if torn is not None:
            raise torn
        try:
            value = rows.parse_object(out, number, line)
        except BadRow as error:
            torn = error
            continue
        if not isinstance(value.get("output"), str) or not isinstance(value.get("id"), str):
            raise UserError(
                "this file holds rows, but none of an evaluation",
                where=f"{out}:{number}",
                hint="--out names the file that answers and metrics go to",
            )
        found.append(value)
    return found


def mend(out: Path) -> None:
    """Cut off what a kill left of a last line."""
    with Journal(out):
        pass


def about(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a row says of the evaluation that made it; nothing where another tool did."""
    meta = value.get("meta")
    made = meta.get("eval") if isinstance(meta, dict) else None
    return made if isinstance(made, dict) else {}


def metrics_of(value: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The metrics of a row's answers: the student's, and its base's where that was asked."""
    for key in ("metrics", "base_metrics"):
        if isinstance(value.get(key), dict):
            yield value[key]


def fits_limit(runtime: Mapping[str, Any], made_under: object, limit: int) -> bool:
    """Whether an answer is the one that greedy decoding gives within `limit` tokens.

    One that came to its own end is the same under every limit that has room for it; one that was cut is so
    under its own limit alone.
    """
    if runtime.get("finish_reason") == "length":
        return made_under == limit
    tokens = runtime.get("output_tokens")
    return not isinstance(tokens, int) or tokens <= limit


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same once they are written: a lone surrogate becomes U+FFFD there."""
    return bool(one == other) or rows.encode({"": one}) == rows.encode({"": other})
