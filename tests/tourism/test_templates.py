from __future__ import annotations

from typing import Any

from mtgdm.domain import Record
from mtgdm.tourism import Tourism
from mtgdm.tourism.contracts import General, Itinerary, layout
from mtgdm.tourism.templates import record_block

from .conftest import ReadSpots

SPOT: dict[str, Any] = {
    "name": "甲山",
    "name_en": "Mount Jia",
    "province": "山东省",
    "city": "泰安市",
    "geo": {"lat": 36.25, "lon": 117.1},
    "year_5a": 2007,
    "unesco": False,
    "types": ["山岳", "湖泊"],
    "best_season": "春季",
    "text_zh": {"short_intro": "一座山。", "details": {"历史": "1420年建成。", "交通": {"地铁": "1号线"}}},
}


def test_the_record_stands_in_labelled_lines(read_spots: ReadSpots) -> None:
    (record,), _ = read_spots(SPOT)
    assert record_block(record.facts) == (
        "名称：甲山\n英文名：Mount Jia\n省份：山东省\n城市：泰安市\n坐标：36.25,117.1\n5A评定：2007年\n"
        "世界遗产：否\n类型：山岳、湖泊\n简介：一座山。\n历史：1420年建成。\n交通 地铁：1号线\n最佳季节：春季"
    )


def test_what_the_record_does_not_say_has_no_line(read_spots: ReadSpots) -> None:
    (record,), _ = read_spots({"name": "甲山"})
    assert record_block(record.facts) == "名称：甲山"


def test_nothing_of_a_long_record_is_cut(read_spots: ReadSpots) -> None:
    intro = "".join(f"第{number}句话。" for number in range(1000))
    details = {f"标签{number}": f"内容{number}" for number in range(300)}
    (record,), _ = read_spots({"name": "甲", "text_zh": {"short_intro": intro, "details": details}})
    block = record_block(record.facts)
    assert intro in block
    assert all(f"标签{number}：内容{number}" in block for number in range(300))


def test_a_record_has_one_prompt_of_each_type_in_order(sample: list[Record], tourism: Tourism) -> None:
    for record in sample:
        prompts = list(tourism.prompts(record))
        assert tuple(prompt.type for prompt in prompts) == tourism.types
        assert [[message["role"] for message in prompt.messages] for prompt in prompts] == [
            ["system", "user"]
        ] * 3


def test_the_prompts_of_a_record_share_everything_up_to_the_task(
    sample: list[Record], tourism: Tourism
) -> None:
    first, second, third = tourism.prompts(sample[0])
    assert first.messages[0] == second.messages[0] == third.messages[0]
    heads = {prompt.messages[1]["content"].partition("任务：")[0] for prompt in (first, second, third)}
    assert heads == {f"资料：\n{record_block(sample[0].facts)}\n"}


def test_the_layout_of_the_contract_ends_the_prompt(sample: list[Record], tourism: Tourism) -> None:
    general, itinerary, bilingual = tourism.prompts(sample[0])
    assert general.messages[1]["content"].endswith("\n" + layout(General))
    assert itinerary.messages[1]["content"].endswith("\n" + layout(Itinerary))
    assert "{" not in bilingual.messages[1]["content"]
    for word in ("历史", "文化", "交通", "最佳季节", "建议"):
        assert word in bilingual.messages[1]["content"].partition("任务：")[2]
