"""The offline teacher: answers rendered from a record's facts alone, sentences copied verbatim.

It invents nothing: what the record does not say is 未知, an empty list or null.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from mtgdm.contracts import fitted
from mtgdm.tourism import english, prose
from mtgdm.tourism.contracts import UNKNOWN, General, Itinerary
from mtgdm.tourism.record import Detail, details_on, sentences, texts_on

INTRO_SENTENCES = 6
"""A 6,000-character introduction is material for an answer, not the answer."""

_BARE_NAME = re.compile("[^。，；！？,;!?]{1,16}")
_LATIN_NAME = re.compile("[^\u2e80-\U0003ffff]*[A-Za-z][^\u2e80-\U0003ffff]*")
_SENTENCE_END = re.compile("[。！？.!?…][”’」』）)\"']*$")
_CLAUSES = re.compile(r".*(?=[，；、,;\s])", re.DOTALL)
_DIGITS_AT_END = re.compile(r"[\d.]+$")
_RATING = re.compile(r"5A|AAAAA")
_PAST = re.compile(r"\d{3,4}年|世纪|始建|[秦汉魏晋隋唐宋辽金元明清]代|[明清]朝|民国|年间|王朝|古称")
_CULTURE = re.compile(r"文化|艺术|诗|传说|民俗|非遗|非物质|工艺|信仰|祭祀|民族")


def render(facts: Mapping[str, Any], prompt_type: str) -> str:
    """The answer of one type."""
    if prompt_type == "general":
        return _json(General, general(facts))
    if prompt_type == "itinerary":
        return _json(Itinerary, itinerary(facts))
    if prompt_type == "bilingual":
        return bilingual(facts)
    raise ValueError(f"no answer is written for the type '{prompt_type}'")


def general(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The introduction: the record's own sentences, sorted into the contract's lists."""
    sights: list[dict[str, Any]] = []
    for detail in details_on(facts, "attractions"):
        title, words = _titled(detail)
        sights.append({"name": title, "type": UNKNOWN, "desc": words, "lat": None, "lon": None})
    return {
        "name": facts["name"],
        "province": facts.get("province") or UNKNOWN,
        "history": _history(facts),
        "culture": _culture(facts),
        "logistics": _all_sentences(facts, "transport"),
        "tickets_hours": [_labelled(detail) for detail in details_on(facts, "tickets")],
        "photo_spots": [
            {"theme": detail["label"], "spot": title, "note": words}
            for detail in details_on(facts, "photo")
            for title, words in (_titled(detail),)
        ],
        "attractions": sights,
        "routes": [
            {"name": detail["label"], "duration": UNKNOWN, "steps": sentences(detail["text"])}
            for detail in details_on(facts, "routes")
        ],
        "myths": _all_sentences(facts, "myths"),
        "geo": {
            "lat": facts.get("lat"),
            "lon": facts.get("lon"),
            "hint": facts.get("city") or facts.get("province") or UNKNOWN,
        },
    }


def itinerary(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The visit: the way there from the transport texts, then what the record says of routes inside."""
    name = facts["name"]
    season = facts.get("best_season")
    steps = [
        {
            "from": facts.get("city") or facts.get("province") or UNKNOWN,
            "to": name,
            "direction": UNKNOWN,
            "distance": UNKNOWN,
            "duration": UNKNOWN,
            "lat": facts.get("lat"),
            "lon": facts.get("lon"),
            "notes": _joined(texts_on(facts, "transport")) or UNKNOWN,
        }
    ]
    steps += [
        {
            "from": name,
            "to": name,
            "direction": UNKNOWN,
            "distance": UNKNOWN,
            "duration": UNKNOWN,
            "lat": None,
            "lon": None,
            "notes": _labelled(detail),
        }
        for detail in details_on(facts, "routes")
    ]
    tips = [f"最佳季节：{season}。"] if season else []
    tips += [_labelled(detail) for subject in ("tickets", "tips") for detail in details_on(facts, subject)]
    return {
        "name": name,
        "route_name": f"{name}游览路线",
        "total_duration": "；".join(texts_on(facts, "duration")) or UNKNOWN,
        "steps": steps,
        "photo_spots": [
            {"theme": detail["label"], "spot": detail["text"], "time": UNKNOWN}
            for detail in details_on(facts, "photo")
        ],
        "tips": tips,
        "guide_text": _joined(_culture(facts) or _history(facts)) or facts.get("intro") or UNKNOWN,
    }


def bilingual(facts: Mapping[str, Any]) -> str:
    """The guide in two languages.

    Sentences of the record may themselves break the contract of prose (a text in English, a loop): then
    the guide is told without them, and at last without the name.
    """
    silent = {**facts, "intro": None, "details": []}
    nameless = {
        **silent,
        "name": "该景区",
        "name_en": None,
        "province": None,
        "city": None,
        "best_season": None,
    }
    for told in (facts, silent):
        text = f"{chinese(told)}\n{english_text(told)}"
        if prose.problem(text) is None:
            return text
    return f"{chinese(nameless)}\n{english_text(nameless)}"


def chinese(facts: Mapping[str, Any]) -> str:
    """The Chinese paragraph: history, culture, transport, season, advice, in the record's own sentences."""
    parts = [f"{facts['name']}{_where(facts)}。"]
    for opening, subject, texts in (
        ("历史上，", "历史", _history(facts)),
        ("文化方面，", "文化", _culture(facts)),
        ("交通方面，", "交通", _all_sentences(facts, "transport")),
    ):
        parts.append(opening + _ended(_joined(texts)) if texts else f"{subject}资料未知。")
    season = facts.get("best_season")
    parts.append(f"最佳季节是{season}。" if season else "最佳季节未知。")
    advice = _joined(_all_sentences(facts, "tips"))
    parts.append(f"建议：{_ended(advice)}" if advice else "建议出发前核实开放时间和票价。")
    return "".join(parts)


def english_text(facts: Mapping[str, Any]) -> str:
    """The English paragraph: what the record gives in figures and in words that have a known translation."""
    names = (facts.get("name_en"), facts["name"])
    name = next((name for name in names if name and _LATIN_NAME.fullmatch(name)), "this attraction")
    province = english.province(facts.get("province"))
    where = f"in {province}" if province else "at a place that is not recorded"
    if facts.get("lat") is not None and facts.get("lon") is not None:
        where += f" ({facts['lat']}, {facts['lon']})"
    marks = []
    if facts.get("year_5a") is not None:
        marks.append(f"rated 5A in {facts['year_5a']}")
    if facts.get("unesco"):
        marks.append("listed as World Heritage")
    rating = f", {english.listed(marks)}" if marks else ""
    kinds = english.kinds(facts.get("types") or [])
    told = "told above in Chinese" if _history(facts) or _culture(facts) else "not recorded"
    subjects = "; ".join([*([", ".join(kinds)] if kinds else []), told])
    ways = texts_on(facts, "transport")
    travel = english.listed(english.travel(ways)) or ("told above in Chinese" if ways else "not recorded")
    season = english.season(facts.get("best_season"))
    return (
        f"Welcome to {name} {where}{rating}. "
        f"History and culture: {subjects}. "
        f"Transport: {travel}. "
        f"Best season: {season or 'not recorded'}. "
        "Advice: check opening hours and prices first."
    )


def _json(contract: type[General | Itinerary], value: dict[str, Any]) -> str:
    value = fitted(contract, value, _shortened)
    contract.model_validate(value)  # a template that breaks its contract is a bug, never a row
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _shortened(text: str, most: int) -> str:
    """The whole sentences of a text that so many characters hold; of one long sentence its first clauses."""
    kept = ""
    for sentence in sentences(text):
        if len(kept) + len(sentence) > most:
            break
        kept += sentence
    if kept:
        return kept
    clauses = _CLAUSES.match(text, 0, most - 1)
    return (clauses[0] if clauses else _DIGITS_AT_END.sub("", text[: most - 1])) + "…"


def _history(facts: Mapping[str, Any]) -> list[str]:
    own = _all_sentences(facts, "history")
    return own or [text for text in _intro(facts) if _PAST.search(text) and not _RATING.search(text)]


def _culture(facts: Mapping[str, Any]) -> list[str]:
    own = _all_sentences(facts, "culture")
    taken = _history(facts)
    return own or [
        text
        for text in _intro(facts)
        if _CULTURE.search(text) and not _RATING.search(text) and text not in taken
    ]


def _intro(facts: Mapping[str, Any]) -> list[str]:
    return sentences(facts.get("intro") or "")[:INTRO_SENTENCES]


def _all_sentences(facts: Mapping[str, Any], subject: str) -> list[str]:
    return [sentence for text in texts_on(facts, subject) for sentence in sentences(text)]


def _where(facts: Mapping[str, Any]) -> str:
    province, city = facts.get("province") or "", facts.get("city") or ""
    if not province and not city:
        return "的位置未知"
    if not province or not city or city.startswith(province):
        return f"位于{city or province}"
    return f"位于{province}，在{city}境内"


def _titled(detail: Detail) -> tuple[str, str]:
    """What a detail is about and what it says: `景点 太和殿：…` is about 太和殿; a bare name says nothing."""
    title = detail["label"].partition(" ")[2]
    if title:
        return title, detail["text"]
    return (detail["text"], UNKNOWN) if _BARE_NAME.fullmatch(detail["text"]) else (UNKNOWN, detail["text"])


def _labelled(detail: Detail) -> str:
    return f"{detail['label']}：{detail['text']}"


def _ended(text: str) -> str:
    return text if _SENTENCE_END.search(text) else text + "。"


def _joined(texts: list[str]) -> str:
    """One text verbatim; several with an end to each."""
    return texts[0] if len(texts) == 1 else "".join(map(_ended, texts))
