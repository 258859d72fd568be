"""The repair turn is one that a small model cannot answer by repeating it."""

from __future__ import annotations

from mtgdm.teachers.repair import both_reasons, repair_turns, repeats_repair

QUESTION = [{"role": "system", "content": "只用资料。"}, {"role": "user", "content": "介绍湖。"}]


def test_prose_is_asked_for_with_the_whole_question_and_what_was_wrong_at_its_end() -> None:
    turns = repair_turns(QUESTION, "The lake.", "there is no Chinese", is_json=False)
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert turns[-1]["content"].startswith("介绍湖。\n\n")
    assert "there is no Chinese" in turns[-1]["content"]
    assert "The lake." not in turns[-1]["content"]
    assert QUESTION[-1]["content"] == "介绍湖。"


def test_json_is_corrected_beside_the_answer_that_was_given() -> None:
    turns = repair_turns(QUESTION, '{"a":1}', "b: Field required", is_json=True)
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]
    assert turns[2]["content"] == '{"a":1}'
    assert "b: Field required" in turns[3]["content"]


def test_an_answer_with_control_tokens_is_never_shown_again() -> None:
    turns = repair_turns(QUESTION, '{"a":"x<|im_end|>y"}', "markup: 'im_end'", is_json=True)
    assert [turn["role"] for turn in turns] == ["system", "user"]
    assert not any("<|im_end|>" in turn["content"] for turn in turns)


def test_an_answer_that_repeats_the_repair_turn_is_known() -> None:
    for is_json in (True, False):
        last = repair_turns(QUESTION, "{}", "there is no English", is_json=is_json)[-1]["content"]
        assert repeats_repair(last)
    assert not repeats_repair("The lake lies west. 湖在城西。")


def test_both_reasons_are_told_where_they_differ() -> None:
    assert both_reasons("there is no English", "there is no Chinese") == (
        "first: there is no English; then: there is no Chinese"
    )
    assert both_reasons("cut at 30 tokens", "cut at 60 tokens") == "cut at 60 tokens"
