from __future__ import annotations

import pytest

from mtgdm.tourism.numbers import measures, numbers, value_of


@pytest.mark.parametrize(
    ("numeral", "myriad", "value"),
    [
        ("1,300", "", 1300),
        ("77.8", "", 77.8),
        ("180", "万", 1_800_000),
        ("一九二五", "", 1925),
        ("二〇二二", "", 2022),
        ("十", "", 10),
        ("十八", "", 18),
        ("二十四", "", 24),
        ("一百八十", "万", 1_800_000),
        ("三百零五", "", 305),
        ("两亿七千万", "", 270_000_000),
        ("一万二千", "", 12_000),
        ("三", "万亿", 3_000_000_000_000),
    ],
)
def test_a_numeral_has_one_value(numeral: str, myriad: str, value: float) -> None:
    assert value_of(numeral, myriad) == value


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("海拔4506米", "length", 4506),
        ("距离约1.5公里", "length", 1500),
        ("步行十余公里", "length", 10_000),
        ("占地72万平方米", "area", 720_000),
        ("面积3.5平方公里", "area", 3_500_000),
        ("门票60元", "money", 60),
        ("￥60", "money", 60),
        ("约2个小时", "time", 120),
        ("三百六十五元", "money", 365),
        ("about 12 km away", "length", 12_000),
        ("720,000 square metres", "area", 720_000),
        ("60 yuan", "money", 60),
    ],
)
def test_a_measure_is_found_and_scaled(text: str, dimension: str, value: float) -> None:
    assert [(found.dimension, found.value) for found in measures(text)] == [(dimension, value)]


@pytest.mark.parametrize("text", ["8:30-17:00", "3M", "第169窟", "地铁1号线", "1420年", "10 mm lens", "明代"])
def test_a_number_without_a_unit_is_no_measure(text: str) -> None:
    assert measures(text) == []


def test_numbers_are_found_in_both_scripts() -> None:
    assert numbers("二十四位皇帝，文物一百八十余万件，1925年") == {24, 180, 1_800_000, 1925}
