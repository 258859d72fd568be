"""How long the answers of a type are, learned from those that were kept: a loop then costs hundreds of tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mtgdm.contracts import schema_of
from mtgdm.teachers.tokens import at_most

if TYPE_CHECKING:
    from pydantic import BaseModel

LEARNED_FROM = 24
"""So many kept rows of a type say how long its answers are."""
TIMES = 2.0
"""What a limit is of the longest kept answer: of 24 answers the longest is rarely half of the longest of thousands."""
FLOOR = 256


@dataclass
class _Seen:
    rows: int = 0
    longest: int = 0


class Lengths:
    """The limit of tokens of each type, never above the one of the settings."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen: dict[str, _Seen] = {}

    def kept(self, kind: str | None, tokens: int | None, text: str) -> None:
        """An answer of a type was kept; tokens are estimated from its text where its server counts none."""
        if kind is None:
            return  # rows of other tools may be of every kind
        seen = self._seen.setdefault(kind, _Seen())
        seen.rows += 1
        seen.longest = max(seen.longest, at_most(text) if tokens is None else tokens)

    def limit(self, kind: str | None, contract: type[BaseModel] | None) -> int:
        """How many tokens an answer of a type may take."""
        seen = None if kind is None else self._seen.get(kind)
        if seen is None or seen.rows < LEARNED_FROM:
            return self._most
        floor = FLOOR if contract is None else max(FLOOR, _of_contract(contract))
        return min(self._most, max(floor, int(TIMES * seen.longest)))


@cache
def _of_contract(contract: type[BaseModel]) -> int:
    """Tokens that the keys of a contract alone may take, each twice as it may stand in a list."""
    schema = json.dumps(schema_of(contract).get("properties", {}), ensure_ascii=False)
    return at_most(schema)
