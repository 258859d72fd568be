"""Coordinates are read wherever there is one way to read them, and never guessed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mtgdm.stages import prompts
from mtgdm.testing import run
from mtgdm.tourism.coordinates import read_coordinates
from tests.conftest import read_rows, write_lines

LAKE = (30.25, 120.15)

READ: list[dict[str, Any]] = [
    {"lat": 30.25, "lon": 120.15},
    {"lat": "30.25", "lon": " 120.15 "},
    {"lat": "３０．２５", "lon": "１２０．１５"},
    {"lat": 30.25, "lng": 120.15},
    {"latitude": "30.25", "longitude": "120.15"},
    {"Latitude": 30.25, "Longitude": 120.15},
    {"纬度": "30.25", "经度": "120.15"},
    {"lat": "N30°15′", "lon": "E120°9′"},
    {"lat": "30°15′N", "lon": "120°9′E"},
    {"lat": "30°15'00\"N", "lon": "120° 9' 0\" E"},
    {"lat": "北纬30°15′", "lon": "东经120°9′"},
    {"lat": "北纬30度15分", "lon": "东经120度9分0秒"},
    {"lat": "30.25°", "lon": "120.15度"},
    {"lat": "N 30.25", "lon": "120.15 E"},
    {"lat": 120.15, "lon": 30.25},
    {"lat": "E120°9′", "lon": "N30°15′"},
    {"lat": None, "lon": "", "geo": {"lat": 30.25, "lon": 120.15}},
    {"lat": 30.25, "geo": {"lon": 120.15}},
    {"lat": "未知", "lon": "未知", "geo": {"lat": 30.25, "lng": "120.15"}},
    {"lat": "山顶", "lon": 3, "geo": {"lat": 30.25, "lon": 120.15}},
    {"lat": "30.25,120.15"},
    {"geo": [120.15, 30.25]},
    {"geo": [30.25, 120.15]},
    {"geo": ["120.15", "30.25", 12]},
    {"geo": "30.25,120.15"},
    {"geo": "120.15，30.25"},
    {"geo": "(30.25; 120.15)"},
    {"geo": "30.25 120.15"},
    {"geo": "北纬30°15′，东经120°9′"},
    {"geo": "东经120°9′ 北纬30°15′"},
    {"geo": "N30°15′ E120°9′"},
    {"geo": "30.25N 120.15E"},
    {"geo": "lat: 30.25, lon: 120.15"},
    {"geo": "纬度30.25，经度120.15"},
    {"geo": "POINT(120.15 30.25)"},
    {"geo": {"type": "Point", "coordinates": [120.15, 30.25]}},
    {"coordinates": [120.15, 30.25]},
    {"坐标": "30.25,120.15"},
    {"location": "120.15,30.25"},
    {"location": {"lat": 30.25, "lng": 120.15}},
]


@pytest.mark.parametrize("spot", READ, ids=lambda spot: json.dumps(spot, ensure_ascii=False))
def test_what_can_be_read_in_one_way_is_read(spot: dict[str, Any]) -> None:
    found = read_coordinates({"name": "湖", **spot})
    assert found.pair == LAKE
    assert found.problem is None


@pytest.mark.parametrize(
    ("spot", "pair"),
    [
        ({"lat": "36.5°S", "lon": "70°W"}, (-36.5, -70)),
        ({"lat": "南纬36°30′", "lon": "西经70°"}, (-36.5, -70)),
        ({"lat": "-36.5", "lon": "1.5e1"}, (-36.5, 15)),
        ({"lat": 90, "lon": -180}, (90, -180)),
        ({"lat": "18°34′12″", "lon": "109°5′"}, (18.57, 109.083333)),
        ({"latlng": "1,2"}, (1, 2)),
        ({"lnglat": "1,2"}, (2, 1)),
        ({"geo": {"type": "Point", "coordinates": [1, 2]}}, (2, 1)),
    ],
)
def test_other_places_of_the_world_are_read_where_the_order_is_said(
    spot: dict[str, Any], pair: tuple[float, float]
) -> None:
    assert read_coordinates(spot).pair == pair


@pytest.mark.parametrize(
    ("spot", "problem"),
    [
        ({"lat": 36.2}, "only one of latitude and longitude is given"),
        ({"lat": "山顶", "lon": 1}, "'lat' '山顶' is no coordinate"),
        ({"lat": 1, "lon": True}, "'lon' True is no coordinate"),
        ({"lat": [1], "lon": 2}, "'lat' [1] is no coordinate"),
        ({"lat": "nan", "lon": 3}, "'lat' 'nan' is no coordinate"),
        ({"lat": "18°75′", "lon": 109}, "'lat' '18°75′' is no coordinate"),
        ({"lat": "36,5", "lon": "117,1"}, "'lat' '36,5' is no coordinate"),
        ({"lat": 200, "lon": 36}, "'lat, lon' '200, 36' is no coordinate"),
        ({"lat": 30, "lon": 181}, "'lat, lon' '30, 181' is no coordinate"),
        ({"lat": 0, "lon": 0}, "'lat, lon' '0, 0' is no coordinate"),
        ({"lat": "N30°", "lon": "N120°"}, "'lat, lon' 'N30°, N120°' is no coordinate"),
        ({"geo": [1, 2]}, "'geo' [1, 2] is no coordinate"),
        ({"geo": [1, 2, 3, 4]}, "'geo' [1, 2, 3, 4] is no coordinate"),
        ({"geo": 5}, "'geo' 5 is no coordinate"),
        ({"geo": "杭州市"}, "'geo' '杭州市' is no coordinate"),
        ({"geo": "30.25,120.15,8"}, "'geo' '30.25,120.15,8' is no coordinate"),
    ],
)
def test_what_cannot_be_read_for_certain_is_named(spot: dict[str, Any], problem: str) -> None:
    found = read_coordinates(spot)
    assert found.pair is None
    assert found.problem == problem


@pytest.mark.parametrize(
    "spot",
    [
        {},
        {"lat": None, "lon": None},
        {"lat": "", "lon": "暂无"},
        {"geo": {}},
        {"geo": {"hint": "城西"}},
        {"location": "杭州市西湖区龙井路1号"},
        {"location": "杭州30.25公里处"},
    ],
)
def test_a_record_that_says_nothing_of_coordinates_has_no_problem(spot: dict[str, Any]) -> None:
    found = read_coordinates(spot)
    assert (found.pair, found.problem) == (None, None)


def test_forty_messy_records_give_their_three_prompts_each(tmp_path: Path) -> None:
    messy: list[dict[str, Any]] = [
        {"lat": "N18°34′", "lon": "E109°12′"}, {"lat": 36.2}, {"lon": 117}, {"lat": "abc", "lon": "def"},
        {"geo": [120.1, 30.2]}, {"geo": "30.2,120.1"}, {"geo": 7}, {"geo": True}, {"lat": 500, "lon": 500},
        {"lat": 117.1, "lon": 36.2}, {"lat": [], "lon": {}}, {"lat": {"deg": 1}, "lon": 3}, {"province": 370000},
        {"province": ["山东省"]}, {"province": {"code": 1}}, {"city": False}, {"city": ["a", 1]},
        {"text_zh": "一座山。"}, {"text_zh": []}, {"text_zh": 9}, {"text_zh": {"short_intro": {"zh": "一座山。"}}},
        {"text_zh": {"short_intro": 1}},
        {"text_zh": {"details": ["一", "二"]}}, {"text_zh": {"details": 3}}, {"text_zh": {"details": [[["一"]]]}},
        {"level": 5}, {"level": ["5A"]}, {"year_5a": "二〇〇七"}, {"year_5a": {}}, {"unesco": "maybe"}, {"unesco": 1},
        {"types": 4}, {"types": [1, None, "山岳"]}, {"best_season": ["春", "秋"]}, {"best_season": {"a": 1}},
        {"name_en": ["Mount"]}, {"name_en": 0}, {"lat": "1e999", "lon": 1}, {"latitude": "x", "longitude": None},
        {"坐标": "北纬30°15′，东经120°9′"},
    ]  # fmt: skip
    assert len(messy) == 40
    spots = [{"name": f"第{number}山", **spot} for number, spot in enumerate(messy)]
    write_lines(tmp_path / "data" / "curated" / "spots.jsonl", *spots)
    done = run(prompts.run, tmp_path)
    assert done.result.counts == done.result.counts | {"spots": 40, "prompts": 120, "skipped": 0}
    assert done.result.counts["unread"] == 21
    assert len(read_rows(tmp_path / "data" / "prompts.jsonl")) == 120
    (warning,) = done.warnings
    assert "21 fields of 21 records could not be read and were left out, the first: " in warning
    assert "spots.jsonl:2: only one of latitude and longitude is given" in warning
