from __future__ import annotations

import json
from typing import Any

import pytest

from mtgdm.contracts import cut_at_bound
from mtgdm.domain import Record, answer_problem
from mtgdm.tourism import Tourism
from mtgdm.tourism.record import sentences, topic

from .conftest import ReadSpots
from .test_templates import SPOT


def facts_of(read_spots: ReadSpots, spot: dict[str, Any]) -> dict[str, Any]:
    (record,), bad = read_spots(spot)
    assert not bad
    return record.facts


def test_every_answer_to_the_sample_keeps_its_contract_and_tells_every_fact(
    sample: list[Record], tourism: Tourism
) -> None:
    for record in sample:
        for prompt_type in tourism.types:
            answer = tourism.answer(record.facts, prompt_type)
            assert answer_problem(tourism, prompt_type, answer) is None
            checked = tourism.check_facts(record.facts, prompt_type, answer)
            assert checked.recall == 1.0, checked.missing
            assert checked.unsupported == ()
            assert len(answer) <= 500


def test_json_answers_are_compact_and_in_the_order_of_the_contract(
    sample: list[Record], tourism: Tourism
) -> None:
    answer = tourism.answer(sample[0].facts, "general")
    value = json.loads(answer)
    assert json.dumps(value, ensure_ascii=False, separators=(",", ":")) == answer
    assert list(value) == list(tourism.contract("general").model_fields)  # type: ignore[union-attr]


def test_sentences_of_the_record_are_copied_into_their_lists(read_spots: ReadSpots, tourism: Tourism) -> None:
    facts = facts_of(read_spots, SPOT)
    value = json.loads(tourism.answer(facts, "general"))
    assert value["history"] == ["1420年建成。"]
    assert value["culture"] == []
    assert value["logistics"] == ["1号线"]
    assert value["attractions"] == [], "the record names no sight inside"
    assert value["geo"] == {"lat": 36.25, "lon": 117.1, "hint": "泰安市"}


def test_labelled_details_find_their_places(read_spots: ReadSpots, tourism: Tourism) -> None:
    details = {
        "门票": {"旺季": "60元", "开放时间": "8:30-17:00"},
        "景点": [{"name": "乙殿", "desc": "大殿。"}, "丙亭"],
        "路线": "先看乙殿。再看丙亭。",
        "传说": "仙人在此下棋。",
        "拍照": {"丙亭": "清晨"},
        "游玩时长": "半天",
        "小贴士": "穿运动鞋。",
    }
    facts = facts_of(read_spots, {"name": "甲山", "text_zh": {"details": details}})
    general = json.loads(tourism.answer(facts, "general"))
    assert general["tickets_hours"] == ["门票 旺季：60元", "门票 开放时间：8:30-17:00"]
    assert [(sight["name"], sight["desc"]) for sight in general["attractions"]] == [
        ("乙殿", "大殿。"),
        ("丙亭", "未知"),
    ]
    assert general["routes"] == [{"name": "路线", "duration": "未知", "steps": ["先看乙殿。", "再看丙亭。"]}]
    assert general["myths"] == ["仙人在此下棋。"]
    assert general["photo_spots"] == [{"theme": "拍照 丙亭", "spot": "丙亭", "note": "清晨"}]
    itinerary = json.loads(tourism.answer(facts, "itinerary"))
    assert itinerary["total_duration"] == "半天"
    assert itinerary["steps"][1]["notes"] == "路线：先看乙殿。再看丙亭。"
    assert itinerary["tips"] == ["门票 旺季：60元", "门票 开放时间：8:30-17:00", "小贴士：穿运动鞋。"]


def test_a_record_with_only_an_introduction_is_told_from_it(read_spots: ReadSpots, tourism: Tourism) -> None:
    intro = "甲山始建于1420年。山上的民俗很有名。山很高。"
    facts = facts_of(read_spots, {"name": "甲山", "text_zh": {"short_intro": intro}})
    value = json.loads(tourism.answer(facts, "general"))
    assert value["history"] == ["甲山始建于1420年。"]
    assert value["culture"] == ["山上的民俗很有名。"]


def test_a_silent_record_is_answered_with_unknown_and_no_number(
    read_spots: ReadSpots, tourism: Tourism
) -> None:
    facts = facts_of(read_spots, {"name": "甲山"})
    for prompt_type in tourism.types:
        answer = tourism.answer(facts, prompt_type)
        assert answer_problem(tourism, prompt_type, answer) is None
        assert "未知" in answer
        assert not any(character.isdigit() for character in answer)


def test_the_guide_is_chinese_then_english_with_what_is_known(sample: list[Record], tourism: Tourism) -> None:
    chinese, english = tourism.answer(sample[0].facts, "bilingual").split("\n")
    assert chinese.startswith("故宫博物院位于北京市。历史上，")
    assert "最佳季节是春季、秋季。" in chinese
    assert english == (
        "Welcome to The Palace Museum (Forbidden City) in Beijing (39.916, 116.391), rated 5A in 2007 and listed as "
        "World Heritage. History and culture: historic architecture, museum; told above in Chinese. "
        "Transport: metro. Best season: spring and autumn. Advice: check opening hours and prices first."
    )


def test_words_without_a_known_translation_are_left_out_of_the_english(
    read_spots: ReadSpots, tourism: Tourism
) -> None:
    spot = {**SPOT, "types": ["某种类型"], "best_season": "某时", "province": "某省", "name_en": None}
    _, english = tourism.answer(facts_of(read_spots, spot), "bilingual").split("\n")
    assert english.startswith("Welcome to this attraction at a place that is not recorded")
    assert "Best season: not recorded." in english
    assert "某" not in english


@pytest.mark.parametrize(
    "spot",
    [
        {"name": "A Very Long Latin Name " * 20},
        {"name": "很长的名字" * 40},
        {"name": "甲", "name_en": "Mount 甲"},
        {"name": "甲", "province": "Shandong " * 50, "best_season": "“春"},
        {"name": "甲", "text_zh": {"details": {"交通": "Take the train, then the bus. " * 40}}},
        {"name": "甲", "text_zh": {"details": {"历史": "建于明代。" * 9, "小贴士": "看“鸟巢”"}}},
        {"name": "啊啊啊啊啊啊啊啊啊啊"},
        {"name": "甲…", "city": "“", "text_zh": {"details": {"文化": "“”"}}},
    ],
)
def test_an_odd_record_still_gets_valid_answers(
    spot: dict[str, Any], read_spots: ReadSpots, tourism: Tourism
) -> None:
    facts = facts_of(read_spots, spot)
    for prompt_type in tourism.types:
        assert answer_problem(tourism, prompt_type, tourism.answer(facts, prompt_type)) is None


def test_answers_depend_on_the_facts_alone(sample: list[Record], tourism: Tourism) -> None:
    through_json = json.loads(json.dumps(sample[5].facts))
    for prompt_type in tourism.types:
        assert tourism.answer(sample[5].facts, prompt_type) == tourism.answer(through_json, prompt_type)


def test_an_unknown_type_is_refused(sample: list[Record], tourism: Tourism) -> None:
    with pytest.raises(ValueError, match="poem"):
        tourism.answer(sample[0].facts, "poem")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("一。二！三", ["一。", "二！", "三"]),
        ("留下“何处？满眼。”的诗。完。", ["留下“何处？满眼。”的诗。", "完。"]),
        ("（始建。）后来。", ["（始建。）后来。"]),
        ("不成“对。二。", ["不成“对。", "二。"]),
        ("真的？！好。", ["真的？！", "好。"]),
        ("Built in 1.5 years. Now old.", ["Built in 1.5 years.", "Now old."]),
        ("", []),
    ],
)
def test_sentences_are_whole(text: str, parts: list[str]) -> None:
    assert sentences(text) == parts


@pytest.mark.parametrize(
    ("label", "subject"),
    [
        ("历史沿革", "history"),
        ("交通 地铁", "transport"),
        ("开放时间", "tickets"),
        ("建议游览时间", "duration"),
        ("最佳旅游季节", "season"),
        ("民间故事", "myths"),
        ("Opening hours", "tickets"),
        ("海拔", None),
    ],
)
def test_a_label_has_a_topic(label: str, subject: str | None) -> None:
    assert topic(label) == subject


LONG: list[dict[str, Any]] = [
    {"short_intro": "湖水清澈，建于1420年，" * 300},
    {"short_intro": "山" * 3000},
    {"details": {"历史": "1420年建成，后来重修。" * 90, "交通": "乘地铁1号线到达。" * 200}},
    {"details": {"门票": ["成人票60元。"] * 80, "路线": ["南门至北门，步行。" * 40] * 60}},
    {
        "details": {
            "景点": [{"name": f"第{number}殿", "desc": "始建于1420年的殿" * 90} for number in range(50)]
        }
    },
    {"details": {"拍摄 " + "深" * 150: "日出时的湖面" * 60}},
]


@pytest.mark.parametrize("texts", LONG)
def test_a_record_of_any_length_gets_answers_within_their_bounds(
    texts: dict[str, Any], read_spots: ReadSpots, tourism: Tourism
) -> None:
    facts = facts_of(read_spots, {"name": "甲湖" * 60, "province": "山东省", "text_zh": texts})
    for prompt_type in tourism.types:
        answer = tourism.answer(facts, prompt_type)
        assert answer_problem(tourism, prompt_type, answer) is None
        assert tourism.check_facts(facts, prompt_type, answer).unsupported == ()
        contract = tourism.contract(prompt_type)
        assert contract is None or cut_at_bound(contract, answer) is None


def test_a_text_beyond_its_bound_is_cut_between_sentences_and_clauses(
    read_spots: ReadSpots, tourism: Tourism
) -> None:
    told = {"历史": "一" * 300 + "。" + "二" * 300 + "。", "文化": "长句，" * 200 + "完。"}
    facts = facts_of(read_spots, {"name": "甲湖", "text_zh": {"details": {"门票": told["历史"], **told}}})
    general = json.loads(tourism.answer(facts, "general"))
    assert general["history"] == ["一" * 300 + "。", "二" * 300 + "。"]
    assert general["tickets_hours"] == ["门票：" + "一" * 300 + "。"]
    (culture,) = general["culture"]
    assert culture.endswith("长句…")
    assert len(culture) < 400
