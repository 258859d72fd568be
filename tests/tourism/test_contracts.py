from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import BaseModel

from mtgdm.domain import contract_problem
from mtgdm.tourism.contracts import General, Itinerary, layout

GENERAL: dict[str, Any] = {
    "name": "甲", "province": None, "history": [], "culture": None, "logistics": ["乘车"],
    "tickets_hours": [],
    "photo_spots": [{"theme": None, "spot": "亭", "note": "未知"}],
    "attractions": [{"name": "亭", "type": None, "desc": "", "lat": 36, "lon": "未知"}],
    "routes": [{"name": "一", "duration": "未知", "steps": None}],
    "myths": None, "geo": {"lat": 36.25, "lon": None, "hint": "未知"},
}  # fmt: skip
ITINERARY: dict[str, Any] = {
    "name": "甲", "route_name": "一", "total_duration": None,
    "steps": [{"from": "甲", "to": "乙", "direction": "北", "distance": "未知", "duration": None,
               "lat": 36.25, "lon": 117.1, "notes": "走"}],
    "photo_spots": None, "tips": [], "guide_text": "未知",
}  # fmt: skip


def keys(model: type[BaseModel]) -> str:
    """The keys of a layout in the contract's own notation."""
    text = re.sub(r'"[^":]*"(?!:)', "", layout(model))
    text = re.sub(r":[^\[\]{},]*", "", text).replace('"', "")
    return text.replace(":", "")


def test_the_layouts_hold_the_keys_of_the_contract_in_order() -> None:
    assert keys(General) == (
        "{name,province,history[],culture[],logistics[],tickets_hours[],photo_spots[{theme,spot,note}],"
        "attractions[{name,type,desc,lat,lon}],routes[{name,duration,steps[]}],myths[],geo{lat,lon,hint}}"
    )
    assert keys(Itinerary) == (
        "{name,route_name,total_duration,steps[{from,to,direction,distance,duration,lat,lon,notes}],"
        "photo_spots[{theme,spot,time}],tips[],guide_text}"
    )


def test_a_layout_is_compact_and_changes_with_its_model() -> None:
    class Longer(General):
        weather: str | None
        """天气"""

    assert layout(Longer) == layout(General)[:-1] + ',"weather":"天气"}'
    assert len(layout(General)) <= 400
    assert " " not in layout(General)


@pytest.mark.parametrize(("model", "value"), [(General, GENERAL), (Itinerary, ITINERARY)])
def test_empty_and_null_values_are_kept(model: type[BaseModel], value: dict[str, Any]) -> None:
    assert contract_problem(model, json.dumps(value, ensure_ascii=False)) is None


@pytest.mark.parametrize(("model", "value"), [(General, GENERAL), (Itinerary, ITINERARY)])
def test_every_key_is_required_and_none_may_be_added(model: type[BaseModel], value: dict[str, Any]) -> None:
    for key in value:
        without = {name: inner for name, inner in value.items() if name != key}
        assert contract_problem(model, json.dumps(without)) == f"{key}: Field required"
    assert "Extra inputs" in (contract_problem(model, json.dumps({**value, "note": 1})) or "")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"name": 5}, "name"),
        ({"history": "一句"}, "history"),
        ({"history": [1]}, "history.0"),
        ({"geo": []}, "geo"),
        ({"geo": {"lat": "36.25", "lon": 1, "hint": ""}}, "geo.lat"),
        ({"geo": {"lat": 117.1, "lon": 36.2, "hint": ""}}, "geo.lat"),
        ({"geo": {"lat": True, "lon": 36.2, "hint": ""}}, "geo.lat"),
        ({"geo": {"lat": 1, "lon": 181, "hint": ""}}, "geo.lon"),
        ({"attractions": [{"name": "亭"}]}, "attractions.0.type"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], key: str) -> None:
    problem = contract_problem(General, json.dumps({**GENERAL, **change}, ensure_ascii=False))
    assert problem is not None
    assert problem.startswith(key)


def test_the_schema_for_the_server_names_every_key_in_order_with_its_description() -> None:
    schema = General.model_json_schema()
    assert list(schema["properties"]) == schema["required"] == list(GENERAL)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["history"]["description"] == "历史，带年份"
    assert next(iter(Itinerary.model_json_schema()["$defs"]["Step"]["properties"])) == "from"
    assert "minimum" not in json.dumps(schema)
