"""`mtgdm plan`: what a run would have to do, from what is there and from a probe that leaves nothing behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import BadRow
from mtgdm.estimates import Expected, as_json, in_words
from mtgdm.stage import Context, StageConfig
from mtgdm.stages.teacher import TeacherConfig
from mtgdm.teachers import loop
from mtgdm.teachers import probe as probing
from mtgdm.teachers.forecast import Answer, hours, output_tokens
from mtgdm.teachers.seam import Unavailable
from mtgdm.testing import QuietTerminal
from tests import teacher_domain
from tests.conftest import CommandLine, clean_environment, spot, write_lines
from tests.ollama_server import Fault, OllamaServer, Question, tokens
from tests.teacher_domain import prompt_rows, right_answer, run_teacher, write_prompts

FIELDS = {
    "rows",
    "to_ask",
    "prompt_tokens_at_most",
    "output_tokens_at_most",
    "output_tokens",
    "hours",
    "by_type",
}


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)
    monkeypatch.setattr(loop, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(right_answer) as running:
        yield running


def config(workspace: Path, server: OllamaServer | None = None, **settings: Any) -> TeacherConfig:
    asked = {"backend": "ollama", "url": [server.url], "model": "teacher:7b"} if server else {}
    return TeacherConfig.model_validate({**asked, **settings}).resolved(workspace)


def probe(workspace: Path, count: int, server: OllamaServer, **settings: Any) -> dict[str, Any]:
    context = Context(
        stage="teacher",
        workspace=workspace,
        terminal=QuietTerminal(),
        domain="gardens",
        profile="test",
        started=datetime.now().astimezone(),
    )
    return config(workspace, server, **settings).probe(count, context)


def answered(
    row: dict[str, Any], *, seconds: float = 6.0, output_tokens: int | None = 300, **more: Any
) -> Any:
    """A prompt row with an answer of a teacher called m."""
    teacher = {
        "backend": "ollama", "model": "m", "seconds": seconds, "output_tokens": output_tokens, **more,
    }  # fmt: skip
    said = {"role": "assistant", "content": "好。"}
    return {**row, "messages": [*row["messages"], said], "meta": {**row["meta"], "teacher": teacher}}


def on_disk(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- from what is there --------------------------------------------------------------------------


def test_without_an_answer_tokens_are_bounded_and_hours_are_not_known(tmp_path: Path) -> None:
    write_prompts(tmp_path, 10)

    found = config(tmp_path, concurrency=6, max_tokens=500).estimate()

    assert (found["rows"], found["to_ask"], found["output_tokens_at_most"]) == (20, 20, 10_000)
    assert 20 * 10 < found["prompt_tokens_at_most"] < 20 * 100
    assert (found["output_tokens"], found["hours"], found["rests_on"]) == (None, None, None)
    assert "--probe 12" in found["hint"], "one row for each place, and one that finds it taken"


def test_without_prompts_nothing_is_said(tmp_path: Path) -> None:
    assert config(tmp_path).estimate() == {}
    write_lines(tmp_path / "data/prompts.jsonl")
    assert config(tmp_path).estimate() == {}


def test_a_bad_prompt_is_found_before_the_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/prompts.jsonl", *prompt_rows(1), '{"messages": ')
    with pytest.raises(BadRow, match=r"prompts\.jsonl:3"):
        config(tmp_path).estimate()


def test_finished_rows_tell_tokens_and_hours_of_the_others(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path, 50)
    done = [
        answered(row, seconds=9.0, output_tokens=450 + place)
        if row["meta"]["type"] == "card"
        else answered(row, seconds=3.0, output_tokens=150 + place)
        for place, row in enumerate(rows[:20])
    ]
    write_lines(tmp_path / "data/teacher.jsonl", *done)

    found = config(tmp_path, backend="ollama", model="m", concurrency=8).estimate()

    assert (found["to_ask"], found["rests_on"]) == (80, "20 finished rows")
    cards, notes = found["by_type"]["card"], found["by_type"]["note"]
    assert cards == {"to_ask": 40, "output_tokens": Expected(459, 450, 468)}
    assert notes == {"to_ask": 40, "output_tokens": Expected(160, 151, 169)}
    assert found["output_tokens"].mean == 40 * 459 + 40 * 160
    assert found["output_tokens"].low < found["output_tokens"].mean < found["output_tokens"].high
    assert found["hours"].mean == pytest.approx(80 * 6 / 8 / 3600, rel=0.01)


def test_a_corrected_answer_counts_twice(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path, 10, types=["note"])
    write_lines(tmp_path / "data/teacher.jsonl", *(answered(row, repaired=True) for row in rows[:5]))

    found = config(tmp_path, backend="ollama", model="m", concurrency=1).estimate()

    assert found["output_tokens"].mean == 5 * 600
    assert found["hours"].mean == pytest.approx(5 * 12 / 3600, abs=1e-4)


def test_rows_of_another_teacher_or_of_a_template_tell_nothing(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path, 10)
    others = [answered(rows[0], model="other"), answered(rows[1], backend="openai")]
    template = answered(rows[2], seconds=0.0, output_tokens=None)
    strange = {**rows[3], "messages": [*rows[3]["messages"], {"role": "assistant", "content": "好。"}]}
    write_lines(tmp_path / "data/teacher.jsonl", *others, template, strange)

    found = config(tmp_path, backend="ollama", model="m").estimate()

    assert (found["to_ask"], found["rests_on"], found["hours"]) == (16, None, None)


def test_a_torn_last_line_is_asked_again_and_rows_without_an_id_are_not(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path, 10)
    original = answered(rows[0])
    del original["id"]
    out = write_lines(tmp_path / "data/teacher.jsonl", original, answered(rows[1]), answered(rows[2]))
    before = out.read_bytes()[:-30]
    out.write_bytes(before)

    found = config(tmp_path, backend="ollama", model="m").estimate()

    assert (found["to_ask"], found["rests_on"]) == (18, "2 finished rows")
    assert out.read_bytes() == before, "the next run repairs it, not the plan"


def test_limit_and_rejected_rows_count_as_in_a_run(tmp_path: Path) -> None:
    rows = write_prompts(tmp_path, 10)
    write_lines(tmp_path / "data/teacher.jsonl", answered(rows[0]))
    write_lines(tmp_path / "data/teacher.rejected.jsonl", {**rows[1], "rejected": {"reason": "empty"}})

    def to_ask(**settings: Any) -> tuple[int, int]:
        found = config(tmp_path, **settings).estimate()
        return found["rows"], found["to_ask"]

    assert to_ask() == (20, 18)
    assert to_ask(limit=5) == (5, 3)
    assert to_ask(retry_rejected=True) == (20, 19)
    assert to_ask(overwrite=True) == (20, 20)


# --- from a probe --------------------------------------------------------------------------------


def test_a_probe_asks_some_of_every_type_all_over_the_file_and_leaves_nothing(
    tmp_path: Path, server: OllamaServer
) -> None:
    rows = write_prompts(tmp_path, 60)
    write_lines(tmp_path / "data/teacher.jsonl", *(answered(row) for row in rows[:20]))
    before = on_disk(tmp_path)

    found = probe(tmp_path, 10, server)

    assert on_disk(tmp_path) == before
    asked = [next(row for row in rows if row["messages"][-1]["content"] == text) for text in server.asked]
    assert len(asked) == len({row["id"] for row in asked}) == 10
    assert Counter(row["meta"]["type"] for row in asked) == {"card": 5, "note": 5}
    for kind in ("card", "note"):
        places = sorted(rows.index(row) for row in asked if row["meta"]["type"] == kind)
        assert places[0] >= 20, "answered rows are not asked"
        assert {(place - 20) // 20 for place in places} == {0, 1, 2, 3, 4}
    assert found["rests_on"] == "a probe of 10 rows, whose answers were thrown away"
    assert (found["probe"]["asked"], found["probe"]["would_be_kept"]) == (10, 10)
    assert found.keys() >= FIELDS
    assert "hint" not in found


def test_a_rare_type_is_asked_too_and_no_more_than_there_are(tmp_path: Path, server: OllamaServer) -> None:
    rows = prompt_rows(40, types=["note"])
    rows.insert(30, prompt_rows(1, types=["card"])[0])
    write_lines(tmp_path / "data/prompts.jsonl", *rows)

    probe(tmp_path, 6, server)
    assert sum("card" in text for text in server.asked) == 1
    assert len(server.asked) == 6

    server.questions.clear()
    probe(tmp_path, 100, server)
    assert len(server.asked) == 41


def test_a_probe_counts_tokens_by_type(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 100)

    found = probe(tmp_path, 12, server)

    card, note = (found["by_type"][kind]["output_tokens"] for kind in ("card", "note"))
    # Counted in the one form that answers are kept in, whatever white space the server wrote.
    assert card.low <= tokens('{"name":"第50园","year":1150}') <= card.high
    assert note.low <= tokens("第50园建于1150年。") <= note.high
    assert found["output_tokens"].mean == pytest.approx(100 * card.mean + 100 * note.mean, abs=100)
    assert found["probe"]["output_tokens_per_s"] > 0


def test_the_hours_are_those_of_the_server_at_this_concurrency(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 200)
    server.latency_s = 0.15

    found = probe(tmp_path, 16, server, concurrency=4)["hours"]

    true = 400 * 0.15 / 4 / 3600
    assert found.low <= true * 1.1
    assert found.mean == pytest.approx(true, rel=0.4)
    assert found.high >= true


def test_a_server_that_answers_one_row_after_the_other_is_seen_through(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_prompts(tmp_path, 200)
    alone = threading.Lock()

    def one_at_a_time(question: Question) -> Fault | None:
        with alone:
            time.sleep(0.05)
        return None

    server.fault = one_at_a_time

    found = probe(tmp_path, 16, server, concurrency=4)["hours"]

    true = 400 * 0.05 / 3600
    assert found.mean == pytest.approx(true, rel=0.4)
    assert found.low < true * 1.1


def test_a_model_that_is_loaded_first_does_not_count(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 200)
    server.fault = lambda question: Fault(hang_s=1.5, change=dict) if question.number < 4 else None
    server.latency_s = 0.1

    found = probe(tmp_path, 16, server, concurrency=4)["hours"]

    assert found.mean == pytest.approx(400 * 0.1 / 4 / 3600, rel=0.5)


def test_fewer_rows_than_are_in_flight_at_once_give_two_bounds(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 100)
    server.latency_s = 0.1

    found = probe(tmp_path, 3, server, concurrency=12)

    assert found["hours"].mean is None
    assert found["hours"].high > 3 * found["hours"].low > 0
    assert "--probe 24" in found["hint"]


def test_answers_that_would_not_be_kept_are_counted_with_the_reason(
    tmp_path: Path, server: OllamaServer
) -> None:
    write_prompts(tmp_path, 10)
    server.answer = lambda question: right_answer(question).rstrip("。")

    found = probe(tmp_path, 8, server)

    assert (found["probe"]["asked"], found["probe"]["would_be_kept"]) == (8, 4)
    assert found["rejected"] == "4 × the note does not end with 。"
    note = tokens("第5园建于1105年")
    assert found["by_type"]["note"]["output_tokens"].mean == pytest.approx(2 * note, abs=2), "asked twice"


def test_where_no_question_is_answered_nothing_is_claimed(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 10)
    server.fault = lambda question: Fault(status=400, body={"error": "the prompt is too long"})

    found = probe(tmp_path, 3, server)

    assert (found["hours"], found["output_tokens"], found["rests_on"]) == (None, None, None)
    assert found["probe"]["would_be_kept"] == 0
    assert "3 × " in found["rejected"]
    assert "the prompt is too long" in found["rejected"]
    with pytest.raises(Unavailable, match="the prompt is too long"):
        probe(tmp_path, 8, server)


def test_a_probe_ends_in_bounded_time_and_tells_the_speed_of_what_was_written(
    tmp_path: Path, server: OllamaServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probing, "LONGEST_PROBE_S", 0.6)
    server.token_s = 0.02
    server.answer = lambda question: "".join(f"第{number}景。" for number in range(900))
    write_prompts(tmp_path, 10)

    found = probe(tmp_path, 3, server)

    assert (found["probe"]["asked"], found["probe"]["unfinished"]) == (3, 3)
    assert (found["hours"], found["rests_on"]) == (None, None)
    assert 10 < found["probe"]["output_tokens_per_s"] < 200


def test_a_probe_tells_how_many_answers_the_server_writes_at_once(tmp_path: Path) -> None:
    with OllamaServer(right_answer, slots=2, token_s=0.004) as server:
        write_prompts(tmp_path, 20)
        assert probe(tmp_path, 16, server, concurrency=6)["probe"]["answers_at_once"] == 2


def test_a_probe_of_what_is_all_answered_asks_nothing(tmp_path: Path, server: OllamaServer) -> None:
    write_prompts(tmp_path, 3)
    run_teacher(tmp_path, backend="ollama", url=server.url, model="teacher:7b")
    server.questions.clear()

    found = probe(tmp_path, 8, server)

    assert (found["rows"], found["to_ask"], found["hours"], server.asked) == (6, 0, None, [])


# --- from some to all ----------------------------------------------------------------------------


def drawn(seed: int, count: int) -> list[Answer]:
    random_ = random.Random(seed)
    found = []
    for number in range(count):
        kind, mean = [("a", 100), ("b", 700)][number % 2]
        length = int(mean * random_.lognormvariate(0, 0.3))
        found.append(Answer(kind, length, Expected(length / 20, length / 20, length / 20)))
    return found


def test_the_range_holds_the_truth_about_as_often_as_it_says() -> None:
    waiting = {"a": 500, "b": 500}
    true = sum(one.output_tokens or 0 for one in drawn(0, 100_000)) / 100
    held = sum(
        found.low <= true <= found.high
        for seed in range(1, 201)
        if (found := output_tokens(waiting, drawn(seed, 8)))
        and found.low is not None
        and found.high is not None
    )
    assert 170 <= held <= 200


def test_a_type_that_was_not_seen_is_taken_to_be_as_the_others() -> None:
    answers = [Answer("a", tokens, Expected(1.0, 1.0, 1.0)) for tokens in (90, 110)]
    found = output_tokens({"a": 10, "b": 10}, answers)
    assert found is not None
    assert found.mean == 2000


def test_without_token_counts_the_hours_come_from_the_seconds() -> None:
    answers = [Answer("a", None, Expected(s, s, s), at_start=s > 50) for s in (60.0, 60.0, 9.0, 10.0, 11.0)]
    found = hours({"a": 360}, answers, 2)
    assert output_tokens({"a": 360}, answers) is None
    assert found is not None
    assert found.mean == pytest.approx(0.5)


# --- how it is told ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimate", "line"),
    [
        ({"spots": 1200}, "1,200 spots"),
        ({"prompt_tokens_at_most": 61204}, "61,204 prompt tokens at most"),
        ({"output_tokens": Expected(312345.0, 298765.0, 331234.0)}, "312,000 output tokens (299,000-331,000)"),
        ({"output_tokens": Expected(312, None, None)}, "312 output tokens"),
        ({"hours": Expected(5.21666, 4.1, 6.43)}, "5.2 h (4.1-6.4)"),
        ({"hours": Expected(0.2, 0.15, 0.3)}, "12.0 min (9.0-18.0)"),
        ({"hours": Expected(100.0, 80.0, 130.0)}, "4.2 days (3.3-5.4)"),
        ({"hours": Expected(0.005, 0.004, 0.007)}, "18.0 s (14.4-25.2)"),
        ({"hours": Expected(None, 1.0, 4.0)}, "1.0-4.0 h"),
        ({"hours": 3}, "3.0 h"),
        ({"hours": 0.0}, "less than a second"),
        ({"gpu_memory_gib": 14.25}, "14.2 GPU memory gib"),
        ({"output_tokens_per_s": 212.4}, "212 output tokens/s"),
        ({"rests_on": "a probe"}, "rests on: a probe"),
        ({"probe": {"asked": 8, "would_be_kept": 7, "output_tokens_per_s": None}}, "probe: 8 asked, 7 would be kept"),
        ({"by_type": {"card": {"to_ask": 4, "spots": Expected(20, 18, 22)}}}, "card: 4 to ask, 20 spots (18-22)"),
    ],
)  # fmt: skip
def test_quantities_are_told_in_words(estimate: dict[str, Any], line: str) -> None:
    assert in_words(estimate) == [line]


def test_what_is_not_known_is_null_in_json_and_not_in_the_words() -> None:
    estimate: dict[str, Any] = {"hours": None, "by_type": {}, "output_tokens": Expected(None, 1.0, 2.0)}
    assert in_words(estimate) == ["1.0-2.0 output tokens"]
    assert as_json(estimate) == {
        "hours": None,
        "by_type": {},
        "output_tokens": {"mean": None, "low": 1.0, "high": 2.0},
    }


def test_a_strangers_stage_needs_no_probe_and_may_have_one(tmp_path: Path) -> None:
    class Counts(StageConfig):
        def estimate(self) -> dict[str, Any]:
            return {"calls": 7}

    class Tries(Counts):
        def probe(self, count: int, context: Context) -> dict[str, Any]:
            return {**self.estimate(), "hours": Expected(float(count)), "rests_on": context.stage}

    context = Context(
        stage="stranger",
        workspace=tmp_path,
        terminal=QuietTerminal(),
        domain="gardens",
        profile="test",
        started=datetime.now().astimezone(),
    )
    assert Counts().probe(3, context) == {"calls": 7}
    assert in_words(Tries().probe(3, context)) == ["7 calls", "3.0 h", "rests on: stranger"]


# --- the command ---------------------------------------------------------------------------------

PROFILE = """\
extends: default
pipeline: [prompts, teacher]
prompts:
  spots: spots.jsonl
teacher:
  backend: offline
"""


def test_a_probe_of_the_offline_teacher_is_over_at_once(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "configs/mine.yaml", PROFILE)
    write_lines(mtgdm.folder / "spots.jsonl", *(spot(f"景区{n}") for n in range(20)))
    first = mtgdm("plan", "--profile", "mine")
    assert "20 spots" in first.out
    assert "data/prompts.jsonl is not there yet" in first.out
    assert mtgdm("prompts", "--profile", "mine").code == 0
    before = on_disk(mtgdm.folder)

    ran = mtgdm("plan", "--profile", "mine", "--probe", "9")

    assert ran.code == 0, ran.err
    lines = [line.strip() for line in ran.out.splitlines()]
    assert lines[1].split() == ["prompts", "done", "nothing"]
    assert lines[2].split() == ["teacher", "missing", "60", "rows"]
    assert "60 to ask" in lines
    assert "probe: 9 asked, 9 would be kept" in lines
    assert "rests on: a probe of 9 rows, whose answers were thrown away" in lines
    assert "teacher probe: 9/9 rows" in ran.err
    as_json = mtgdm("plan", "--profile", "mine", "--probe", "9", "--json").json[1]
    assert as_json.keys() >= FIELDS | {"stage", "state", "why", "rests_on", "probe"}
    assert as_json["hours"]["mean"] < 0.1
    assert on_disk(mtgdm.folder) == before


def test_a_probe_of_a_server_that_is_down_is_one_clear_line(mtgdm: CommandLine) -> None:
    write_lines(mtgdm.folder / "data/prompts.jsonl", *prompt_rows(5))
    ran = mtgdm(
        "plan", "--probe", "4", env={
            "MTGDM_TEACHER_BACKEND": "ollama", "MTGDM_TEACHER_MODEL": "m", "MTGDM_TEACHER_URL": "http://127.0.0.1:9",
        },
    )  # fmt: skip
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "error: no Ollama server answers at http://127.0.0.1:9",
        "hint: start it with `ollama serve`, or name it with --url",
    ]


def test_so_many_as_nothing_are_no_probe(mtgdm: CommandLine) -> None:
    assert mtgdm("plan", "--probe", "0").code == 2


@pytest.mark.skipif(os.name == "nt", reason="needs SIGINT to one process")
def test_ctrl_c_in_a_probe_ends_with_130_and_leaves_nothing(tmp_path: Path, server: OllamaServer) -> None:
    write_lines(tmp_path / "data/prompts.jsonl", *prompt_rows(50))
    server.latency_s = 30
    before = on_disk(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "mtgdm", "plan", "--probe", "8"],
        cwd=tmp_path,
        env=clean_environment()
        | {
            "MTGDM_TEACHER_BACKEND": "ollama",
            "MTGDM_TEACHER_MODEL": "teacher:7b",
            "MTGDM_TEACHER_URL": server.url,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    deadline = time.monotonic() + 30
    while server.in_flight < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")
    assert on_disk(tmp_path) == before
