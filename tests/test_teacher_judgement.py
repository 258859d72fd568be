"""Which answers are kept: their language, and how they agree with their record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtgdm import plugins
from mtgdm.domain import FactCheck, Script
from mtgdm.rows import row_id
from mtgdm.stages import teacher
from mtgdm.teachers.judgement import Judge, script_problem
from mtgdm.testing import run
from tests.conftest import read_rows, write_lines
from tests.ollama_server import OllamaServer, Question
from tests.teacher_domain import Gardens, find, right_answer, run_teacher, write_prompts

ENGLISH = (
    "The lake lies west of the old town and has been praised by poets for a thousand years. Its causeways were "
    "built from dredged mud, first in the Tang dynasty and again in the Song, and visitors still walk them in "
    "spring when the peach trees flower. Take the metro to Longxiangqiao station and allow half a day."
)
CHINESE = "西湖位于杭州市西部，白居易与苏轼先后主持疏浚，白堤、苏堤由此而来。春季桃红柳绿，适合步行。"


@pytest.mark.parametrize(
    ("text", "script", "wrong"),
    [
        (ENGLISH, "Han", True),
        (CHINESE, "Han", False),
        (CHINESE + "（West Lake, UNESCO World Heritage Site, Hangzhou Metro Line 1, Longxiangqiao）", "Han", False),
        ("West Lake", "Han", False),
        (CHINESE * 2, "alphabetic", True),
        (ENGLISH, "alphabetic", False),
        (ENGLISH, None, False),
        ("むかしむかしあるところにおじいさんとおばあさんがいました。" * 2, "Han", True),
        ("Западное озеро лежит к западу от старого города, и поэты воспевали его тысячу лет. " * 4, "Han", True),
        ("", "Han", False),
    ],
)  # fmt: skip
def test_an_answer_in_another_script_than_was_asked_for_is_noticed(
    text: str, script: Script | None, wrong: bool
) -> None:
    assert (script_problem(text, script) is not None) == wrong


def test_the_keys_of_a_json_answer_are_no_words_of_a_language() -> None:
    answer = {
        "attractions": [{"name": "断桥", "type": "桥", "desc": "白堤东端", "lat": None, "lon": None}] * 12
    }
    assert script_problem(json.dumps(answer, ensure_ascii=False), "Han") is None
    english = {"attractions": [{"name": "Broken Bridge", "type": "bridge", "desc": ENGLISH}]}
    assert script_problem(json.dumps(english), "Han") == (
        "the answer is not in Chinese: 0 characters or words of it, 59 of other scripts"
    )


def test_an_english_answer_to_a_chinese_prompt_is_repaired_in_a_second_turn(tmp_path: Path) -> None:
    spot = {"name": "西湖", "province": "浙江省"}
    messages = [{"role": "user", "content": "请用中文介绍西湖。"}]
    meta = {"spot": "西湖", "province": "浙江省", "type": "general", "split": "train"}
    write_lines(
        tmp_path / "data" / "prompts.jsonl", {"id": row_id(messages), "messages": messages, "meta": meta}
    )

    def answer(question: Question) -> str:
        history = ENGLISH if question.number == 0 else CHINESE
        lists = ("culture", "logistics", "tickets_hours", "photo_spots", "attractions", "routes", "myths")
        geo = {"lat": None, "lon": None, "hint": "未知"}
        whole = {**spot, "history": [history], **{key: [] for key in lists}, "geo": geo}
        return json.dumps(whole, ensure_ascii=False)

    with OllamaServer(answer) as server:
        run(teacher.run, tmp_path, backend="ollama", model="teacher:7b", url=server.url)
        correction = server.asked[1]
    (row,) = read_rows(tmp_path / "data" / "teacher.jsonl")
    assert CHINESE in row["messages"][-1]["content"]
    assert row["meta"]["teacher"]["repaired"] is True
    assert "the answer is not in Chinese" in correction


# --- facts -------------------------------------------------------------------------------------


@pytest.fixture
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find", find)


def year_wrong(question: Question) -> str:
    """The third garden is said to be of another year than its record has; told so, the teacher corrects itself."""
    answer = right_answer(question)
    told = len(question.body["messages"]) > 2 or "An earlier answer" in question.text
    return answer if told else answer.replace("1102", "1999")


def test_by_default_an_answer_that_disagrees_with_its_record_is_kept_and_said_so(
    tmp_path: Path, gardens: None
) -> None:
    write_prompts(tmp_path, 3)
    with OllamaServer(year_wrong) as server:
        run_teacher(tmp_path, backend="ollama", model="teacher:7b", url=server.url, concurrency=1)
    facts = [row["meta"]["teacher"]["facts"] for row in read_rows(tmp_path / "data" / "teacher.jsonl")]
    assert facts[:4] == [{"recall": 1.0, "unsupported": []}] * 4
    assert facts[4:] == [{"recall": 0.0, "unsupported": ["1999"]}] * 2


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            {"min_fact_recall": 0.5},
            "the answer tells 0 of 1 facts of the record, less than 0.5; missing: 1102",
        ),
        ({"max_unsupported": 0}, "claims that the record does not support, more than 0: 1999"),
    ],
)
def test_a_threshold_asks_the_teacher_to_correct_itself(
    tmp_path: Path, gardens: None, setting: dict[str, float], words: str
) -> None:
    write_prompts(tmp_path, 3)
    with OllamaServer(year_wrong) as server:
        run_teacher(tmp_path, backend="ollama", model="teacher:7b", url=server.url, concurrency=1, **setting)
        corrections = [question for question in server.asked if words in question]
    rows = [row["meta"]["teacher"] for row in read_rows(tmp_path / "data" / "teacher.jsonl")]
    assert [row["facts"]["recall"] for row in rows] == [1.0] * 6
    assert [row["repaired"] for row in rows] == [False] * 4 + [True] * 2
    assert len(corrections) == 2


@pytest.mark.parametrize("threshold", [1 / 3, 0.33333])
def test_a_share_that_no_decimal_holds_passes_as_a_threshold_of_its_own(threshold: float) -> None:
    judge = Judge(Gardens(), min_fact_recall=threshold)
    assert judge.fact_problem(FactCheck(found=("a",), missing=("b", "c"))) is None
    problem = judge.fact_problem(FactCheck(found=("a",), missing=("b", "c", "d")))
    assert problem is not None and problem.startswith("the answer tells 1 of 4 facts")


def test_an_answer_that_stays_below_the_threshold_is_put_aside(tmp_path: Path, gardens: None) -> None:
    write_prompts(tmp_path, 3)
    with OllamaServer(lambda question: right_answer(question).replace("1102", "1999")) as server:
        done = run_teacher(
            tmp_path, backend="ollama", model="teacher:7b", url=server.url, min_fact_recall=0.5
        )
    assert done.result.counts == done.result.counts | {"kept": 4, "rejected": 2}
    rejected = read_rows(tmp_path / "data" / "teacher.rejected.jsonl")
    assert all("missing: 1102" in row["rejected"]["reason"] for row in rejected)
    assert all("1999" in row["rejected"]["text"] for row in rejected)


def test_a_threshold_holds_for_answers_of_earlier_runs_too(tmp_path: Path, gardens: None) -> None:
    write_prompts(tmp_path, 3)
    settings = {"backend": "ollama", "model": "teacher:7b", "concurrency": 1}
    with OllamaServer(year_wrong) as server:
        run_teacher(tmp_path, url=server.url, **settings)
        asked = len(server.questions)
        stricter = run_teacher(tmp_path, url=server.url, max_unsupported=0, **settings)
        assert len(server.questions) == asked
        assert stricter.result.counts == stricter.result.counts | {"kept": 4, "rejected": 2}
        assert "2 answers kept earlier do not pass" in " ".join(stricter.warnings)
        rejected = read_rows(tmp_path / "data" / "teacher.rejected.jsonl")
        assert ["more than 0: 1999" in row["rejected"]["reason"] for row in rejected] == [True] * 2
        assert all("1999" in row["rejected"]["text"] and "teacher" not in row["meta"] for row in rejected)
        server.answer = right_answer
        again = run_teacher(tmp_path, url=server.url, max_unsupported=0, retry_rejected=True, **settings)
    assert again.result.counts == again.result.counts | {"kept": 6, "rejected": 0}
    assert len(read_rows(tmp_path / "data" / "teacher.jsonl")) == 6
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()
