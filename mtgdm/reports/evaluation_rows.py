"""The rows of an evaluation for the row browser of its page: those with most wrong first, as many as fit."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtgdm.errors import BadRow
from mtgdm.reports import page
from mtgdm.reports.evaluation import (
    METRICS,
    SPREADS,
    EvalRow,
    Evaluation,
    without_nan,
)
from mtgdm.rows import Row, read_rows

ROOM = 16 * 2**20
"""Bytes of rows in a page: more make it slow to open, on a phone above all."""
TOLD = 0.02
"""Two answers whose badness differs by less are as good as each other."""
SPREAD_LABELS = {
    "latency_s": "latency, seconds",
    "tokens_per_s": "tokens a second",
    "prompt_tokens": "prompt tokens",
    "output_tokens": "output tokens",
    "length_ratio": "length, the reference's is 1",
}
SMALL_IS_FINE = {"latency_s", *(metric.key for metric in METRICS if metric.lower_is_better)}


def _score(row: EvalRow) -> float | None:
    return None if row.judge is None else float(row.judge["score"])


VERDICTS: dict[str, Callable[[EvalRow], bool]] = {
    "something wrong": lambda row: bool(row.why_bad),
    "exact": lambda row: row.student.get("exact_match") is True,
    "valid": lambda row: True in (row.student.get("contract_valid"), row.student.get("prose_valid")),
    "contract failed": lambda row: row.student.get("contract_valid") is False,
    "prose rules failed": lambda row: row.student.get("prose_valid") is False,
    "unsupported facts": lambda row: (row.student.get("unsupported_facts") or 0) > 0,
    "wrong language": lambda row: row.student.get("language_ok") is False,
    "cut": lambda row: row.student.get("finish_reason") == "length",
    "better than base": lambda row: (row.gain or 0) >= TOLD,
    "worse than base": lambda row: (row.gain or 0) <= -TOLD,
    "judge: won": lambda row: _score(row) == 1,
    "judge: tie": lambda row: _score(row) == 0.5,
    "judge: lost": lambda row: _score(row) == 0,
    "trained on": lambda row: row.leaked,
}
"""What rows can be filtered by."""


@dataclass
class RowsOfPage:
    """What the browser shows, ready for a script element, and what was learnt from the file of texts."""

    json: str
    shown: int
    of: int
    texts: int = 0
    """How many rows have their texts."""
    models: list[str] = field(default_factory=list)
    problem: BadRow | None = None
    """Where the file of texts could not be read any further."""

    @property
    def cut(self) -> bool:
        """Whether rows had to be left out."""
        return self.shown < self.of


def rows_of_page(evaluation: Evaluation, outputs: Path, *, room: int = ROOM) -> RowsOfPage:
    """The rows with their texts from `outputs`; a row there whose metrics differ is of another evaluation.

    Where `room` bytes hold not all of them, those with most wrong are kept; no more than that is in memory.
    """
    columns = _columns(evaluation.rows)
    kept = _Kept(room)
    places = {row.id: place for place, row in enumerate(_worst_first(evaluation.rows))}
    orders = {row.id: order for order, row in enumerate(evaluation.rows, start=1)}
    missing = {row.id: row for row in evaluation.rows}
    systems: dict[str, int] = {}
    models: dict[str, None] = {}
    problem: BadRow | None = None
    try:
        for text in _texts(outputs):
            row = missing.get(identity := _identity(text))
            if row is None or without_nan(text.rest["metrics"]) != row.student:
                continue
            del missing[identity]
            if model := _model(text):
                models[model] = None
            if kept.wants(places[row.id]):
                value = _row(row, orders[row.id], columns) | _its_texts(text, systems)
                kept.add(places[row.id], page.for_script(value))
    except BadRow as error:
        problem = error
    for row in missing.values():
        if kept.wants(places[row.id]):
            kept.add(places[row.id], page.for_script(_row(row, orders[row.id], columns)))
    found = kept.in_order()
    head = page.for_script(
        {
            "metrics": [_column(key) for key in columns],
            "verdicts": list(VERDICTS),
            "systems": list(systems),
        }
    )
    return RowsOfPage(
        f'{head[:-1]},"rows":[{",".join(found)}]}}',
        shown=len(found),
        of=len(evaluation.rows),
        texts=len(evaluation.rows) - len(missing),
        models=list(models),
        problem=problem,
    )


class _Kept:
    """Pieces of text by their place, the first ones as far as there is room."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._taken = 0
        self._pieces: list[tuple[int, str, int]] = []
        """A heap with the last place on top."""
        self._end: int | None = None
        """Places from here on had to be given up."""

    def wants(self, place: int) -> bool:
        return self._end is None or place < self._end

    def add(self, place: int, piece: str) -> None:
        size = len(piece.encode("utf-8"))
        heapq.heappush(self._pieces, (-place, piece, size))
        self._taken += size
        while self._taken > self._room and len(self._pieces) > 1:
            last, _, size = heapq.heappop(self._pieces)
            self._end = -last
            self._taken -= size

    def in_order(self) -> list[str]:
        return [piece for _, piece, _ in sorted(self._pieces, reverse=True)]


def _worst_first(rows: Sequence[EvalRow]) -> list[EvalRow]:
    return sorted(rows, key=lambda row: (not row.why_bad, -row.badness))


def _columns(rows: Sequence[EvalRow]) -> list[str]:
    """The metrics that some row has."""
    known = (*(metric.key for metric in METRICS), *SPREADS)
    found = {key for row in rows for key in known if row.student.get(key) is not None}
    return [key for key in known if key in found]


def _column(key: str) -> dict[str, Any]:
    labels = {metric.key: metric.label for metric in METRICS} | SPREAD_LABELS
    return {"key": key, "label": labels[key], "small": key in SMALL_IS_FINE}


def _row(row: EvalRow, order: int, columns: Sequence[str]) -> dict[str, Any]:
    """What the metrics say of a row; without its texts."""
    value = {
        "id": row.id,
        "order": order,
        "spot": row.spot,
        "province": row.province,
        "type": row.type,
        "verdicts": [name for name, holds in VERDICTS.items() if holds(row)],
        "why": row.why_bad,
        "problem": row.student.get("problem"),
        "bad": row.badness,
        "gain": row.gain,
    }
    for who in ("student", "base", "teacher"):
        metrics: Mapping[str, Any] | None = getattr(row, who)
        value[who] = metrics and [metrics.get(key) for key in columns]
    return {key: one for key, one in value.items() if one is not None}


def _its_texts(text: Row, systems: dict[str, int]) -> dict[str, Any]:
    """The texts of a row; a system message, which most rows share, is the number of its text."""
    value: dict[str, Any] = {
        "split": text.split,
        "prompt": [
            [
                message["role"],
                systems.setdefault(message["content"], len(systems))
                if message["role"] == "system"
                else message["content"],
            ]
            for message in text.prompt
        ],
        "reference": str(text.rest.get("reference") or ""),
        "output": text.rest["output"],
    }
    base = text.rest.get("base_output")
    return value | ({"base_output": base} if isinstance(base, str) else {})


def _texts(outputs: Path) -> Iterator[Row]:
    if outputs.is_file():
        for row in read_rows(outputs):
            if isinstance(row.rest.get("output"), str) and isinstance(row.rest.get("metrics"), dict):
                yield row


def _identity(text: Row) -> str:
    """The id as the metrics name it."""
    return str(text.rest.get("given_id", text.id))


def _model(text: Row) -> str | None:
    about = text.meta.get("eval")
    model = about.get("model") if isinstance(about, dict) else None
    return model if isinstance(model, str) else None
