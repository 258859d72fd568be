from __future__ import annotations

import json
import time
from typing import Any

import pytest

from mtgdm.domain import FactCheck, Record
from mtgdm.tourism import Tourism
from mtgdm.tourism.record import Facts
from mtgdm.tourism.templates import record_block


def named(sample: list[Record], name: str) -> dict[str, Any]:
    return next(record.facts for record in sample if record.name == name)


@pytest.fixture
def palace(sample: list[Record]) -> dict[str, Any]:
    return named(sample, "故宫博物院")


def unsupported(facts: dict[str, Any], text: str) -> tuple[str, ...]:
    return Tourism().check_facts(facts, "bilingual", text).unsupported


def test_the_record_itself_states_every_fact_and_no_other_claim(
    sample: list[Record], tourism: Tourism
) -> None:
    for record in sample:
        for prompt_type in tourism.types:
            checked = tourism.check_facts(record.facts, prompt_type, record_block(record.facts))
            assert checked.missing == ()
            assert checked.unsupported == ()


def test_the_answer_of_another_spot_is_found_out(sample: list[Record], tourism: Tourism) -> None:
    for record, other in zip(sample, sample[7:], strict=False):
        for prompt_type in tourism.types:
            checked = tourism.check_facts(record.facts, prompt_type, tourism.answer(other.facts, prompt_type))
            assert checked.unsupported
            assert (checked.recall or 0) < 0.5


def test_a_good_paraphrase_in_two_languages_is_supported(palace: dict[str, Any], tourism: Tourism) -> None:
    text = (
        "故宫博物院位于中国北京市，2007年被评为国家5A级景区，也是世界文化遗产。它在明永乐十八年（1420年）基本建成，"
        "先后有24位皇帝在此居住理政。1925年博物院成立，收藏书画、陶瓷、青铜器等文物超过180万件。由午门入院，从神武门或"
        "东华门离院，附近有地铁1号线天安门东站。春秋最好。\n"
        "The Palace Museum (Forbidden City) is in Beijing at 39.92°N, 116.39°E. It was built in 1420, in the "
        "15th century, rated 5A in 2007 and is a UNESCO World Heritage Site. Come in spring or autumn."
    )
    checked = tourism.check_facts(palace, "bilingual", text)
    assert checked.unsupported == ()
    assert checked.recall == 1.0


@pytest.mark.parametrize(
    ("claim", "shown"),
    [
        ("始建于1406年。", "1406年"),
        ("一九二六年开放。", "一九二六年"),
        ("It was built in 1406.", "1406"),
        ("建于12世纪。", "12世纪"),
        ("1960年代重修。", "1960年代"),
        ("Rebuilt in the 1960s.", "1960s"),
        ("门票60元。", "60元"),
        ("Tickets cost 60 yuan.", "60 yuan"),
        ("占地72万平方米。", "72万平方米"),
        ("海拔44米。", "44米"),
        ("步行约2小时。", "2小时"),
        ("坐标39.90，116.391。", "39.90"),
        ("位于40°10′。", "40°10′"),
        ("位于河北省。", "河北省"),
        ("坐落在河北，很近。", "河北"),
        ("It is in Hebei.", "Hebei"),
        ("它是4A景区。", "4A"),
        ("它是AAAA级景区。", "AAAA"),
    ],
)
def test_an_invented_claim_is_named(palace: dict[str, Any], claim: str, shown: str) -> None:
    assert unsupported(palace, claim) == (shown,)


@pytest.mark.parametrize(
    "claim",
    [
        "建于15世纪。",
        "20世纪20年代成立博物院。",
        "In the 1920s it became a museum.",
        "坐标39.9160，116.39。",
        "北纬39°55′，东经116°23′。",
        "国家AAAAA级景区。",
        "文物180万件，皇帝24位，皇帝二十四位。",
        "在西湖北岸、湘江西岸、上海南站、位于山东麓。",
        "地铁1号线、第3版、8:30-17:00、G318。",
        "It is 5A, on Metro Line 1.",
    ],
)
def test_what_follows_from_the_record_or_is_no_claim_is_supported(palace: dict[str, Any], claim: str) -> None:
    assert unsupported(palace, claim) == ()


def test_a_bare_number_supports_any_unit(tourism: Tourism) -> None:
    facts = {
        "name": "塔",
        "details": [{"label": "塔高（米）", "text": "468"}, {"label": "门票", "text": "60"}],
    }
    assert unsupported(facts, "塔高468米，门票60元。") == ()
    assert unsupported(facts, "塔高469米，门票61元。") == ("469米", "61元")


def test_units_and_roundings_are_converted(sample: list[Record]) -> None:
    falls = named(sample, "黄果树大瀑布景区")  # 77.8米
    assert unsupported(falls, "约78米高，合0.078公里。") == ()
    assert unsupported(falls, "约70米高。") == ("70米",)


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("它是世界遗产。", ("世界遗产",)),
        ("It is a World Heritage Site.", ("World Heritage",)),
        ("它不是世界遗产。", ()),
        ("世界遗产：否", ()),
        ("It is not listed as World Heritage.", ()),
    ],
)
def test_world_heritage_needs_the_record(sample: list[Record], text: str, claims: tuple[str, ...]) -> None:
    assert unsupported(named(sample, "响沙湾旅游景区"), text) == claims


def test_coordinates_and_province_of_a_json_answer_are_claims(
    palace: dict[str, Any], tourism: Tourism
) -> None:
    value = json.loads(tourism.answer(palace, "general"))
    value["geo"] = {"lat": 39.9, "lon": 117.5, "hint": "未知"}
    value["province"] = "河北"
    value["attractions"].append({"name": "甲", "type": None, "desc": None, "lat": "未知", "lon": None})
    checked = tourism.check_facts(palace, "general", json.dumps(value, ensure_ascii=False))
    assert checked.unsupported == ("lon 117.5", "河北")


def test_facts_left_out_are_named(palace: dict[str, Any], tourism: Tourism) -> None:
    checked = tourism.check_facts(palace, "itinerary", "故宫博物院，春季、秋季。")
    assert checked.found == ("名称：故宫博物院", "最佳季节：春季、秋季")
    assert checked.missing[0] == "坐标：39.916,116.391"
    assert checked.missing[1].startswith("交通：")


def test_a_text_that_is_no_answer_is_still_checked(palace: dict[str, Any], tourism: Tourism) -> None:
    for text in ("", "{", "[1]", "{}", '{"name":', "\ud800", "{" * 5000, '{"lat":1e400,"lon":"x"}'):
        assert isinstance(tourism.check_facts(palace, "general", text), FactCheck)


def test_a_type_that_is_not_known_expects_no_facts(palace: dict[str, Any], tourism: Tourism) -> None:
    assert tourism.check_facts(palace, "poem", "1406年").recall is None
    assert tourism.check_facts(palace, "poem", "1406年").unsupported == ("1406年",)


def test_rows_are_checked_by_the_thousand_in_seconds(sample: list[Record], tourism: Tourism) -> None:
    answers = [(r.facts, kind, tourism.answer(r.facts, kind)) for r in sample for kind in tourism.types]
    start = time.process_time()
    for facts, kind, answer in answers:
        tourism.check_facts(facts, kind, answer)
    assert (time.process_time() - start) / len(answers) < 0.005


@pytest.mark.parametrize("value", [5, [1], {"a": 1}, None, True, "x", 1e308, [{"label": 1, "text": "x"}]])
def test_a_record_of_another_tool_is_compared_as_far_as_it_can_be_read(value: object) -> None:
    domain = Tourism()
    whole = {"name": "灵隐寺", "province": "浙江省", "details": [{"label": "历史", "text": "建于326年。"}]}
    for key in Facts.__annotations__:
        facts = {**whole, key: value}
        for prompt_type in domain.types:
            assert domain.check_facts(facts, prompt_type, "灵隐寺建于326年。") is not None
            if isinstance(facts["name"], str):
                assert facts["name"] in domain.answer(facts, prompt_type)
