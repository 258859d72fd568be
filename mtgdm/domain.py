"""The contract of a domain plugin: records in, prompts out, and what a record lets an answer say.

A domain enters through the entry-point group `mtgdm.domains`; a profile names it with `domain:`.
Stages after `prompts` work from the row alone: a row's `meta` carries the type of its prompt and
the record it was made from, so that the answer can be checked wherever the row goes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from pydantic import BaseModel, ValidationError

from mtgdm.contracts import bound_fault
from mtgdm.errors import BadRow

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`."""

Script = Literal["Han", "alphabetic"]
"""What an answer is written in: Chinese characters, or letters of an alphabet."""

BadRecord = Callable[[BadRow], None]
"""Called with a line that could not be read; raising stops the reading, returning skips the line."""


def as_sent(messages: Sequence[Message]) -> list[Message]:
    """Messages with role and text alone: some servers refuse the keys of training data beside them."""
    return [{"role": message["role"], "content": message["content"]} for message in messages]


@dataclass(frozen=True)
class Record:
    """One curated record: the name its split hangs on, its region, and its facts as plain JSON.

    `facts` has the same keys in every record of a domain (null or empty where unknown), so that rows
    that carry it load as one table in the tools of the field.
    """

    name: str
    region: str | None
    facts: dict[str, Any]
    unread: tuple[BadRow, ...] = ()
    """Optional fields of the source that could not be read and were left out, each with its place."""


@dataclass(frozen=True)
class Prompt:
    """One question about a record: its type and the messages, without an answer."""

    type: str
    messages: list[Message]


@dataclass(frozen=True)
class FactCheck:
    """What a text says of its record: facts found, facts left out, and claims the record does not support."""

    found: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unsupported: tuple[str, ...] = ()

    @property
    def recall(self) -> float | None:
        """Share of the record's checkable facts that the text states; None where there are none."""
        total = len(self.found) + len(self.missing)
        return len(self.found) / total if total else None


class Domain(ABC):
    """Records, prompts, answer contracts and facts of one subject."""

    name: ClassVar[str]
    types: ClassVar[tuple[str, ...]]
    """The prompt types, in the order in which a record's prompts are written."""
    languages: ClassVar[tuple[str, ...]] = ()
    """What answers are written in, as the Hub calls it: `zh`, `en`."""

    @abstractmethod
    def read(self, path: Path, on_bad: BadRecord) -> Iterator[Record]:
        """The records of a file, one at a time; a bad line goes to `on_bad`."""

    @abstractmethod
    def prompts(self, record: Record) -> Iterable[Prompt]:
        """One prompt for each of `types`."""

    @abstractmethod
    def contract(self, prompt_type: str) -> type[BaseModel] | None:
        """The model of a JSON answer, or None where the answer is prose or the type is unknown."""

    @abstractmethod
    def prose_problem(self, prompt_type: str, text: str) -> str | None:
        """What is wrong with a prose answer of this type, in words, or None."""

    def languages_right(self, prompt_type: str, text: str) -> bool | None:
        """Whether an answer in several languages has them, in their order; None for types in one, see `script`."""
        return None

    def script(self, prompt_type: str) -> Script | None:
        """What an answer of this type is written in; None where it is mixed or does not matter."""
        return None

    @abstractmethod
    def check_facts(self, facts: Mapping[str, Any], prompt_type: str, text: str) -> FactCheck:
        """Compare a text with the facts of its record (`meta.record` of a row)."""

    @abstractmethod
    def answer(self, facts: Mapping[str, Any], prompt_type: str) -> str:
        """Render an answer from the facts alone: the offline teacher. Deterministic and valid."""


def answer_problem(domain: Domain, prompt_type: str | None, text: str) -> str | None:
    """Why a text breaks the contract of its type, in one line, or None where it keeps it.

    A row without a type has no contract: any text that is not empty is kept.
    """
    if not text.strip():
        return "the answer is empty"
    if prompt_type is None:
        return None
    contract = domain.contract(prompt_type)
    if contract is None:
        return domain.prose_problem(prompt_type, text)
    return contract_problem(contract, text)


def contract_problem(contract: type[BaseModel], text: str) -> str | None:
    """Why a text is not exactly one JSON object of this model, or None."""
    fault = contract_fault(contract, text)
    return None if fault is None else fault.problem


@dataclass(frozen=True)
class ContractFault:
    """The first thing that is wrong with a JSON answer."""

    problem: str
    key: str
    """Where: `geo.lat`, `routes[].steps`; `not JSON` or `not an object` where it has no keys at all."""


def contract_fault(contract: type[BaseModel], text: str) -> ContractFault | None:
    """What makes a text other than exactly one JSON object of this model, or None."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        return ContractFault(f"not JSON: {error.msg} at character {error.pos}", "not JSON")
    except (ValueError, RecursionError) as error:
        return ContractFault(f"not JSON: {error}", "not JSON")
    if not isinstance(value, dict):
        return ContractFault(f"not a JSON object but {type(value).__name__}", "not an object")
    try:
        contract.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "answer"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        return ContractFault(f"{key}: {first['msg']}{more}", _key_in(value, first["loc"]))
    if (beyond := bound_fault(contract, value)) is not None:
        key = ".".join(str(part) for part in beyond.place) or "answer"
        return ContractFault(f"{key}: {beyond.problem}", _key_in(value, beyond.place))
    return None


def _key_in(value: Any, place: tuple[int | str, ...]) -> str:
    """The keys of a place in an answer, items of a list all alike; pydantic's names for parts of a union are none."""
    key = ""
    for part in place:
        if isinstance(value, dict) and isinstance(part, str):
            key += f".{part}" if key else part
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            key += "[]"
            value = value[part]
        else:
            break
    return key or "answer"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key '{twice}' stands twice")
    return value
