"""What is stopped while it is written, and how far what must pass stays below the limits."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from mtgdm.domain import Script
from mtgdm.teachers import repetition
from mtgdm.teachers.finish import Finish, finish
from mtgdm.teachers.repetition import repeated_sentence, repeated_unit, repeats_at_end
from mtgdm.teachers.watch import AnswerWatch

STANZA = "湖上{0}起，\n山前{1}落。\n归去来兮，归去来兮！\n"


def watched(
    text: str,
    *,
    is_json: bool = False,
    script: Script | None = None,
    max_tokens: int = 4000,
    piece: int = 2,
    stops: bool = True,
) -> tuple[AnswerWatch, int]:
    """A text that is written piece by piece, until it is stopped; with how many characters that was after."""
    watch = AnswerWatch(
        max_tokens=max_tokens, is_json=is_json, script=script, stops=stops, began=lambda: None
    )
    for place in range(0, len(text), piece):
        if watch.heard(text[place : place + piece]):
            return watch, place + piece
    return watch, len(text)


def a_card(number: int) -> dict[str, object]:
    return {"name": f"第{number}园", "type": "未知", "desc": "", "lat": None, "lon": None, "steps": []}


RIGHT = {
    "a ruler": "=" * 300 + "\n标题\n" + "-" * 300,
    "a table": "| 年份 | 人数 | 备注 |\n|------|------|------|\n"
    + "".join(f"| {1990 + n} | {n * 7} | 无 |\n" for n in range(120)),
    "an empty table": "| 名称 | 甲 | 乙 |\n" + "|   |   |   |\n" * 25,
    "a list of numbers": ", ".join(map(str, range(900))),
    "equal items with other names": "".join(f"第{n}站：步行十分钟，沿途有路标。\n" for n in range(150)),
    "compact JSON with equal keys": json.dumps([a_card(n) for n in range(80)], ensure_ascii=False),
    "indented JSON with equal keys": json.dumps([a_card(n) for n in range(80)], ensure_ascii=False, indent=2),
    "ten unknowns": json.dumps({"steps": ["未知"] * 12, "lat": [0.0] * 20}, ensure_ascii=False),
    "a poem with a refrain": "".join(
        STANZA.format("春夏秋冬风花雪月云雨"[n], "日月星辰霜露烟霞鸟叶"[n]) for n in range(10)
    ),
    "a song that repeats a line four times": ("啦啦啦啦，我们走在大路上！\n" * 4 + "向前，向前，向前！\n")
    * 3,
    "laughter": "他笑道：哈哈哈哈哈哈哈哈哈哈哈哈！" * 2,
    "leaders of a table of contents": "".join(f"第{n}章{'.' * 60}{n}\n" for n in range(40)),
    "indentation": "\n".join(" " * 60 + f"x{n}" for n in range(60)),
    "prose": "".join(
        f"第{n}个年头，{'春夏秋冬'[n % 4]}天的湖边来了{n * 3 + 1}位客人，他们沿着{'东南西北'[n // 4 % 4]}岸走了一圈。"
        for n in range(120)
    ),
}


@pytest.mark.parametrize("text", RIGHT.values(), ids=RIGHT.keys())
@pytest.mark.parametrize("piece", [1, 7, 100_000])
def test_what_real_answers_hold_is_never_stopped(text: str, piece: int) -> None:
    watch, seen = watched(text, piece=piece)
    assert (watch.problem, seen) == (None, len(text))


def _runs(text: str) -> Iterator[float]:
    """By what share of its limit each repetition in a text falls short, 1 being stopped."""
    for end in range(100, len(text), 37):
        tail = text[max(0, end - repetition.WINDOW) : end]
        for period in (1, 2, 3, 5, 8, 13, 16, 24, 40, 64, 100, 180, 256):
            length = period
            while length < len(tail) and tail[-length - 1] == tail[period - length - 1]:
                length += 1
            needed = repetition._needed(period, tail[-period:])
            if length > 2 * period and needed:
                yield length / needed


@pytest.mark.parametrize("name", RIGHT)
def test_the_limits_leave_room(name: str) -> None:
    """Nothing right comes nearer to a limit than a share of 0.8."""
    assert max(_runs(RIGHT[name]), default=0.0) < 0.8


@pytest.mark.parametrize(
    ("unit", "characters"),
    [
        ("于", 200),
        ("哈哈", 200),
        ("0", 200),
        (" \n", 500),
        ("适合拍照，", 300),
        ("注意安全，注意防晒。", 500),
        ('"note": "适合拍照，光线柔和，人少景美，', 900),
        ("这里的湖水清澈见底，四周群山环抱，春天百花盛开，夏天绿树成荫，秋天层林尽染，冬天银装素裹。", 900),
        ("".join(f"第{n}句话说的是第{n}件事。" for n in range(20)), 1800),
    ],
)
def test_a_loop_is_stopped_soon(unit: str, characters: int) -> None:
    text = "西湖在杭州城西，三面环山。" * 1 + unit * (20_000 // len(unit))
    watch, seen = watched(text)
    assert watch.reason is Finish.REPETITION
    assert watch.problem is not None
    assert seen <= characters
    assert len(watch.problem) < 100


def test_sentences_that_take_turns_are_a_loop() -> None:
    text = "".join(
        "春天看花。夏天看荷。秋天看叶。冬天看雪。"[5 * (n * n % 7 % 4) :][:5] + "湖边最好。"
        for n in range(400)
    )
    watch, seen = watched(text)
    assert watch.reason is Finish.REPETITION
    assert seen < 2500


def test_the_end_of_equal_tokens_is_told() -> None:
    assert repeats_at_end("西湖" + "于" * 30, 20)
    assert repeats_at_end("西湖" + "\n\n" * 30, 20)
    assert not repeats_at_end("西湖" + "于" * 10, 20)
    assert not repeats_at_end("西湖在杭州。", 20)
    assert repeated_unit("于" * 40) is None
    assert repeated_sentence("春天看花。" * 3) is None


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(
            {"a": ["}]", '"\\{', {"b": None}], "c": ", ".join(map(str, range(300)))}, ensure_ascii=False
        ),
        '以下是JSON：\n```json\n{"a": "'
        + "".join(f"第{n}句。" for n in range(300))
        + '"}\n```\n希望有帮助。',
        "<think>" + "".join(f"I think of number {n}. " for n in range(200)) + '</think>{"a": 1}',
        "analysisWe need JSON. " + "".join(f"Step {n}. " for n in range(300)) + 'assistantfinal{"a": 1}',
        '{"a": "\\\\"}',
    ],
    ids=["signs in texts", "a fence", "a thought", "harmony", "an escaped backslash"],
)
@pytest.mark.parametrize("piece", [1, 3, 64])
def test_json_that_may_become_right_goes_on(text: str, piece: int) -> None:
    watch, _ = watched(text, is_json=True, piece=piece)
    assert watch.problem is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("".join(f"西湖第{n}景在杭州。" for n in range(900)), "the answer is not JSON"),
        ('{"a": [1, 2}, ' + "".join(f'"k{n}": {n}, ' for n in range(900)), "not JSON: a '}' closes"),
        ('{"a": 1}' + "".join(f"第{n}景。" for n in range(900)), "goes on behind its JSON object"),
    ],
    ids=["prose", "brackets", "two answers"],
)
def test_json_beyond_repair_is_stopped(text: str, words: str) -> None:
    watch, seen = watched(text, is_json=True)
    assert words in (watch.problem or "")
    assert watch.reason is Finish.STOPPED
    assert seen < 1000


# --- scripts and lengths ---------------------------------------------------------------------------


def test_another_language_is_stopped_and_foreign_names_are_not() -> None:
    english = "".join(
        f"The lake number {n} lies west of the town, and people walk there. " for n in range(200)
    )
    watch, seen = watched(english, script="Han")
    assert "the answer is not in Chinese" in (watch.problem or "")
    assert seen < 2000
    mixed = "".join(f"西湖（West Lake，第{n}处）在杭州城西，三面环山。" for n in range(200))
    assert watched(mixed, script="Han")[0].problem is None
    assert watched("<think>" + english + "</think>西湖在杭州。", script="Han")[0].problem is None


def test_a_server_that_knows_no_limit_of_tokens_is_stopped() -> None:
    text = "".join(f"第{n}年，湖边种了{n * 3}棵树。" for n in range(4000))
    watch, seen = watched(text, max_tokens=300)
    assert watch.reason is Finish.LENGTH
    assert seen < 6000


def test_of_a_student_nothing_is_stopped() -> None:
    watch, seen = watched("于" * 5000, is_json=True, script="Han", stops=False)
    assert (watch.problem, seen, watch.pieces) == (None, 5000, 2500)


def test_thoughts_that_go_round_are_stopped() -> None:
    watch = AnswerWatch(max_tokens=4000, is_json=True, script="Han", stops=True, began=lambda: None)
    stopped = [watch.thought("wait, ") for _ in range(200)]
    assert True in stopped
    assert "the thoughts repeat 'wait,'" in (watch.problem or "")


# --- finish reasons --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (
            "stop STOP Stop eos eos_token EOS_TOKEN <eos> end_turn stop_sequence stop_sequence_matched completed "
            "COMPLETE StopSequence FINISH_REASON_STOP",
            Finish.STOP,
        ),
        (
            "length LENGTH max_tokens MAX_TOKENS MaxTokens max_output_tokens model_length token_limit "
            "model_context_window_exceeded FINISH_REASON_MAX_TOKENS limit",
            Finish.LENGTH,
        ),
        (
            "content_filter CONTENT_FILTER sensitive SAFETY RECITATION refusal PROHIBITED_CONTENT BLOCKLIST SPII "
            "data_inspection_failed guardrail_intervened",
            Finish.FILTERED,
        ),
        ("abort error ERROR cancelled insufficient_system_resource network_error OTHER", Finish.FAILED),
        ("tool_calls function_call load unload", Finish.NO_ANSWER),
        ("repetition", Finish.REPETITION),
        ("wibble stop2 结束", Finish.UNKNOWN),
    ],
)
def test_every_word_of_a_server_means_one_of_a_few_things(words: str, kind: Finish) -> None:
    assert {word: finish(word) for word in words.split()} == dict.fromkeys(words.split(), kind)
