"""What a base model answered, kept until the student's answers stand beside it.

The base is asked before the student, and on a large model that is hours: whatever ends a run, or is asked in
between, its answers wait in a journal of their own.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from mtgdm import rows
from mtgdm.errors import BadRow
from mtgdm.evaluation.earlier import fits_limit
from mtgdm.rows import Journal

if TYPE_CHECKING:
    from mtgdm.evaluation.student import Reply
    from mtgdm.rows import Row

Said = tuple[str, dict[str, Any]]
"""An answer: its text, and the metrics that are not about the text."""


class BaseAnswers:
    """The journal of one evaluation's base answers; open, it knows those that hold and takes new ones.

    `label` and `fingerprint` tell the evaluation from others that write to the same outputs, `limit` is where
    an answer is cut.
    """

    def __init__(self, out: Path, label: str, fingerprint: str, limit: int) -> None:
        self.path = out.with_name(f".{out.name}.base")
        self.found: dict[str, Said] = {}
        """By the id of the row."""
        self._label = label
        self._fingerprint = fingerprint
        self._limit = limit

    def __enter__(self) -> Self:
        self._journal = Journal(self.path, inspect=self._inspect)
        self._journal.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._journal.__exit__(kind, error, trace)

    def add(self, row: Row, reply: Reply) -> None:
        """Keep an answer."""
        value = {
            "id": row.id,
            "messages": row.prompt,
            "model": self._label,
            "fingerprint": self._fingerprint,
            "max_new_tokens": self._limit,
            "output": reply.text,
            "runtime": reply.runtime,
        }
        self._journal.append(value)
        self.found[row.id] = (reply.text, reply.runtime)

    def forget(self, done: Container[str]) -> None:
        """Drop the answers that stand beside their student's now, and those of this evaluation before it changed."""
        there = [self._parsed(*line) for line in rows.read_lines(self.path)] if self.path.exists() else []
        waiting = [value for value in there if self._waits(value, done)]
        if not waiting:
            self.path.unlink(missing_ok=True)
        elif len(waiting) < len(there):
            with rows.replace(self.path) as file:
                file.writelines(map(rows.encode, waiting))

    def _waits(self, value: dict[str, Any], done: Container[str]) -> bool:
        if value.get("model") != self._label:
            return True
        return value["fingerprint"] == self._fingerprint and value["id"] not in done

    def _inspect(self, number: int, line: bytes) -> None:
        value = self._parsed(number, line)
        if value["fingerprint"] == self._fingerprint and fits_limit(
            value["runtime"], value.get("max_new_tokens"), self._limit
        ):
            self.found[value["id"]] = (value["output"], value["runtime"])

    def _parsed(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            value = rows.parse_object(self.path, number, line)
        except BadRow as error:
            hint = "delete the line: the base is asked again"
            raise BadRow(self.path, number, error.reason, hint=hint) from error
        if not {"id", "output", "runtime", "fingerprint"} <= value.keys():
            hint = "mtgdm keeps such answers under this name: move it"
            raise BadRow(self.path, number, "this is no answer of a base", hint=hint)
        return value
