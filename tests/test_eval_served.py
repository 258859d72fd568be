"""A student behind a server: asked over the teacher's request loop, judged by the same ruler as any other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import SettingError, UserError
from mtgdm.reports.evaluation import read_evaluation
from mtgdm.stages.eval import run as evaluate
from mtgdm.testing import StageRun
from mtgdm.testing import run as run_stage
from tests import teacher_domain
from tests.conftest import CommandLine, clean_environment, read_rows, spot, write_lines
from tests.ollama_server import Fault, OllamaServer, Question
from tests.teacher_domain import Gardens, prompt_rows, right_answer

STUDENT = "student:latest"
BASE = "base:latest"


def write_test_rows(workspace: Path, count: int = 3) -> list[dict[str, Any]]:
    """Held-out rows of so many gardens, a card and a note each, with the teacher's answers."""
    found = []
    for row in prompt_rows(count):
        about = row["meta"] | {"split": "test"}
        answer = Gardens().answer(about["record"], about["type"])
        messages = [*row["messages"], {"role": "assistant", "content": answer}]
        found.append({"id": row["id"], "messages": messages, "meta": about})
    write_lines(workspace / "data" / "teacher.jsonl", *found)
    return found


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer, models={STUDENT: 4096, BASE: 4096}) as running:
        yield running


def evaluated(workspace: Path, server: OllamaServer, **settings: Any) -> StageRun:
    given = {"backend": "ollama", "model": STUDENT, "url": [server.url], "retries": 1}
    return run_stage(evaluate, workspace, domain="gardens", **{**given, **settings})


def outputs(workspace: Path) -> list[dict[str, Any]]:
    return read_rows(workspace / "data" / "eval_outputs.jsonl")


def test_a_served_student_is_asked_greedily_and_scored_as_every_other(
    tmp_path: Path, server: OllamaServer
) -> None:
    rows = write_test_rows(tmp_path)
    ran = evaluated(tmp_path, server)
    found = outputs(tmp_path)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert all(row["metrics"]["exact_match"] for row in found)
    assert all(row["metrics"]["latency_s"] > 0 and row["metrics"]["output_tokens"] > 0 for row in found)
    assert {row["metrics"]["finish_reason"] for row in found} == {"stop"}
    assert [row["metrics"]["contract_valid"] for row in found] == [True, None] * 3
    assert [row["metrics"]["prose_valid"] for row in found] == [None, True] * 3
    options = server.questions[0].body["options"]
    assert (options["temperature"], options["top_p"]) == (0, 1)
    assert all("format" not in question.body for question in server.questions)
    assert any("cannot be told" in line and "--trained-on" in line for line in ran.warnings)
    assert found[0]["meta"]["eval"]["model"] == f"ollama {STUDENT} on test"


def test_what_a_student_says_is_what_is_judged(tmp_path: Path, server: OllamaServer) -> None:
    """No repair turn, no fence taken off, and nothing asked again: an empty and a cut answer are answers too."""
    write_test_rows(tmp_path)

    def answer(question: Question) -> str:
        said = right_answer(question)
        if "第0园" in question.text:
            return ""
        return f"```json\n{said}\n```" if said.startswith("{") else said * 40

    server.answer = answer
    evaluated(tmp_path, server, max_new_tokens=40)
    found = outputs(tmp_path)
    assert len(server.questions) == 6
    assert [row["output"] for row in found[:2]] == ["", ""]
    assert found[0]["metrics"]["problem"] == "the answer is empty"
    assert found[2]["output"].startswith("```json")
    assert found[2]["metrics"]["contract_key"] == "not JSON"
    assert found[3]["metrics"]["finish_reason"] == "length"


def test_an_answer_that_the_server_gave_up_is_the_students_own_failure(
    tmp_path: Path, server: OllamaServer
) -> None:
    """After 30 equal tokens the stream ends without `done`: asked once, counted in every figure."""
    write_test_rows(tmp_path)
    server.answer = lambda question: "于" * 90 if "第1园" in question.text else right_answer(question)
    ran = evaluated(tmp_path, server, retries=6)
    assert len(server.questions) == 6
    found = {row["meta"]["spot"]: row for row in outputs(tmp_path)}
    assert (ran.manifests[0].counts["rows"], ran.manifests[0].counts["refused"]) == (6, 0)
    worst = found["第1园"]
    assert worst["output"] == "于" * 30
    assert (worst["metrics"]["finish_reason"], worst["metrics"]["output_tokens"]) == ("repetition", 30)
    assert worst["metrics"]["char_f1"] < 0.1
    assert ran.manifests[0].counts["student"]["char_f1"] == pytest.approx(4 / 6, abs=0.04)


def test_of_a_served_student_no_loop_is_stopped(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path, 1)
    server.loop_breaker = False
    server.answer = lambda question: "适合拍照，" * 200
    evaluated(tmp_path, server, max_new_tokens=600)
    assert {row["metrics"]["finish_reason"] for row in outputs(tmp_path)} == {"length"}
    assert len(server.questions) == 2


def test_constrained_answers_are_held_to_their_schema_where_the_server_can(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path, 1)
    evaluated(tmp_path, server, constrained=True)
    assert [("format" in question.body) for question in server.questions] == [True, False]  # a card, a note
    assert outputs(tmp_path)[0]["meta"]["eval"]["model"].endswith("held to its schema")
    with pytest.raises(UserError, match="held to its schema; asked now is"):
        evaluated(tmp_path, server)
    with pytest.raises(SettingError, match="backend offline cannot hold an answer to a schema"):
        evaluated(tmp_path, server, backend="offline", constrained=True, out="data/other.jsonl")
    with pytest.raises(SettingError, match="in this process cannot be held to a schema"):
        evaluated(tmp_path, server, backend="local", model=str(tmp_path), constrained=True)


def test_a_served_base_is_asked_for_the_same_rows(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path, 2)
    server.answer = lambda question: (
        right_answer(question) if question.body["model"] == STUDENT else "不知道。"
    )
    alone = evaluated(tmp_path, server, compare_base=True, out="data/alone.jsonl")
    assert any("names no base model" in line for line in alone.warnings)
    server.questions.clear()
    ran = evaluated(tmp_path, server, compare_base=True, base_model=BASE)
    assert [question.body["model"] for question in server.questions] == [BASE] * 4 + [STUDENT] * 4
    assert {row["base_output"] for row in outputs(tmp_path)} == {"不知道。"}
    assert ran.manifests[0].counts["student"]["char_f1"] == 1


def test_rows_that_the_server_refuses_are_told_and_in_no_figure(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    server.fault = lambda question: (
        Fault(400, {"error": "this garden is secret"}) if "第1园" in question.text else None
    )
    ran = evaluated(tmp_path, server)
    assert [row["meta"]["spot"] for row in outputs(tmp_path)] == ["第0园", "第0园", "第2园", "第2园"]
    assert any("2 of 6 rows could not be asked: HTTP 400: this garden is secret" in w for w in ran.warnings)
    assert (ran.manifests[0].counts["rows"], ran.manifests[0].counts["refused"]) == (4, 2)
    (metrics,) = (tmp_path / "log").glob("eval-*.metrics.jsonl")
    assert (read_evaluation(metrics).refused, len(read_evaluation(metrics).rows)) == (2, 4)
    server.fault = lambda question: None
    server.questions.clear()
    evaluated(tmp_path, server)
    assert len(server.questions) == 2
    assert len(outputs(tmp_path)) == 6


def test_a_server_that_is_not_there_or_lacks_the_model_is_one_line(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path, 1)
    with pytest.raises(UserError, match="is not pulled") as caught:
        evaluated(tmp_path, server, model="nobody")
    assert caught.value.hint == "ollama pull nobody"
    with pytest.raises(UserError, match="no Ollama server answers"):
        evaluated(tmp_path, server, url=["http://127.0.0.1:9"])
    with pytest.raises(SettingError, match="needs a model"):
        evaluated(tmp_path, server, model=None)
    with pytest.raises(SettingError, match="no teacher backend 'olama'") as spelled:
        evaluated(tmp_path, server, backend="olama")
    assert spelled.value.hint == "did you mean 'ollama'?"


def test_texts_are_sent_as_the_students_tokenizer_would_read_them(
    tmp_path: Path, server: OllamaServer
) -> None:
    found = write_test_rows(tmp_path, 1)
    for row in found:
        row["messages"][-2]["content"] += " cafe\u0301"
    write_lines(tmp_path / "data" / "teacher.jsonl", *found)
    write_lines(tmp_path / "checkpoint" / "training.json", json.dumps({"train_spots": []}))
    for normalizer, sent in ((None, "cafe\u0301"), ({"type": "NFC"}, "caf\u00e9")):
        server.questions.clear()
        write_lines(tmp_path / "checkpoint" / "tokenizer.json", json.dumps({"normalizer": normalizer}))
        evaluated(tmp_path, server, trained_on="checkpoint", overwrite=True)
        assert all(sent in question.text for question in server.questions)
        assert all("cafe\u0301" in row["messages"][-1]["content"] for row in outputs(tmp_path))


def test_rows_that_the_server_always_fails_do_not_stop_the_next_run(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_test_rows(tmp_path)
    server.fault = lambda question: Fault(500, {"error": "broken"}) if "第1园" in question.text else None
    assert evaluated(tmp_path, server, retries=0).manifests[0].counts["refused"] == 2
    again = evaluated(tmp_path, server, retries=0)
    assert (again.manifests[0].counts["rows"], again.manifests[0].counts["refused"]) == (4, 2)
    server.fault = lambda question: Fault(500, {"error": "broken"})
    with pytest.raises(UserError, match="failed in the same way"):
        evaluated(tmp_path, server, retries=0)


def test_a_model_that_is_not_there_costs_no_answer_of_another(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    evaluated(tmp_path, server)
    before = outputs(tmp_path)
    with pytest.raises(UserError, match="is not pulled"):
        evaluated(tmp_path, server, model="typo", overwrite=True)
    assert outputs(tmp_path) == before


def test_a_failing_server_is_the_students(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path, 1)
    server.fault = lambda question: Fault(500, {"error": "broken"})
    with pytest.raises(UserError, match="none was answered") as caught:
        evaluated(tmp_path, server, retries=0)
    assert "mend the student" in str(caught.value.hint)


def test_a_prompt_that_stands_twice_is_asked_once_and_told(tmp_path: Path, server: OllamaServer) -> None:
    found = write_test_rows(tmp_path)
    write_lines(tmp_path / "data" / "teacher.jsonl", *found, found[0])
    ran = evaluated(tmp_path, server)
    assert len(server.questions) == len(outputs(tmp_path)) == 6
    assert any(line.startswith("1 row with a prompt that stands in the file before") for line in ran.warnings)


def test_a_leak_of_a_served_student_is_found_by_its_checkpoint(tmp_path: Path, server: OllamaServer) -> None:
    write_test_rows(tmp_path)
    training = {"train_spots": ["第1园"], "base_model": "base"}
    write_lines(tmp_path / "checkpoint" / "training.json", json.dumps(training))
    with pytest.raises(UserError, match=r"trained on 1 of these spots \(2 of 6 rows\)"):
        evaluated(tmp_path, server, trained_on="checkpoint")
    ran = evaluated(tmp_path, server, trained_on="checkpoint", allow_leak=True)
    assert ran.manifests[0].counts["leaked"] == 2
    (metrics,) = (tmp_path / "log").glob("eval-*.metrics.jsonl")
    evaluation = read_evaluation(metrics)
    assert (evaluation.leaked, evaluation.models) == (2, [f"ollama {STUDENT} on test"])
    with pytest.raises(UserError, match="is no checkpoint"):
        evaluated(tmp_path, server, trained_on="data")
    write_lines(tmp_path / "checkpoint" / "training.json", '{"train_spots": 7}')
    with pytest.raises(UserError, match=r"training\.json: this file is not what `mtgdm train` writes"):
        evaluated(tmp_path, server, trained_on="checkpoint")


def test_a_killed_evaluation_asks_nothing_twice(tmp_path: Path, server: OllamaServer) -> None:
    """`kill -9` in the middle, three times; what was written is there, in order, once, at the end."""
    write_lines(tmp_path / "spots.jsonl", *(spot(f"第{number}号景区") for number in range(40)))
    cli = CommandLine(tmp_path)
    assert cli("prompts", "--spots", "spots.jsonl", "--test-ratio", "0.8").code == 0
    assert cli("teacher", "--backend", "offline").code == 0
    references = {
        row["messages"][-2]["content"]: row["messages"][-1]["content"]
        for row in read_rows(tmp_path / "data" / "teacher.jsonl")
    }
    server.answer = lambda question: references[question.text]
    server.latency_s = 0.03
    flags = ["eval", "--backend", "ollama", "--model", STUDENT, "--url", server.url]
    out = tmp_path / "data" / "eval_outputs.jsonl"
    for kill in range(1, 4):
        process = subprocess.Popen(
            [sys.executable, "-m", "mtgdm", *flags],
            cwd=tmp_path,
            env=clean_environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < 12 * kill:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.wait()
    ended = cli(*flags)
    assert ended.code == 0, ended.err
    assert "rows are there already" in ended.out
    rows = read_rows(out)
    wanted = [row for row in read_rows(tmp_path / "data" / "teacher.jsonl") if row["meta"]["split"] == "test"]
    assert [row["id"] for row in rows] == [row["id"] for row in wanted]
    assert len(server.questions) <= len(wanted) + 3 * 4  # what was on the wire at each kill, no more


def test_original_rows_without_id_and_type_are_evaluated(tmp_path: Path, server: OllamaServer) -> None:
    rows = [
        {
            "messages": [
                {"role": "system", "content": "你是讲解员。"},
                {"role": "user", "content": f"第{number}园建于{1100 + number}年，请写note。"},
                {"role": "assistant", "content": f"第{number}园建于{1100 + number}年。"},
            ],
            "meta": {"spot": f"第{number}园"},
        }
        for number in range(100)
    ]
    write_lines(tmp_path / "original.jsonl", *rows)
    ran = evaluated(tmp_path, server, test="original.jsonl")
    found = outputs(tmp_path)
    assert 0 < len(found) < 100
    assert any(f"asked are the {len(found)} whose spot falls into `test`" in line for line in ran.printed)
    assert all(row["metrics"]["exact_match"] for row in found)
    assert {row["metrics"]["contract_valid"] for row in found} == {None}
    assert {row["metrics"]["language_ok"] for row in found} == {None}
    assert "char-F1 1.00" in ran.result.summary
    every = evaluated(tmp_path, server, test="original.jsonl", split="all", out="data/all.jsonl")
    assert every.manifests[0].counts["rows"] == 100


def test_progress_tells_the_means_and_the_speed(
    tmp_path: Path, server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtgdm.terminal import Progress

    notes: list[str] = []
    monkeypatch.setattr(Progress, "note", lambda self, text: notes.append(text))
    write_test_rows(tmp_path, 2)
    evaluated(tmp_path, server, compare_base=True, base_model=BASE)
    assert notes[1].startswith("base model · ") and notes[1].endswith(" tokens/s")
    assert re.fullmatch(r"char-F1 1\.000 · [\d,]+ tokens/s · contract-valid 1\.000 · facts 1\.000", notes[-1])
    log = next((tmp_path / "log").glob("eval-*.log")).read_text(encoding="utf-8")
    assert "4 rows, 4 of them to ask" in log
