"""The facts of one record (`meta.record` of a row), and what its free labels speak of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypedDict


class Detail(TypedDict):
    """One labelled text; nested labels are joined by a space: `交通 地铁`."""

    label: str
    text: str


class Facts(TypedDict):
    """Every record has every key, with null or an empty list where the source is silent."""

    name: str
    name_en: str | None
    province: str | None
    city: str | None
    lat: float | None
    lon: float | None
    level: str | None
    year_5a: int | None
    unesco: bool | None
    types: list[str]
    best_season: str | None
    intro: str | None
    details: list[Detail]
    extra: str | None
    """JSON text of the keys that are kept and not read."""


_TEXTS = ("name", "name_en", "province", "city", "level", "best_season", "intro", "extra")


def readable(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts without what is of another type than a record has: a row's record may be another tool's."""
    kept = {key: facts[key] for key in _TEXTS if isinstance(facts.get(key), str)}
    for key, most in (("lat", 90), ("lon", 180), ("year_5a", 10_000)):
        value = facts.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and -most <= value <= most:
            kept[key] = value
    if isinstance(facts.get("unesco"), bool):
        kept["unesco"] = facts["unesco"]
    kept["types"] = [one for one in _listed(facts.get("types")) if isinstance(one, str)]
    kept["details"] = [
        one
        for one in _listed(facts.get("details"))
        if isinstance(one, dict) and isinstance(one.get("label"), str) and isinstance(one.get("text"), str)
    ]
    return kept


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


# The first pattern that a label segment meets is its topic: `建议游览时间` is a duration before it is a tip.
_TOPICS = tuple(
    (topic, re.compile(words, re.IGNORECASE))
    for topic, words in (
        ("duration", "时长|游玩时间|游览时间|参观时间|用时|duration"),
        ("season", "季节|最佳时间|最佳旅游|season"),
        ("tickets", "门票|票价|票务|开放|营业|时间|预约|ticket|hours|opening|price"),
        ("transport", "交通|到达|抵达|怎么去|公交|地铁|自驾|停车|高铁|机场|transport|traffic|getting"),
        ("photo", "拍照|拍摄|摄影|机位|打卡|photo"),
        ("myths", "传说|神话|民间故事|典故|legend|myth"),
        ("history", "历史|沿革|由来|变迁|history"),
        ("culture", "文化|民俗|艺术|非遗|文物|建筑特色|culture"),
        ("routes", "路线|线路|游线|行程|入口|出口|游览|route|entrance"),
        ("attractions", "景点|看点|景观|亮点|attraction|sight|highlight"),
        ("tips", "贴士|提示|注意|建议|须知|tips?|notice|advice"),
    )
)


@lru_cache(maxsize=4096)
def topic(label: str) -> str | None:
    """What a label speaks of, judged by its outermost segment that says so."""
    for segment in label.split(" "):
        for name, words in _TOPICS:
            if words.search(segment):
                return name
    return None


def texts_on(facts: Mapping[str, Any], subject: str) -> list[str]:
    """The texts of a record's details that speak of one topic, in the record's order."""
    return [detail["text"] for detail in facts.get("details") or () if topic(detail["label"]) == subject]


def details_on(facts: Mapping[str, Any], subject: str) -> list[Detail]:
    """The details of a record that speak of one topic."""
    return [detail for detail in facts.get("details") or () if topic(detail["label"]) == subject]


_OPENING = frozenset("“‘（《「『【([")
_CLOSING = frozenset("”’）》」』】)]")
_ENDS = frozenset("。！？!?")


def sentences(text: str) -> list[str]:
    """Whole sentences, verbatim; an end mark inside quotation marks or brackets ends nothing."""
    found = _split(text, nested=True)
    return found if found is not None else _split(text, nested=False) or []


def _split(text: str, nested: bool) -> list[str] | None:
    found: list[str] = []
    depth = start = 0
    for place, character in enumerate(text):
        if nested and character in _OPENING:
            depth += 1
        elif nested and character in _CLOSING:
            depth -= 1
            if depth < 0:
                return None
        elif depth == 0 and (character in _ENDS or (character == "." and text[place + 1 : place + 2] == " ")):
            if text[place + 1 : place + 2] in _ENDS and text[place + 1 : place + 2]:
                continue
            found.append(text[start : place + 1].strip())
            start = place + 1
    if depth:
        return None
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]
