"""Several answers a prompt: the best is kept, the others stay beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mtgdm import plugins
from mtgdm.errors import SettingError
from mtgdm.stages.teacher import TeacherConfig
from tests.conftest import read_rows
from tests.ollama_server import OllamaServer, Question
from tests.teacher_domain import find, right_answer, run_teacher, write_prompts


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "find", find)


def seed(question: Question) -> int:
    found: int = question.body["options"]["seed"]
    return found


def second_is_right(question: Question) -> str:
    """Of three answers the first tells another year, the third is none."""
    right = right_answer(question)
    return {42: right.replace("110", "199"), 1042: right, 2042: "?"}.get(seed(question), "?")


def ask(workspace: Path, server: OllamaServer, **settings: object) -> object:
    return run_teacher(workspace, backend="ollama", model="teacher:7b", url=server.url, **settings)


def test_the_answer_that_passes_best_is_kept_and_the_others_stay_beside_it(tmp_path: Path) -> None:
    write_prompts(tmp_path, 2)
    with OllamaServer(second_is_right) as server:
        ask(tmp_path, server, samples=3)
    rows = read_rows(tmp_path / "data" / "teacher.jsonl")
    assert [row["messages"][-1]["content"] for row in rows] == [
        '{"name":"第0园","year":1100}',
        "第0园建于1100年。",
        '{"name":"第1园","year":1101}',
        "第1园建于1101年。",
    ]
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()
    others = read_rows(tmp_path / "data" / "teacher.samples.jsonl")
    assert len(others) == 8
    first = [row for row in others if row["id"] == rows[0]["id"]]
    assert [row["messages"][-1]["content"] for row in first] == ['{"name":"第0园","year":1990}', "?"]
    assert first[0]["meta"]["sample"]["reason"] is None
    assert first[0]["meta"]["sample"]["facts"] == {"recall": 0.0, "unsupported": ["1990"]}
    assert first[1]["meta"]["sample"]["reason"].startswith("not JSON")


def test_a_prompt_none_of_whose_answers_will_do_is_rejected_once(tmp_path: Path) -> None:
    write_prompts(tmp_path, 2)
    with OllamaServer(
        lambda question: "?" if "第0园" in str(question.body) else right_answer(question)
    ) as server:
        done = run_teacher(tmp_path, backend="ollama", model="teacher:7b", url=server.url, samples=3)
    assert done.result.counts == done.result.counts | {"asked": 4, "kept": 2, "rejected": 2}
    assert len(read_rows(tmp_path / "data" / "teacher.rejected.jsonl")) == 2


def test_a_later_run_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    write_prompts(tmp_path, 1)
    with OllamaServer(right_answer) as server:
        ask(tmp_path, server, samples=2)
        assert len(server.questions) == 4
        write_prompts(tmp_path, 2)
        ask(tmp_path, server, samples=2)
        assert len(server.questions) == 8
    assert len(read_rows(tmp_path / "data" / "teacher.jsonl")) == 4
    assert len(read_rows(tmp_path / "data" / "teacher.samples.jsonl")) == 4


def test_an_overwriting_run_leaves_no_samples_of_the_last_one(tmp_path: Path) -> None:
    write_prompts(tmp_path, 1)
    with OllamaServer(right_answer) as server:
        ask(tmp_path, server, samples=2)
        ask(tmp_path, server, overwrite=True)
    assert not (tmp_path / "data" / "teacher.samples.jsonl").exists()


@pytest.mark.parametrize(
    "settings", [{"backend": "offline"}, {"backend": "ollama", "model": "m", "temperature": 0}]
)
def test_a_teacher_with_one_answer_is_not_asked_for_more(tmp_path: Path, settings: dict[str, object]) -> None:
    write_prompts(tmp_path, 1)
    with pytest.raises(SettingError, match="samples is 4"):
        run_teacher(tmp_path, samples=4, **settings)


def test_a_plan_counts_every_answer(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)
    path = tmp_path / "data" / "prompts.jsonl"
    one = TeacherConfig.model_validate({"in": path, "out": tmp_path / "o.jsonl"}).estimate()
    four = TeacherConfig.model_validate({"in": path, "out": tmp_path / "o.jsonl", "samples": 4}).estimate()
    for name in ("prompt_tokens_at_most", "output_tokens_at_most"):
        assert four[name] == 4 * one[name] > 0
    assert four["to_ask"] == one["to_ask"] == 6
    assert four["samples_a_prompt"] == 4
