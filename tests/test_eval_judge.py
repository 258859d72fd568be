"""A judge of pairs: both orders, a cache that is asked once, and a bias that is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import SettingError, UserError
from mtgdm.evaluation.pairwise import INSTRUCTIONS
from mtgdm.reports.evaluation import read_evaluation
from mtgdm.reports.evaluation_summary import describe
from mtgdm.reports.evaluation_words import judged as sentence
from mtgdm.testing import StageRun
from tests import teacher_domain
from tests.conftest import read_rows
from tests.ollama_server import Fault, OllamaServer, Question
from tests.teacher_domain import right_answer
from tests.test_eval_served import BASE, STUDENT, evaluated, outputs, write_test_rows

Verdict = Callable[[str, str], str]
"""`A`, `B` or `tie` over the answers that are shown as A and B."""


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer, models={STUDENT: 8192, BASE: 8192, "judge": 8192}) as running:
        yield running


def judging(server: OllamaServer, verdict: Verdict, *, student: str = "") -> None:
    """Let the server be student, base and judge."""

    def answer(question: Question) -> str:
        if question.body["model"] != "judge":
            return "不知道。" if question.body["model"] == BASE else student or right_answer(question)
        assert question.body["messages"][0]["content"] == INSTRUCTIONS
        _, _, rest = question.text.partition("# Answer A\n\n")
        a, _, rest = rest.partition("\n\n# Answer B\n\n")
        b = rest.partition("\n\n# Which")[0]
        return json.dumps({"reason": "因为。", "winner": verdict(a, b)}, ensure_ascii=False)

    server.answer = answer


def right_one(a: str, b: str) -> str:
    return "tie" if a == b else "B" if a == "不知道。" else "A"


def judged(workspace: Path, server: OllamaServer, **settings: Any) -> StageRun:
    urls = {"judge_model": "judge", "judge_url": [server.url]}
    return evaluated(workspace, server, **{**urls, **settings})


def asked_of_judge(server: OllamaServer) -> int:
    return sum(question.body["model"] == "judge" for question in server.questions)


def report(workspace: Path) -> dict[str, Any]:
    return describe(read_evaluation(max((workspace / "log").glob("eval-*.metrics.jsonl"))))


def test_a_pair_is_won_where_both_orders_say_so(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    judging(server, right_one)
    ran = judged(tmp_path, server, compare_base=True, base_model=BASE)
    assert asked_of_judge(server) == 12
    assert "ollama judge on 6 pairs, each in both orders: 6 won, 0 ties, 0 lost" in ran.printed
    assert {row["judge"]["against"] for row in outputs(tmp_path)} == {"base"}
    found = report(tmp_path)["judge"]
    assert (found["won"], found["score"]["mean"], found["same_in_both_orders"]) == (6, 1, 1)
    assert found["first_preferred"] == 0.5
    assert all(
        "format" in question.body for question in server.questions if question.body["model"] == "judge"
    )


def test_a_judge_that_prefers_the_first_answer_decides_nothing_and_is_told(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path)
    judging(server, lambda a, b: "A")
    judged(tmp_path, server, compare_base=True, base_model=BASE)
    found = report(tmp_path)["judge"]
    assert (found["won"], found["ties"], found["lost"]) == (0, 6, 0)
    assert (found["first_preferred"], found["same_in_both_orders"]) == (1, 0)
    assert found["verdict"] == "too few rows to tell"
    said = sentence(report(tmp_path))
    assert said is not None and "the answer shown first was preferred in 100% of the verdicts" in said


def test_verdicts_are_kept_and_no_pair_is_judged_twice(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    judging(server, right_one, student="不错。")
    judged(tmp_path, server)
    before = outputs(tmp_path)
    assert {row["judge"]["against"] for row in before} == {"teacher"}
    server.questions.clear()
    judged(tmp_path, server)
    assert server.questions == []
    assert outputs(tmp_path) == before
    cache = tmp_path / "data" / "eval_outputs.judge.jsonl"
    cache.write_bytes(cache.read_bytes()[:-40])  # what a kill leaves of the last verdict
    judged(tmp_path, server)
    assert asked_of_judge(server) == 1
    assert len(read_rows(cache)) == 12


def test_the_same_answer_is_a_tie_that_nobody_is_asked_for(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    judging(server, right_one)
    judged(tmp_path, server)  # the student says what the teacher said
    assert asked_of_judge(server) == 0
    assert report(tmp_path)["judge"]["ties"] == 6


def test_a_reply_that_is_no_verdict_is_asked_for_once_more_and_then_not_counted(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path, 1)
    judging(server, lambda a, b: "both", student="不错。")
    ran = judged(tmp_path, server)
    assert asked_of_judge(server) == 8
    assert any("4 of 4 verdicts did not come" in line for line in ran.warnings)
    assert all("judge" not in row for row in outputs(tmp_path))


def test_a_judge_of_some_rows_leaves_the_answers_to_the_others(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    judging(server, right_one)
    evaluated(tmp_path, server)
    before = outputs(tmp_path)
    judged(tmp_path, server, limit=2)
    after = outputs(tmp_path)
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert sum("judge" in row for row in after) == 2


def test_rows_that_were_refused_stay_in_the_metrics_beside_verdicts(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path)
    judging(server, right_one, student="不错。")
    server.fault = lambda question: Fault(400, {"error": "secret"}) if "第1园" in question.text else None
    judged(tmp_path, server)
    lines = read_rows(max((tmp_path / "log").glob("eval-*.metrics.jsonl")))
    assert [line["spot"] for line in lines if "refused" in line] == ["第1园", "第1园"]
    assert sum("judge" in line for line in lines) == 4


def test_another_judge_replaces_the_verdicts_of_the_first(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    judging(server, right_one, student="不错。")
    judged(tmp_path, server)
    server.models["other"] = 8192
    server.answer = lambda question: "no verdict"
    ran = judged(tmp_path, server, judge_model="other")
    assert "12 of 12 verdicts did not come: their pairs are not counted" in ran.warnings
    assert not any("judge" in row for row in outputs(tmp_path))
    found = json.dumps({"reason": "因为。", "winner": "tie"}, ensure_ascii=False)
    server.answer = lambda question: found
    judged(tmp_path, server, judge_model="other")
    assert {row["judge"]["by"] for row in outputs(tmp_path)} == {"ollama other"}


def test_a_judge_that_is_not_there_is_told_before_a_row_is_asked(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path)
    with pytest.raises(UserError, match=r"the judge: .*'missing'") as caught:
        judged(tmp_path, server, judge_model="missing")
    assert server.questions == []
    with pytest.raises(UserError) as caught:
        judged(tmp_path, server, judge_url=["http://127.0.0.1:9"])
    assert "--judge-url" in str(caught.value.hint)
    with pytest.raises(SettingError, match="no judge backend"):
        judged(tmp_path, server, judge_backend="olama")


def test_a_judge_of_some_rows_leaves_no_verdict_of_another_judge(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path)
    judging(server, right_one, student="不错。")
    judged(tmp_path, server)
    server.models["other"] = 8192
    found = json.dumps({"reason": "因为。", "winner": "tie"}, ensure_ascii=False)
    server.answer = lambda question: found
    judged(tmp_path, server, judge_model="other", limit=2)
    assert [row.get("judge", {}).get("by") for row in outputs(tmp_path)] == ["ollama other"] * 2 + [None] * 4
