"""Markdown as GitHub reads it; what comes from data is escaped where it is put in."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKUP = re.compile(r"([\\`*_\[\]<>|~$&])")


def escape(text: str) -> str:
    """Text from data on one line, with nothing in it that Markdown or HTML would take for its own."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """Text as it is, between as many backticks as it needs; a bar would end the cell of a table."""
    plain = " ".join(text.split()).replace("|", "\\|")
    if not plain:
        return ""
    longest = max((len(run) for run in re.findall("`+", plain)), default=0)
    marks = "`" * (longest + 1)
    edge = " " if plain[0] == "`" or plain[-1] == "`" else ""
    return f"{marks}{edge}{plain}{edge}{marks}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table of Markdown cells; columns whose name begins with `#` are numbers."""
    head = " | ".join(column.lstrip("#") for column in columns)
    rule = "|".join("---:" if column.startswith("#") else "---" for column in columns)
    return [f"| {head} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)]
