"""What an earlier run of an evaluation left, and what of it still holds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtgdm import rows
from mtgdm.errors import BadRow, UserError
from mtgdm.rows import Journal

_BEGINNING = b'{"id": "'
WAYS_OUT = "--overwrite replaces them; --out keeps them and writes another file"


def read_outputs(out: Path) -> list[dict[str, Any]]:
    """The rows of an output file but a last line that a kill cut off; UserError where they are no evaluation's."""
    found: list[dict[str, Any]] = []
    for number, line in rows.read_lines(out):
        if _is_torn(line) and not _ends_a_line(out):
            break
        try:
            value = rows.parse_object(out, number, line)
        except BadRow as error:
            if not found:
                raise _no_outputs(out, number) from error
            raise BadRow(out, number, error.reason, hint="delete the line: its row is asked again") from error
        if not _is_output(value):
            raise _no_outputs(out, number)
        found.append(value)
    return found


def refuse_other_files(out: Path) -> None:
    """UserError where a file to be overwritten holds no row of an evaluation: it is somebody's work."""
    first = 0
    for number, line in rows.read_lines(out):
        first = first or number
        with suppress(BadRow):
            if _is_output(rows.parse_object(out, number, line)):
                return
        if _is_torn(line) and number == first:
            return
    if first:
        raise _no_outputs(out, first)


def _is_output(value: Mapping[str, Any]) -> bool:
    texts = all(isinstance(value.get(key), str) for key in ("id", "output"))
    return (
        texts and isinstance(value.get("metrics"), dict) and isinstance(value.get("base_metrics", {}), dict)
    )


def _no_outputs(out: Path, number: int) -> UserError:
    return UserError(
        "this is no row of an evaluation of mtgdm",
        where=f"{out}:{number}",
        hint="--out names the file that answers and metrics go to; move this one away if it is an old one",
    )


def _is_torn(line: bytes) -> bool:
    """Whether a line is the beginning of one that an evaluation writes, or what a power cut leaves of it."""
    if line.strip(b"\0") == b"":
        return True
    try:
        json.loads(line)
    except ValueError:
        return line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
    return False


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def mend(out: Path) -> None:
    """Cut off what a kill left of a last line."""
    with Journal(out):
        pass


class Aside:
    """Answers that are to be replaced, kept until the first new one is there: a run that cannot ask loses nothing."""

    def __init__(self, out: Path) -> None:
        """Bring back what a run that was killed before its first answer put aside."""
        self._pairs = [(path, _aside(path)) for path in (out, rows.manifest_path(out))]
        if _aside(out).exists():
            if out.exists() and out.stat().st_size:
                self.forget()
            else:
                self.bring_back()

    def put(self) -> None:
        """Put them aside."""
        for path, aside in self._pairs:
            if path.exists():
                path.replace(aside)

    def bring_back(self) -> None:
        """As if nothing had been asked."""
        for path, aside in self._pairs:
            if aside.exists():
                aside.replace(path)

    def forget(self) -> None:
        """They are replaced now."""
        for _, aside in self._pairs:
            aside.unlink(missing_ok=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


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
