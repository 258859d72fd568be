"""The bounds of an answer contract, and the one form in which a JSON answer is kept.

Every string and list has a largest size: without one a model that loops inside a string goes on until its
tokens are spent. A domain declares bounds in its pydantic models; where it declares none, defaults hold.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

if TYPE_CHECKING:
    from pydantic import BaseModel

LARGEST_BOUND = 1500
"""No bound of a schema is larger: llama.cpp refuses one of 2,000 and drops a larger one without a word."""
TEXT_BOUND = 1500
"""Characters of a string whose contract declares no bound."""
LIST_BOUND = 100
"""Items of a list whose contract declares no bound."""
SHORTEST_CUT = 20
"""A string exactly as long as its bound was cut there; below this it may as well be a number of fixed length."""

Schema = dict[str, Any]


@dataclass(frozen=True)
class BoundFault:
    """A string or a list that its bound does not allow."""

    place: tuple[str | int, ...]
    problem: str


def schema_of(contract: type[BaseModel], *, bounded: bool = True) -> Schema:
    """The JSON Schema that a server holds an answer to; without any bound for a server that takes none.

    Every caller gets the same object, which is not to be changed.
    """
    return _bounded_schema(contract) if bounded else _unbounded_schema(contract)


def bound_fault(contract: type[BaseModel], value: Any) -> BoundFault | None:
    """The first string or list that is larger than the default bound, where its contract declares none."""
    if not any(size > (TEXT_BOUND if kind is str else LIST_BOUND) for kind, size in _sizes(value)):
        return None
    for place, part, declared in _parts(contract, value):
        if declared is not None:
            continue
        if isinstance(part, str) and len(part) > TEXT_BOUND:
            return BoundFault(place, f"a text of {len(part):,} characters, at most {TEXT_BOUND:,}")
        if isinstance(part, list) and len(part) > LIST_BOUND:
            return BoundFault(place, f"a list of {len(part):,} items, at most {LIST_BOUND:,}")
    return None


def cut_at_bound(contract: type[BaseModel], text: str) -> str | None:
    """What a server cut at its bound while it held an answer to the schema, or None.

    A constrained decoder closes a string in the middle of a sentence, and the answer is valid all the same. A
    list may well have as many items as its contract allows; one as long as the default bound was cut.
    """
    value = json.loads(text)
    bounds = _bounds(contract)
    if not any(size in bounds for _, size in _sizes(value)):
        return None
    for place, part, declared in _parts(contract, value):
        if isinstance(part, str):
            bound = min(declared or TEXT_BOUND, LARGEST_BOUND)
            if len(part) == bound >= SHORTEST_CUT:
                return f"{_named(place)}: the text was cut at its bound of {bound:,} characters: be brief"
        elif declared is None and len(part) == LIST_BOUND:
            return f"{_named(place)}: the list was cut at its bound of {LIST_BOUND:,} items: be brief"
    return None


def fitted(contract: type[BaseModel], value: Any, shorten: Callable[[str, int], str]) -> Any:
    """A value cut to the bounds of its contract: lists to their first items, strings as `shorten(text, most)` does.

    For answers that are made of a record's own words, which may be of any length.
    """
    if not any(size >= min(_bounds(contract)) for _, size in _sizes(value)):
        return value
    value = copy.deepcopy(value)
    for place, part, declared in _parts(contract, value):
        if isinstance(part, list):
            del part[declared or LIST_BOUND :]
        elif len(part) >= (bound := min(declared or TEXT_BOUND, LARGEST_BOUND)):
            _put(value, place, shorten(part, bound - 1))
    return value


def compact(contract: type[BaseModel], text: str) -> str:
    """A valid answer with its keys in the contract's order and no white space; no value changes.

    Numbers stay as they were written. A text that is not valid comes back as it is.
    """
    rewritten: list[str] = []

    def number(digits: str) -> float:
        value = float(digits)
        if repr(value) != digits:  # Python writes 30.20 and 1e5 another way
            rewritten.append(digits)
        return value

    try:
        value = json.loads(text, parse_float=number)
        model = contract.model_validate(value)
    except (ValueError, ValidationError, RecursionError):
        return text
    if rewritten:
        written = _written(_ordered(json.loads(text, parse_float=_Number), model))
    else:
        written = json.dumps(_ordered(value, model), ensure_ascii=False, separators=(",", ":"))
    # A lone surrogate stays the escape that it was: no UTF-8 can hold it.
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", written)


# --- schemas -----------------------------------------------------------------------------------


@cache
def _plain_schema(contract: type[BaseModel]) -> Schema:
    return contract.model_json_schema()


@cache
def _bounded_schema(contract: type[BaseModel]) -> Schema:
    schema = copy.deepcopy(_plain_schema(contract))
    for node in _nodes(schema):
        if _is_free_text(node):
            _limit(node, "maxLength", "minLength", TEXT_BOUND)
        elif "maxLength" in node:
            _limit(node, "maxLength", "minLength", LARGEST_BOUND)
        if "array" in _types(node):
            _limit(node, "maxItems", "minItems", LIST_BOUND)
    return schema


@cache
def _unbounded_schema(contract: type[BaseModel]) -> Schema:
    schema = copy.deepcopy(_plain_schema(contract))
    for node in _nodes(schema):
        node.pop("maxLength", None)
        if "prefixItems" not in node:  # that of a tuple is its length
            node.pop("maxItems", None)
    return schema


def _nodes(schema: Any) -> Iterator[Schema]:
    """Every schema inside a schema, itself the first."""
    if not isinstance(schema, dict):
        return
    yield schema
    for key in ("$defs", "properties", "patternProperties"):
        for inner in schema.get(key, {}).values():
            yield from _nodes(inner)
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for inner in schema.get(key, ()):
            yield from _nodes(inner)
    for key in ("items", "additionalProperties", "contains"):
        yield from _nodes(schema.get(key))


def _limit(schema: Schema, most: str, least: str, default: int) -> None:
    schema[most] = min(schema.get(most, default), LARGEST_BOUND)
    if schema.get(least, 0) > schema[most]:
        schema[least] = schema[most]


def _is_free_text(schema: Schema) -> bool:
    """Whether nothing else says which strings these are: beside a pattern some servers take no bound."""
    return "string" in _types(schema) and not schema.keys() & {"enum", "const", "pattern", "format"}


def _types(schema: Schema) -> tuple[str, ...]:
    found = schema.get("type", ())
    return (found,) if isinstance(found, str) else tuple(found)


# --- an answer beside its schema ---------------------------------------------------------------

_Part = tuple[tuple[str | int, ...], "str | list[Any]", int | None]
"""Where a string or a list stands, what it is, and the bound that its contract declares."""


def _sizes(value: Any) -> Iterator[tuple[type, int]]:
    """How large every string and list is: most answers are seen to keep all bounds without their schema."""
    left = [value]
    while left:
        part = left.pop()
        if isinstance(part, str):
            yield str, len(part)
        elif isinstance(part, list):
            yield list, len(part)
            left += part
        elif isinstance(part, dict):
            left += part.values()


@cache
def _bounds(contract: type[BaseModel]) -> frozenset[int]:
    """Every bound of the schema that an answer is held to."""
    found, left = {LIST_BOUND}, [_bounded_schema(contract)]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            found |= {bound for key in ("maxLength", "maxItems") if isinstance(bound := part.get(key), int)}
            left += part.values()
        elif isinstance(part, list):
            left += part
    return frozenset(found)


def _parts(contract: type[BaseModel], value: Any) -> Iterator[_Part]:
    """Every string and list of an answer that the schema has bounds for."""
    root = _plain_schema(contract)
    return _below(value, [root], root, ())


def _below(value: Any, schemas: Iterable[Any], root: Schema, place: tuple[str | int, ...]) -> Iterator[_Part]:
    """`schemas` are those that this value may be held to; of several bounds the loosest counts."""
    nodes = [node for schema in schemas for node in _alternatives(schema, root)]
    if isinstance(value, str):
        nodes = [node for node in nodes if "string" in _types(node)]
        if nodes and all(_is_free_text(node) or "maxLength" in node for node in nodes):
            yield place, value, _declared(nodes, "maxLength")
    elif isinstance(value, list):
        nodes = [node for node in nodes if "array" in _types(node)]
        if nodes:
            yield place, value, _declared(nodes, "maxItems")
        for number, item in enumerate(value):
            yield from _below(item, [_item(node, number) for node in nodes], root, (*place, number))
    elif isinstance(value, dict):
        nodes = [node for node in nodes if "object" in _types(node)]
        for key, inner in value.items():
            yield from _below(inner, [_property(node, key) for node in nodes], root, (*place, key))


def _alternatives(schema: Any, root: Schema) -> Iterator[Schema]:
    """The schemas that a value may be of: references followed, unions taken apart."""
    if not isinstance(schema, dict):
        return
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/$defs/"):
        yield from _alternatives(root["$defs"].get(reference.removeprefix("#/$defs/")), root)
    for key in ("anyOf", "oneOf", "allOf"):
        for inner in schema.get(key, ()):
            yield from _alternatives(inner, root)
    if "type" in schema:
        yield schema


def _item(schema: Schema, number: int) -> Any:
    first: list[Any] = schema.get("prefixItems", [])
    return first[number] if number < len(first) else schema.get("items")


def _property(schema: Schema, key: str) -> Any:
    return schema.get("properties", {}).get(key, schema.get("additionalProperties"))


def _declared(nodes: list[Schema], key: str) -> int | None:
    bounds = [node[key] for node in nodes if key in node]
    return max(bounds) if len(bounds) == len(nodes) else None


def _named(place: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in place) or "answer"


def _put(value: Any, place: tuple[str | int, ...], text: str) -> None:
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = text


# --- one form ----------------------------------------------------------------------------------


class _Number(str):
    """A number as it was written."""

    __slots__ = ()


_SURROGATE = re.compile("[\ud800-\udfff]")


def _ordered(value: Any, model: Any) -> Any:
    """A value with the keys of its objects in the order of the fields of `model`, which the contract made of it.

    Keys that are no fields stand behind them as they came.
    """
    if isinstance(value, list):
        if all(isinstance(inner, str) for inner in value):
            return value
        parts = model if isinstance(model, list | tuple) and len(model) == len(value) else [None] * len(value)
        return [_ordered(inner, part) for inner, part in zip(value, parts, strict=True)]
    if not isinstance(value, dict):
        return value
    ordered = {
        key: _ordered(value[key], getattr(model, name))
        for key, name in _attributes(model.__class__)
        if key in value
    }
    for key, inner in value.items():
        if key not in ordered:
            ordered[key] = _ordered(inner, model.get(key) if isinstance(model, dict) else None)
    return ordered


@cache
def _attributes(model: type[object]) -> tuple[tuple[str, str], ...]:
    """The keys that the fields of a model may have in JSON, in order, and the attribute of each."""
    fields: Mapping[str, Any] = getattr(model, "model_fields", {})
    return tuple(
        (key, name)
        for name, field in fields.items()
        for key in dict.fromkeys((field.validation_alias, field.alias, name))
        if isinstance(key, str)
    )


def _written(value: Any) -> str:
    """Compact JSON with every number as it was written."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_written(key)}:{_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
