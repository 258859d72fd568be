from __future__ import annotations

from mtgdm.domain import Record
from mtgdm.tourism import Tourism, english
from mtgdm.tourism.facts import check_facts
from mtgdm.tourism.record import texts_on


def test_the_sample_holds_200_spots_of_31_provinces(sample: list[Record]) -> None:
    assert len(sample) == 200
    assert len({record.name for record in sample}) == 200
    assert len({record.region for record in sample}) == 31


def test_what_was_not_certain_is_unknown(sample: list[Record]) -> None:
    assert sum(record.facts["year_5a"] is None for record in sample) == 3
    assert sum(record.facts["unesco"] is None for record in sample) == 4
    assert sum(not texts_on(record.facts, "history") for record in sample) == 1


def test_every_closed_word_of_the_sample_has_its_english(sample: list[Record]) -> None:
    for record in sample:
        assert english.province(record.region)
        assert english.season(record.facts["best_season"])
        assert len(english.kinds(record.facts["types"])) == len(record.facts["types"])


def test_introductions_say_nothing_that_the_fields_do_not(sample: list[Record]) -> None:
    for record in sample:
        intro = record.facts["intro"]
        without = {**record.facts, "intro": None, "details": []}
        assert check_facts(without, "general", intro).unsupported == ()
        assert 25 <= len(intro) <= 70
        assert ("世界遗产" in intro) == (record.facts["unesco"] is True)


def test_records_are_short_enough_for_a_small_student(sample: list[Record], tourism: Tourism) -> None:
    for record in sample:
        for prompt in tourism.prompts(record):
            assert len(prompt.messages[1]["content"].partition("任务：")[0]) <= 400
