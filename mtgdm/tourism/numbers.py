"""Numbers in Chinese and English text: Arabic and Chinese numerals, years, measures, brought to one scale."""

from __future__ import annotations

import re
from typing import NamedTuple

_DIGITS = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_TENS = {"十": 10, "百": 100, "千": 1000}
_MYRIADS = {"万": 10_000, "亿": 100_000_000}

NUMERAL = r"(?:\d[\d,]*(?:\.\d+)?|[零〇一二两三四五六七八九十百千][零〇一二两三四五六七八九十百千万亿]*)"
_NUMBER = re.compile(rf"(?<![\d.])({NUMERAL})(?:余|多|来|几)?(万亿|[万亿])?")

_UNITS: tuple[tuple[str, str, float], ...] = (
    ("平方公里", "area", 1e6), ("平方千米", "area", 1e6), ("平方米", "area", 1.0), ("公顷", "area", 1e4),
    ("square kilometres", "area", 1e6), ("square kilometers", "area", 1e6), ("sq km", "area", 1e6),
    ("square metres", "area", 1.0), ("square meters", "area", 1.0), ("hectares", "area", 1e4),
    ("公里", "length", 1000.0), ("千米", "length", 1000.0), ("厘米", "length", 0.01), ("米", "length", 1.0),
    ("kilometres", "length", 1000.0), ("kilometers", "length", 1000.0), ("km", "length", 1000.0),
    ("metres", "length", 1.0), ("meters", "length", 1.0), ("m", "length", 1.0),
    ("元", "money", 1.0), ("yuan", "money", 1.0), ("RMB", "money", 1.0), ("CNY", "money", 1.0),
    ("小时", "time", 60.0), ("分钟", "time", 1.0), ("hours", "time", 60.0), ("hour", "time", 60.0),
    ("minutes", "time", 1.0), ("亩", "mu", 1.0), ("吨", "weight", 1.0), ("℃", "heat", 1.0),
    ("摄氏度", "heat", 1.0),
)  # fmt: skip
_SCALE = {unit: (dimension, factor) for unit, dimension, factor in _UNITS}
_UNIT = "|".join(re.escape(unit) + (r"(?![A-Za-z])" if unit.isascii() else "") for unit, _, _ in _UNITS)
_MEASURE = re.compile(
    rf"(?<![\d.])({NUMERAL})(?:余|多|来|几)?(万亿|[万亿])?(?:多|余)?(?:个)?[ -]?({_UNIT})(?!宵|素|旦|代|朝)"
)
_MONEY_SIGN = re.compile(r"[¥￥] ?(\d[\d,]*(?:\.\d+)?)")


class Measure(NamedTuple):
    """A number with a unit, in the smallest unit of its dimension, and the words it was written in."""

    dimension: str
    value: float
    words: str


def value_of(numeral: str, myriad: str = "") -> float:
    """`1,300`, `一百八十`, `一九二五` or `12.5` as a number; `myriad` is a 万 or 亿 behind it."""
    factor = 1
    for character in myriad:
        factor *= _MYRIADS[character]
    if numeral[0].isdigit() and numeral[0].isascii():
        return float(numeral.replace(",", "")) * factor
    return _chinese(numeral) * factor


def _chinese(numeral: str) -> float:
    if len(numeral) > 1 and all(character in _DIGITS for character in numeral):
        return float("".join(str(_DIGITS[character]) for character in numeral))  # 一九二五
    total = part = digit = 0
    for character in numeral:
        if character in _DIGITS:
            digit = _DIGITS[character]
        elif character in _TENS:
            part += (digit or 1) * _TENS[character]
            digit = 0
        else:
            if character == "万":  # of its own section: 两亿七千万
                total += (part + digit) * _MYRIADS[character]
            else:
                total = (total + part + digit) * _MYRIADS[character]
            part = digit = 0
    return float(total + part + digit)


def numbers(text: str) -> set[float]:
    """Every number of a text, Chinese numerals included, with and without a 万 or 亿 behind it."""
    found: set[float] = set()
    for numeral, myriad in _NUMBER.findall(text):
        found.add(value_of(numeral))
        if myriad:
            found.add(value_of(numeral, myriad))
    return found


def measures(text: str) -> list[Measure]:
    """Every number with a unit of length, area, money, time, weight or heat."""
    found = []
    for match in _MEASURE.finditer(text):
        dimension, factor = _SCALE[match[3]]
        found.append(Measure(dimension, value_of(match[1], match[2] or "") * factor, match[0]))
    for match in _MONEY_SIGN.finditer(text):
        found.append(Measure("money", value_of(match[1]), match[0]))
    return found
