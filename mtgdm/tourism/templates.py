"""The words of the prompts: the record as labelled lines, then the task, the answer's layout last.

The three prompts of a record share their beginning, so that a server with a prefix cache reads it once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from mtgdm.tourism.contracts import General, Itinerary, layout

SYSTEM = "你是中国5A级旅游景区的资深讲解员。只依据资料作答；资料没有的写“未知”，不得编造。"

CONTRACTS: dict[str, type[BaseModel]] = {"general": General, "itinerary": Itinerary}

_TASKS = {"general": "写景点介绍", "itinerary": "写游览行程"}
_PROSE_TASK = "任务：写双语讲解。先中文，后英文，各写一段，涵盖历史、文化、交通、最佳季节、建议。只输出正文。"


def messages(facts: Mapping[str, Any], prompt_type: str) -> list[dict[str, str]]:
    """The system and the user message that ask for one type of answer about one record."""
    user = f"资料：\n{record_block(facts)}\n{task(prompt_type)}"
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def record_block(facts: Mapping[str, Any]) -> str:
    """Everything the record says, one `label：text` line a fact; what it does not say has no line."""
    return "\n".join(f"{label}：{text}" for label, text in _lines(facts))


@cache
def task(prompt_type: str) -> str:
    """What to write, and for JSON answers the layout generated from the contract."""
    contract = CONTRACTS.get(prompt_type)
    if contract is None:
        return _PROSE_TASK
    return (
        f"任务：{_TASKS[prompt_type]}。只输出一个JSON对象，键齐全，未知写“未知”，无内容的列表写[]，格式：\n"
        f"{layout(contract)}"
    )


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "名称", facts["name"]
    for label, key in (("英文名", "name_en"), ("省份", "province"), ("城市", "city")):
        if facts.get(key):
            yield label, facts[key]
    if facts.get("lat") is not None and facts.get("lon") is not None:
        yield "坐标", f"{facts['lat']},{facts['lon']}"
    if facts.get("level"):
        yield "等级", facts["level"]
    if facts.get("year_5a") is not None:
        yield "5A评定", f"{facts['year_5a']}年"
    if facts.get("unesco") is not None:
        yield "世界遗产", "是" if facts["unesco"] else "否"
    if facts.get("types"):
        yield "类型", "、".join(facts["types"])
    if facts.get("intro"):
        yield "简介", facts["intro"]
    for detail in facts.get("details") or ():
        yield detail["label"], detail["text"]
    if facts.get("best_season"):
        yield "最佳季节", facts["best_season"]
