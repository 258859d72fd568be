"""Lines for the user from where there is no terminal: said to whoever runs the stage, each once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Who shows the lines."""

    def print(self, text: str = "") -> None:
        """A line of what goes on."""

    def warn(self, text: str) -> None:
        """A line the user should read."""


_HEARD: ContextVar[tuple[Listener, set[str]] | None] = ContextVar("_HEARD", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Give the lines that are said inside the block to a listener."""
    token = _HEARD.set((listener, set()))
    try:
        yield
    finally:
        _HEARD.reset(token)


def say(line: str) -> None:
    """Tell what goes on."""
    if (listener := _first(line)) is not None:
        listener.print(line)


def warn(line: str) -> None:
    """Tell what the user should know of."""
    if (listener := _first(line)) is not None:
        listener.warn(line)


def _first(line: str) -> Listener | None:
    heard = _HEARD.get()
    if heard is None or line in heard[1]:
        return None
    heard[1].add(line)
    return heard[0]
