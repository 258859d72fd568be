"""What a record lets a text say: its facts found or left out, and claims that it does not support.

Facts are things that can be checked by copying: names, places, years, measures, quoted names, and
whether a sentence of the record is there in substance. Claims are looked for where an invention does
harm: years, coordinates, measures and prices, the province, the level, World Heritage. What is not
looked for counts as supported; a text made of the record alone has no unsupported claim.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from mtgdm.domain import FactCheck
from mtgdm.tourism import english
from mtgdm.tourism.numbers import NUMERAL, measures, numbers, value_of
from mtgdm.tourism.record import sentences, texts_on
from mtgdm.tourism.templates import record_block

SENTENCES_PER_TOPIC = 4
"""A long record holds more than any answer: recall asks for the beginning of each topic."""
SENTENCE_SHARE = 0.4
"""Share of a sentence's character pairs that a text must hold to count as telling it; chance gives 5 %."""
MEASURE_TOLERANCE = 0.02

_TOPICS = {
    "general": ("history", "culture", "transport"),
    "itinerary": ("transport",),
    "bilingual": ("history", "culture", "transport"),
}
_TOPIC_WORDS = {"history": "历史", "culture": "文化", "transport": "交通"}
_PLAIN = {
    "general": ("name", "province", "city", "coordinates"),
    "itinerary": ("name", "city", "coordinates", "best_season"),
    "bilingual": ("name", "name_en", "province", "city", "year_5a", "best_season"),
}

_QUOTED = re.compile(r"“([^“”]{2,24})”|《([^《》]{2,24})》")
_YEAR = re.compile(r"(?<![\d.])(\d{3,4})\s*年(?!代)")
_CHINESE_YEAR = re.compile(r"[零〇一二三四五六七八九]{4}(?=年)")
_LATIN_YEAR = re.compile(r"(?<![\d.,°/-])(1\d{3}|20\d{2})(?![\d°])(?![.,]\d)(?=[\s.,;:)’'–-]|$|s\b)(s\b)?")
_CENTURY = re.compile(r"(?<!\d)(\d{1,2})\s*(?:世纪|(?:st|nd|rd|th)[ -][Cc]entur)")
_DECADE = re.compile(r"(?<!\d)(\d{2}|\d{3}0)年代")
_CENTURY_DECADE = re.compile(rf"({NUMERAL})\s*世纪\s*({NUMERAL})\s*年代")
_CENTURY_ANY = re.compile(rf"({NUMERAL})\s*世纪")
_BARE = re.compile(rf"：\s*({NUMERAL})\s*$", re.MULTILINE)
_DECIMAL = re.compile(r"(?<![\d.])-?(\d{1,3}\.\d{2,})(?![\d.])")
_DEGREES = re.compile(r"(\d{1,3})\s*°\s*(\d{1,2})\s*[′'’](?:\s*(\d{1,2}(?:\.\d+)?)\s*[″\"”])?")
_LEVEL = re.compile(r"(?<![A-Za-z0-9])(?:([1-5])A(?![A-Za-z0-9])|(A{3,5})(?![A-Za-z0-9]))")
_HERITAGE = re.compile(r"世界(?:文化|自然|双重|双|和|与|、)*遗产|World (?:\w+ )?Heritage", re.I)
_DENIAL = re.compile(r"(?:非|不是|不属|未|没有|无|尚|not|isn't|no)[^。；;.!?]{0,14}$", re.I)
_ANSWERED_NO = re.compile(r"\s*[:：]\s*(?:否|no\b|未知|unknown)", re.I)
_NAME_SUFFIX = re.compile(
    r"(?:国家)?(?:生态|文化|历史|文物|自然)*(?:风景名胜区|旅游度假区|风景旅游区|旅游风景区|风景区|旅游景区|旅游区|景区)$"
)
_BRACKETS = re.compile(r"[（(][^（）()]*[）)]")

_FULL_NAMES = {
    short + suffix: short
    for suffix, shorts in (
        ("市", ("北京", "天津", "上海", "重庆")),
        ("自治区", ("内蒙古", "西藏")),
        ("壮族自治区", ("广西",)),
        ("回族自治区", ("宁夏",)),
        ("维吾尔自治区", ("新疆",)),
        ("特别行政区", ("香港", "澳门")),
    )
    for short in shorts
}
_FULL_NAMES |= {short + "省": short for short in english.PROVINCES if short not in set(_FULL_NAMES.values())}
_FULL_NAME = re.compile("|".join(_FULL_NAMES))
_SITUATED = re.compile(
    rf"(?:位于|地处|坐落于|坐落在|在)(?:中国|我国)?({'|'.join(english.PROVINCES)})(?![东南西北]?[站路岸麓侧部面端边坡])"
)
_ENGLISH_NAME = re.compile(rf"\b({'|'.join(english.PROVINCES.values())})\b")
_SHORT_OF_ENGLISH = {name: short for short, name in english.PROVINCES.items()}


def check_facts(facts: Mapping[str, Any], prompt_type: str, text: str) -> FactCheck:
    """Compare a text with the facts of its record; a type that is not known expects no facts."""
    said = _Said(text)
    found: list[str] = []
    missing: list[str] = []
    for fact, holds in _expected(facts, prompt_type, said):
        (found if holds else missing).append(fact)
    support = _support(record_block(facts))
    return FactCheck(tuple(found), tuple(missing), tuple(dict.fromkeys(_unsupported(facts, support, said))))


class _Said:
    """A text taken apart once: its words (strings of a JSON answer), coordinates, numbers."""

    def __init__(self, text: str) -> None:
        self.coordinates: list[tuple[str, str]] = []
        """`lat` or `lon` of a JSON answer, and the number as it is written."""
        self.provinces: list[str] = []
        words: list[str] = []
        value = _json_object(text)
        if value is None:
            words.append(text)
        else:
            self._walk("", value, words)
        self.words = "\n".join(words)
        self.letters = "".join(self.words.split())

    def _walk(self, key: str, value: Any, words: list[str]) -> None:
        if isinstance(value, dict):
            for inner_key, inner in value.items():
                self._walk(inner_key, inner, words)
        elif isinstance(value, list):
            for inner in value:
                self._walk(key, inner, words)
        elif key in ("lat", "lon"):
            if (isinstance(value, str) and _is_number(value)) or (
                isinstance(value, float | int) and not isinstance(value, bool)
            ):
                self.coordinates.append((key, str(value).strip()))
        elif isinstance(value, str):
            if key == "province":
                self.provinces.append(value)
            words.append(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            words.append(str(value))

    @cached_property
    def pairs(self) -> set[str]:
        return _pairs(self.letters)

    @cached_property
    def numbers(self) -> set[float]:
        return numbers(self.words)


def _expected(facts: Mapping[str, Any], prompt_type: str, said: _Said) -> Iterator[tuple[str, bool]]:
    for key in _PLAIN.get(prompt_type, ()):
        yield from _plain(facts, key, said)
    for subject in _TOPICS.get(prompt_type, ()):
        told = [part for text in texts_on(facts, subject) for part in sentences(text)]
        for sentence in told[:SENTENCES_PER_TOPIC]:
            label = _TOPIC_WORDS[subject]
            pairs = _pairs("".join(sentence.split()))
            share = len(pairs & said.pairs) / len(pairs) if pairs else 0.0
            shown = sentence if len(sentence) <= 16 else sentence[:15] + "…"
            yield f"{label}：{shown}", share >= SENTENCE_SHARE
            for year in _YEAR.findall(sentence):
                yield f"{label}：{year}年", float(year) in said.numbers
            for measure in measures(sentence):
                yield f"{label}：{measure.words}", _measured(measure.dimension, measure.value, said)
            for quoted in _QUOTED.findall(sentence):
                words = quoted[0] or quoted[1]
                yield f"{label}：{words}", "".join(words.split()) in said.letters


def _plain(facts: Mapping[str, Any], key: str, said: _Said) -> Iterator[tuple[str, bool]]:
    value = facts.get(key)
    if key == "coordinates":
        lat, lon = facts.get("lat"), facts.get("lon")
        if lat is not None and lon is not None:
            holds = _has_coordinate(lat, "lat", said) and _has_coordinate(lon, "lon", said)
            yield f"坐标：{lat},{lon}", holds
    elif value in (None, "", []):
        return
    elif key == "name":
        yield f"名称：{value}", any("".join(name.split()) in said.letters for name in _names(value))
    elif key == "name_en":
        spoken = said.words.casefold()
        yield f"英文名：{value}", any(name.casefold() in spoken for name in _names(value))
    elif key == "province":
        short = english.short_province(value)
        yield f"省份：{value}", short in said.words or english.PROVINCES.get(short, value) in said.words
    elif key == "city":
        if value != facts.get("province"):
            yield f"城市：{value}", any(_short_city(part) in said.words for part in value.split("、"))
    elif key == "types":
        yield f"类型：{'、'.join(value)}", any(word in said.words for word in value)
    elif key == "year_5a":
        yield f"5A评定：{value}年", float(value) in said.numbers
    elif key == "best_season":
        yield f"最佳季节：{value}", all(_has_season(part, said) for part in value.split("、"))


def _names(name: str) -> list[str]:
    bare = _BRACKETS.sub("", name).strip()
    short = _NAME_SUFFIX.sub("", bare)
    return [form for form in (name, bare, short) if len(form) >= 2]


def _short_city(city: str) -> str:
    return city.removesuffix("市") if len(city) > 2 else city


def _has_season(words: str, said: _Said) -> bool:
    if words in said.words or english.SEASONS.get(words, words) in said.words.casefold():
        return True
    return len(words) == 2 and words[1] in "季天" and words[0] in said.words


def _has_coordinate(value: float, key: str, said: _Said) -> bool:
    if any(kind == key and _rounds(value, number) for kind, number in said.coordinates):
        return True
    return str(value) in said.words or any(_rounds(value, number) for number in _DECIMAL.findall(said.words))


def _measured(dimension: str, value: float, said: _Said) -> bool:
    return any(
        measure.dimension == dimension and abs(measure.value - value) <= MEASURE_TOLERANCE * value
        for measure in measures(said.words)
    )


@dataclass(frozen=True)
class _Support:
    """What a record's text says in figures, with what follows from it by plain arithmetic."""

    text: str
    numbers: frozenset[float]
    measures: tuple[tuple[str, float], ...]
    bare: frozenset[float]
    """Numbers that are a whole detail, their unit in the label or nowhere: `高度（米）：468`."""
    centuries: frozenset[int]
    decades: frozenset[int]
    """First years: 1980."""


@lru_cache(maxsize=512)
def _support(text: str) -> _Support:
    known = numbers(text)
    years = {int(year) for year in _YEAR.findall(text)}
    years |= {int(value_of(year)) for year in _CHINESE_YEAR.findall(text)}
    decades = {year // 10 * 10 for year in years}
    for century, decade in _CENTURY_DECADE.findall(text):
        decades.add(int((value_of(century) - 1) * 100 + value_of(decade)))
    centuries = {(year - 1) // 100 + 1 for year in years} | {decade // 100 + 1 for decade in decades}
    centuries |= {int(value_of(numeral)) for numeral in _CENTURY_ANY.findall(text)}
    return _Support(
        text,
        frozenset(known),
        tuple((measure.dimension, measure.value) for measure in measures(text)),
        frozenset(value_of(numeral) for numeral in _BARE.findall(text)),
        frozenset(centuries),
        frozenset(decades),
    )


def _unsupported(facts: Mapping[str, Any], support: _Support, said: _Said) -> Iterator[str]:
    yield from _years(support, said)
    yield from _coordinates(facts, support, said)
    for measure in measures(said.words):
        if not _supports_measure(support, measure.dimension, measure.value, measure.words):
            yield measure.words
    yield from _provinces(facts, support, said)
    yield from _levels(facts, support, said)
    if not facts.get("unesco") and not _HERITAGE.search(support.text.replace("世界遗产：否", "")):
        for match in _HERITAGE.finditer(said.words):
            denied = _DENIAL.search(said.words[max(0, match.start() - 24) : match.start()])
            if not denied and not _ANSWERED_NO.match(said.words[match.end() :]):
                yield match[0]


def _years(support: _Support, said: _Said) -> Iterator[str]:
    for year in _YEAR.findall(said.words):
        if float(year) not in support.numbers:
            yield f"{year}年"
    for year in _CHINESE_YEAR.findall(said.words):
        if value_of(year) not in support.numbers and year not in support.text:
            yield f"{year}年"
    for year, plural in _LATIN_YEAR.findall(said.words):
        if plural:
            whole = year.endswith("00") and int(year) // 100 + 1 in support.centuries
            if int(year) not in support.decades and not whole:
                yield f"{year}s"
        elif float(year) not in support.numbers:
            yield year
    for century in _CENTURY.findall(said.words):
        if int(century) not in support.centuries:
            yield f"{century}世纪"
    for decade in _DECADE.findall(said.words):
        if not any(known == int(decade) or known % 100 == int(decade) for known in support.decades):
            yield f"{decade}年代"


def _coordinates(facts: Mapping[str, Any], support: _Support, said: _Said) -> Iterator[str]:
    known = {"lat": facts.get("lat"), "lon": facts.get("lon")}
    for key, number in said.coordinates:
        value = known[key]
        if (value is None or not _rounds(value, number)) and float(number) not in support.numbers:
            yield f"{key} {number}"
    values = [value for value in known.values() if value is not None]
    measured = {number for measure in measures(said.words) for number in _DECIMAL.findall(measure.words)}
    for number in _DECIMAL.findall(said.words):
        if number in measured or float(number) in support.numbers:
            continue
        if not any(_rounds(value, number) for value in values):
            yield number
    for degrees, minutes, seconds in _DEGREES.findall(said.words):
        angle = int(degrees) + int(minutes) / 60 + float(seconds or 0) / 3600
        step = 1 / 60 if not seconds else 1 / 1800
        if f"{degrees}°{minutes}" in support.text or any(abs(abs(value) - angle) <= step for value in values):
            continue
        yield f"{degrees}°{minutes}′"


def _supports_measure(support: _Support, dimension: str, value: float, words: str) -> bool:
    if words in support.text or numbers(words) & support.bare:
        return True
    tolerance = 0.0 if dimension == "money" else MEASURE_TOLERANCE * value
    return any(kind == dimension and abs(known - value) <= tolerance for kind, known in support.measures)


def _provinces(facts: Mapping[str, Any], support: _Support, said: _Said) -> Iterator[str]:
    own = english.short_province(facts.get("province") or "")
    named = [(name, _FULL_NAMES[name]) for name in _FULL_NAME.findall(said.words)]
    named += [(name, name) for name in _SITUATED.findall(said.words)]
    named += [
        (name, english.short_province(name))
        for name in said.provinces
        if english.short_province(name) in english.PROVINCES
    ]
    for short, name in {short: name for name, short in reversed(named)}.items():
        if short != own and short not in support.text:
            yield name
    for name in _ENGLISH_NAME.findall(said.words):
        short = _SHORT_OF_ENGLISH[name]
        if short != own and short not in support.text and name not in support.text:
            yield name


def _levels(facts: Mapping[str, Any], support: _Support, said: _Said) -> Iterator[str]:
    own = re.sub("A{3,5}", lambda run: f"{len(run[0])}A", str(facts.get("level") or "5A").upper())
    for match in _LEVEL.finditer(said.words):
        level = f"{match[1] or len(match[2])}A"
        if level not in own and match[0] not in support.text:
            yield match[0]


def _rounds(value: float, number: str) -> bool:
    """Whether a written number is the value rounded or cut to as many places."""
    places = len(number.partition(".")[2])
    return abs(abs(value) - abs(float(number))) < 10.0**-places * 1.0001


def _pairs(text: str) -> set[str]:
    return {text[place : place + 2] for place in range(len(text) - 1)}


def _json_object(text: str) -> dict[str, Any] | None:
    stripped = text.strip()
    if not stripped.startswith("{"):
        return None
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*-?\d{1,3}(?:\.\d+)?\s*", text) is not None
