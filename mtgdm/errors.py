"""What a user can act on: one line, the place it happened, a hint that can be pasted.

MtgdmError              everything mtgdm raises on purpose
├── UserError           the input or the surroundings are wrong        exit code 1
│   └── BadRow          one line of a file of rows is wrong            exit code 1
└── SettingError        a flag, a profile or a setting is wrong        exit code 2
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class MtgdmError(Exception):
    """An error with a message for the user; `where` is `file` or `file:line`, `hint` a way out."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, where: str | Path | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = None if where is None else str(where)

    def __str__(self) -> str:
        """`where: message`, without the hint."""
        return self.message if self.where is None else f"{self.where}: {self.message}"


class UserError(MtgdmError):
    """The input or the surroundings are wrong."""


class BadRow(UserError):
    """One line of a file is not what it should be; `where` is `file:line`."""

    def __init__(self, path: Path, line: int, reason: str, *, hint: str | None = None) -> None:
        super().__init__(reason, hint=hint, where=f"{path}:{line}")
        self.path = path
        self.line = line
        self.reason = reason


class SettingError(MtgdmError):
    """A flag, a profile or a setting is wrong."""

    exit_code = 2


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` for the closest known name, else the list of the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(names)}" if names else "there are none"
