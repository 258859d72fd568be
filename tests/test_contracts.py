"""Every string and list of an answer has a largest size; a kept answer has one form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from mtgdm.contracts import (
    LARGEST_BOUND,
    LIST_BOUND,
    TEXT_BOUND,
    bound_fault,
    compact,
    cut_at_bound,
    fitted,
    schema_of,
)
from mtgdm.domain import contract_fault, contract_problem
from mtgdm.tourism.contracts import General, Itinerary


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")

    title: Annotated[str, Field(max_length=60)]
    note: str | None
    parts: list[Part] = []


class Book(BaseModel):
    """A contract with every kind of string and list that a domain may declare."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    title: str
    from_: str | None = Field(None, alias="from")
    long: Annotated[str, Field(max_length=9000)] = ""
    code: Annotated[str, Field(max_length=2)] = "zh"
    kind: Literal["novel", "poem"] = "poem"
    day: date | None = None
    mark: Annotated[str, Field(pattern="^[a-z]+$")] | None = None
    words: Annotated[list[Annotated[str, Field(max_length=50)]], Field(max_length=5)] = []
    notes: dict[str, str] = {}
    pair: tuple[str, int] | None = None
    parts: list[Part] = []
    either: list[Part | str] = []
    anything: Any = None


def nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for inner in schema.values():
            yield from nodes(inner)
    elif isinstance(schema, list):
        for inner in schema:
            yield from nodes(inner)


@pytest.mark.parametrize("contract", [Book, General, Itinerary])
def test_every_string_and_list_of_a_schema_has_a_bound_that_servers_take(contract: type[BaseModel]) -> None:
    schema = schema_of(contract)
    for node in nodes(schema):
        if node.get("type") == "string" and not node.keys() & {"const", "enum", "format", "pattern"}:
            assert 0 < node["maxLength"] <= LARGEST_BOUND
        if node.get("type") == "array":
            assert 0 < node["maxItems"] <= LARGEST_BOUND


def test_declared_bounds_stay_and_larger_ones_are_lowered_in_the_schema() -> None:
    properties = schema_of(Book)["properties"]
    assert properties["title"]["maxLength"] == TEXT_BOUND
    assert properties["long"]["maxLength"] == LARGEST_BOUND
    assert properties["code"]["maxLength"] == 2
    assert properties["words"] == properties["words"] | {
        "maxItems": 5,
        "items": {"maxLength": 50, "type": "string"},
    }
    assert properties["notes"]["additionalProperties"]["maxLength"] == TEXT_BOUND
    assert properties["parts"]["maxItems"] == LIST_BOUND
    assert properties["pair"]["anyOf"][0]["maxItems"] == 2
    assert properties["from"]["anyOf"][0]["maxLength"] == TEXT_BOUND
    assert "maxLength" not in properties["kind"]
    assert "maxLength" not in properties["day"]["anyOf"][0]
    assert schema_of(Book)["$defs"]["Part"]["properties"]["title"]["maxLength"] == 60


def test_a_server_that_takes_no_bounds_is_given_none() -> None:
    written = json.dumps(schema_of(General, bounded=False))
    assert "maxLength" not in written
    assert "maxItems" not in written
    assert list(schema_of(General, bounded=False)["properties"]) == list(schema_of(General)["properties"])
    assert schema_of(Book, bounded=False)["properties"]["pair"]["anyOf"][0]["maxItems"] == 2


def test_schemas_are_made_once() -> None:
    assert schema_of(General) is schema_of(General)
    assert schema_of(General, bounded=False) is schema_of(General, bounded=False)


@pytest.mark.parametrize(
    ("answer", "place", "words"),
    [
        ({"title": "a" * (TEXT_BOUND + 1)}, ("title",), "1,501 characters, at most 1,500"),
        ({"title": "a", "from": "b" * 1600}, ("from",), "1,600 characters"),
        ({"title": "a", "notes": {"b": "c" * 1600}}, ("notes", "b"), "1,600 characters"),
        ({"title": "a", "parts": [{"title": "b", "note": "c" * 1600}]}, ("parts", 0, "note"), "1,600"),
        ({"title": "a", "either": ["b"] * (LIST_BOUND + 1)}, ("either",), "101 items, at most 100"),
        ({"title": "a", "either": ["b" * 1600]}, ("either", 0), "1,600"),
    ],
)
def test_what_a_contract_declares_no_bound_for_is_held_to_the_default(
    answer: dict[str, Any], place: tuple[str | int, ...], words: str
) -> None:
    fault = bound_fault(Book, answer)
    assert fault is not None
    assert fault.place == place
    assert words in fault.problem
    assert words in (contract_problem(Book, json.dumps(answer)) or "")


@pytest.mark.parametrize(
    "answer",
    [
        {"title": "a" * TEXT_BOUND},
        {"title": "a", "long": "b" * 8000},
        {"title": "a", "anything": {"b": "c" * 9000}},
        {"title": "a", "either": ["b"] * LIST_BOUND},
    ],
)
def test_what_keeps_its_bound_or_declares_a_larger_one_is_valid(answer: dict[str, Any]) -> None:
    assert contract_problem(Book, json.dumps(answer)) is None


def test_the_key_of_a_fault_is_the_same_for_all_items_of_a_list() -> None:
    parts = [{"title": "b", "note": None}, {"title": "b", "note": "c" * 1600}]
    fault = contract_fault(Book, json.dumps({"title": "a", "parts": parts}))
    assert fault is not None
    assert fault.key == "parts[].note"
    assert fault.problem.startswith("parts.1.note: a text of 1,600 characters")


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ({"title": "湖" * TEXT_BOUND}, "title"),
        ({"title": "a", "long": "b" * LARGEST_BOUND}, "long"),
        ({"title": "a", "words": ["b", "c" * 50]}, "words.1"),
        ({"title": "a", "parts": [{"title": "b" * 60, "note": None}]}, "parts.0.title"),
        ({"title": "a", "either": ["b"] * LIST_BOUND}, "either"),
    ],
)
def test_a_text_exactly_at_its_bound_was_cut_there(answer: dict[str, Any], place: str) -> None:
    written = json.dumps(answer, ensure_ascii=False)
    assert contract_problem(Book, written) is None
    assert (cut_at_bound(Book, written) or "").startswith(f"{place}: ")


@pytest.mark.parametrize(
    "answer",
    [
        {"title": "a" * (TEXT_BOUND - 1)},
        {"title": "a", "long": "b" * (LARGEST_BOUND + 1)},
        {"title": "a", "code": "en"},
        {"title": "a", "words": ["b"] * 5},
        {"title": "a" * 60, "pair": ["b", 1]},
    ],
)
def test_a_short_code_and_a_full_list_were_not_cut(answer: dict[str, Any]) -> None:
    assert cut_at_bound(Book, json.dumps(answer)) is None


# --- one form ----------------------------------------------------------------------------------


def test_keys_come_in_the_order_of_the_contract_without_white_space() -> None:
    answer = """{
      "parts": [{"parts": [{"note": "d", "title": "c"}], "note": null, "title": "b"}],
      "notes": {"z": "1", "a": "2"}, "from": "x",
      "either": ["e", {"note": "g", "title": "f"}], "title": "西 湖"
    }"""
    assert compact(Book, answer) == (
        '{"title":"西 湖","from":"x","notes":{"z":"1","a":"2"},'
        '"parts":[{"title":"b","note":null,"parts":[{"title":"c","note":"d"}]}],'
        '"either":["e",{"title":"f","note":"g"}]}'
    )


@pytest.mark.parametrize(
    "number", ["30.20", "1e5", "-0.0", "120", "1E-7", "30.2461", "12345678901234567890.5"]
)
def test_numbers_stay_as_they_were_written(number: str) -> None:
    assert compact(Book, f'{{ "anything": [{number}, 1.5], "title": "a" }}') == (
        f'{{"title":"a","anything":[{number},1.5]}}'
    )


@pytest.mark.parametrize(
    "text",
    [
        '{"title":"\\u897f\\n\\"湖\\"\\\\ \\u2028"}',
        '{"title":"😀\\ud83d\\ude00","anything":[true,false,null,{}, []]}',
        '{"title":"/\\/"}',
    ],
)
def test_no_value_changes(text: str) -> None:
    assert json.loads(compact(Book, text)) == json.loads(text)


def test_a_lone_surrogate_stays_an_escape() -> None:
    assert compact(Book, '{"title": "a\\ud83d"}') == '{"title":"a\\ud83d"}'


@pytest.mark.parametrize("text", ["no JSON", '{"title": 5}', '{"title": "a", "more": 1}', "[1, 2]", ""])
def test_what_breaks_the_contract_is_left_as_it_is(text: str) -> None:
    assert compact(Book, text) == text


def test_the_compact_form_of_the_compact_form_is_the_same() -> None:
    once = compact(Book, '{ "parts": [], "title": "a", "anything": 1.50 }')
    assert compact(Book, once) == once == '{"title":"a","parts":[],"anything":1.50}'


# --- answers made of records -------------------------------------------------------------------


def test_an_answer_is_cut_to_its_bounds_where_it_is_larger() -> None:
    answer = {"title": "a" * 2000, "words": ["b" * 80] * 9, "parts": [{"title": "c" * 60, "note": None}]}
    cut = fitted(Book, answer, lambda text, most: text[:most])
    assert [len(cut["title"]), len(cut["words"]), len(cut["words"][0])] == [TEXT_BOUND - 1, 5, 49]
    assert len(cut["parts"][0]["title"]) == 59
    assert len(answer["title"]) == 2000
    written = json.dumps(cut)
    assert contract_problem(Book, written) is None
    assert cut_at_bound(Book, written) is None


def test_an_answer_within_its_bounds_is_the_same_object() -> None:
    answer = {"title": "a"}
    assert fitted(Book, answer, lambda text, most: text[:most]) is answer
