"""The teacher stage over files: what it writes, what it goes on with, what it refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mtgdm.errors import BadRow, SettingError, UserError
from mtgdm.manifest import read as read_manifest
from mtgdm.rows import Journal, row_id
from mtgdm.stages.teacher import TeacherConfig
from tests import teacher_domain
from tests.conftest import read_rows, write_lines
from tests.teacher_domain import Gardens, prompt_rows, run_teacher, write_prompts

FORBIDDEN = "第2园"


@pytest.fixture(autouse=True)
def gardens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> None:
    """The offline teacher fails on the note of one garden."""

    def answer(self: Gardens, facts: dict[str, Any], prompt_type: str) -> str:
        right = original(self, facts, prompt_type)
        return right.rstrip("。") if facts["name"] == FORBIDDEN else right

    original = Gardens.answer
    monkeypatch.setattr(Gardens, "answer", answer)


def kept(workspace: Path) -> list[dict[str, Any]]:
    return read_rows(workspace / "data" / "teacher.jsonl")


def rejected(workspace: Path) -> list[dict[str, Any]]:
    path = workspace / "data" / "teacher.rejected.jsonl"
    return read_rows(path) if path.exists() else []


def ids(rows: list[dict[str, Any]]) -> list[str]:
    return [row["id"] for row in rows]


def as_of_the_original(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as the pipeline before this one wrote them: no id, little meta."""
    meta = ("spot", "province", "type")
    return [{"messages": row["messages"], "meta": {key: row["meta"][key] for key in meta}} for row in rows]


def test_each_prompt_gets_its_answer_in_prompt_order(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 5)

    ran = run_teacher(tmp_path)

    rows = kept(tmp_path)
    assert ids(rows) == ids(prompts)
    assert [row["messages"][:-1] for row in rows] == [row["messages"] for row in prompts]
    assert json.loads(rows[0]["messages"][-1]["content"]) == {"name": "第0园", "year": 1100}
    assert ran.result.summary == "10 asked = 10 kept + 0 rejected · offline gardens"
    assert ran.result.counts["asked"] == 10
    assert ran.manifests[0].counts["kept"] == 10


def test_the_row_says_who_answered_and_how_it_agrees_with_the_record(tmp_path: Path) -> None:
    write_prompts(tmp_path, 1)

    run_teacher(tmp_path)

    meta = kept(tmp_path)[0]["meta"]
    teacher = meta.pop("teacher")
    assert meta == prompt_rows(1)[0]["meta"]
    assert len(teacher.pop("fingerprint")) == 16
    assert teacher == {
        "backend": "offline",
        "model": "gardens",
        "finish_reason": "stop",
        "prompt_tokens": None,
        "output_tokens": None,
        "seconds": 0.0,
        "attempts": 1,
        "repaired": False,
        "facts": {"recall": 1.0, "unsupported": []},
    }


def test_the_offline_teacher_writes_the_same_bytes_every_time(tmp_path: Path) -> None:
    write_prompts(tmp_path, 5)
    run_teacher(tmp_path)
    first = (tmp_path / "data" / "teacher.jsonl").read_bytes()

    run_teacher(tmp_path, overwrite=True)

    assert (tmp_path / "data" / "teacher.jsonl").read_bytes() == first


def test_the_run_ends_with_a_table_of_the_facts(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)

    assert "card  3  1.000  0" in run_teacher(tmp_path).printed


def test_a_finished_file_is_not_touched(tmp_path: Path) -> None:
    write_prompts(tmp_path, 5)
    run_teacher(tmp_path)
    out = tmp_path / "data" / "teacher.jsonl"
    before = out.stat()

    ran = run_teacher(tmp_path)

    assert (out.stat().st_mtime_ns, out.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert "all 10 rows were done before: nothing is asked" in ran.printed
    assert ran.result.counts["kept"] == 10


def test_an_invalid_answer_is_put_aside_with_its_reason_and_its_text(tmp_path: Path, picky: None) -> None:
    write_prompts(tmp_path, 4, types=["note"])

    ran = run_teacher(tmp_path)

    (row,) = rejected(tmp_path)
    assert row["rejected"].pop("fingerprint")
    assert row["rejected"] == {
        "reason": "the note does not end with 。",
        "text": "第2园建于1102年",
        "finish_reason": "stop",
        "attempts": 2,
    }
    assert row["messages"][-1]["role"] == "user"
    assert ran.result.summary.startswith("4 asked = 3 kept + 1 rejected")
    assert read_manifest(tmp_path / "data" / "teacher.rejected.jsonl") is not None


def test_strict_ends_with_an_error_when_a_row_is_rejected(tmp_path: Path, picky: None) -> None:
    write_prompts(tmp_path, 4, types=["note"])

    with pytest.raises(UserError, match="--strict: 4 asked = 3 kept"):
        run_teacher(tmp_path, strict=True)

    assert len(kept(tmp_path)) == 3


def test_a_run_that_keeps_nothing_is_an_error(tmp_path: Path) -> None:
    rows = prompt_rows(2)
    for row in rows:
        del row["meta"]["record"]
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    with pytest.raises(UserError, match="no answer was kept: 4 asked = 0 kept"):
        run_teacher(tmp_path)

    assert "carries no record" in rejected(tmp_path)[0]["rejected"]["reason"]


def test_many_rows_without_a_record_stop_early_and_leave_nothing(tmp_path: Path) -> None:
    rows = prompt_rows(100)
    for row in rows:
        del row["meta"]["record"]
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    with pytest.raises(UserError, match="5 rows failed in the same way") as error:
        run_teacher(tmp_path)

    assert "mtgdm prompts" in (error.value.hint or "")
    assert not list((tmp_path / "data").glob("teacher*"))


def test_rejected_rows_are_asked_again_only_on_request(
    tmp_path: Path, picky: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = write_prompts(tmp_path, 4, types=["note"])
    run_teacher(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("mtgdm.plugins.find", teacher_domain.find)

    assert run_teacher(tmp_path).result.counts["rejected"] == 1
    ran = run_teacher(tmp_path, retry_rejected=True)

    assert (ran.result.counts["kept"], ran.result.counts["rejected"]) == (4, 0)
    assert ids(kept(tmp_path)) == ids(prompts)
    assert not (tmp_path / "data" / "teacher.rejected.jsonl").exists()


def test_a_row_rejected_twice_stands_once_in_the_rejected_file(tmp_path: Path, picky: None) -> None:
    write_prompts(tmp_path, 4, types=["note"])
    run_teacher(tmp_path)

    run_teacher(tmp_path, retry_rejected=True)

    assert len(rejected(tmp_path)) == 1


def test_limit_finishes_the_first_rows_and_a_later_run_goes_on(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 5)

    first = run_teacher(tmp_path, limit=3)
    assert ids(kept(tmp_path)) == ids(prompts)[:3]
    assert first.result.counts["asked"] == 3
    run_teacher(tmp_path)

    assert ids(kept(tmp_path)) == ids(prompts)


def test_a_smaller_limit_throws_no_answer_away(tmp_path: Path) -> None:
    write_prompts(tmp_path, 5)
    run_teacher(tmp_path)

    ran = run_teacher(tmp_path, limit=2)

    assert len(kept(tmp_path)) == 10
    assert ran.result.counts["asked"] == 2


def test_the_rows_done_are_counted_for_the_status(tmp_path: Path) -> None:
    write_prompts(tmp_path, 5)
    config = TeacherConfig().resolved(tmp_path)
    assert config.finished() == (0, 10)
    run_teacher(tmp_path, limit=3)

    assert config.finished() == (3, 10)
    assert TeacherConfig(limit=3).resolved(tmp_path).finished() == (3, 3)
    assert TeacherConfig(in_=Path("none.jsonl")).resolved(tmp_path).finished() is None


def test_the_same_prompt_twice_is_asked_once(tmp_path: Path) -> None:
    rows = prompt_rows(2)
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows, rows[0])

    ran = run_teacher(tmp_path)

    assert (ran.result.counts["asked"], ran.result.counts["duplicates"]) == (4, 1)
    assert len(kept(tmp_path)) == 4


def test_a_torn_last_line_is_asked_again(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 5)
    run_teacher(tmp_path)
    out = tmp_path / "data" / "teacher.jsonl"
    whole = out.read_bytes()
    out.write_bytes(whole[:-40])

    run_teacher(tmp_path)

    assert out.read_bytes() == whole
    assert ids(kept(tmp_path)) == ids(prompts)


def test_answers_of_another_teacher_are_refused_with_the_two_ways_out(tmp_path: Path) -> None:
    write_prompts(tmp_path, 5)
    run_teacher(tmp_path)
    before = (tmp_path / "data" / "teacher.jsonl").read_bytes()

    with pytest.raises(UserError, match="another teacher") as error:
        run_teacher(tmp_path, backend="scripted")

    assert error.value.where == f"{tmp_path / 'data' / 'teacher.jsonl'}:1"
    assert "--out" in (error.value.hint or "")
    assert "--overwrite" in (error.value.hint or "")
    assert (tmp_path / "data" / "teacher.jsonl").read_bytes() == before


def test_settings_that_change_no_answer_may_change_between_runs(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3, types=["note"])
    run_teacher(tmp_path, backend="scripted", limit=1)

    ran = run_teacher(tmp_path, backend="scripted", timeout_s=9.0, concurrency=2, max_tokens=50, num_ctx=1024)

    assert ran.result.counts["kept"] == 3


def test_another_temperature_is_another_teacher(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3, types=["note"])
    run_teacher(tmp_path, backend="scripted", limit=1)

    with pytest.raises(UserError, match="other sampling settings"):
        run_teacher(tmp_path, backend="scripted", temperature=1.0)


def test_rows_another_teacher_failed_on_are_asked_again(tmp_path: Path, picky: None) -> None:
    write_prompts(tmp_path, 4, types=["note"])
    run_teacher(tmp_path)
    (tmp_path / "data" / "teacher.jsonl").unlink()

    ran = run_teacher(tmp_path, backend="scripted")

    assert (ran.result.counts["kept"], ran.result.counts["rejected"]) == (4, 0)


def test_overwrite_starts_anew_with_another_teacher(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3, types=["note"])
    run_teacher(tmp_path)

    run_teacher(tmp_path, backend="scripted", overwrite=True)

    assert {row["meta"]["teacher"]["backend"] for row in kept(tmp_path)} == {"scripted"}
    assert len(kept(tmp_path)) == 3


def test_overwrite_leaves_the_old_file_where_the_new_teacher_cannot_be_asked(tmp_path: Path) -> None:
    write_prompts(tmp_path, 5)
    run_teacher(tmp_path)
    before = (tmp_path / "data" / "teacher.jsonl").read_bytes()

    with pytest.raises(UserError, match="no Ollama server answers"):
        run_teacher(tmp_path, backend="ollama", model="m", url="http://127.0.0.1:9", overwrite=True)

    assert (tmp_path / "data" / "teacher.jsonl").read_bytes() == before
    assert read_manifest(tmp_path / "data" / "teacher.jsonl") is not None


def test_a_plugin_backend_is_asked_like_ours(tmp_path: Path) -> None:
    write_prompts(tmp_path, 2, types=["note"])

    ran = run_teacher(tmp_path, backend="scripted", model="upside-down")

    assert ran.result.summary.endswith("scripted upside-down")
    teacher = kept(tmp_path)[0]["meta"]["teacher"]
    assert (teacher["prompt_tokens"], teacher["output_tokens"], teacher["seconds"]) == (7, 11, 0.5)
    assert "7+11 tokens · 22.0 tokens/s" in next((tmp_path / "log").glob("teacher-*.log")).read_text("utf-8")


def test_an_unknown_backend_is_a_wrong_setting_with_the_nearest_name(tmp_path: Path) -> None:
    write_prompts(tmp_path, 1)

    with pytest.raises(SettingError, match="no teacher backend 'olama'") as error:
        run_teacher(tmp_path, backend="olama")

    assert "ollama" in (error.value.hint or "")


def test_a_row_without_a_type_keeps_any_answer(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "你好"}]
    write_lines(tmp_path / "data" / "prompts.jsonl", {"messages": messages})

    run_teacher(tmp_path, backend="scripted")

    (row,) = kept(tmp_path)
    assert row["messages"][-1]["content"] == "好你。"
    assert row["meta"]["teacher"]["facts"] == {"recall": None, "unsupported": []}


# --- prompts that change -------------------------------------------------------------------------


def test_one_more_prompt_is_one_more_question(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 3)
    run_teacher(tmp_path, limit=4)
    write_lines(tmp_path / "data" / "prompts.jsonl", *reversed(prompts))

    ran = run_teacher(tmp_path)

    assert ids(kept(tmp_path)) == ids(prompts)[::-1]
    assert ran.result.counts["kept"] == 6


def test_answers_whose_prompt_is_gone_are_moved_aside_and_said_so(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    answers = kept(tmp_path)
    write_lines(tmp_path / "data" / "prompts.jsonl", *prompts[2:])

    ran = run_teacher(tmp_path)

    assert kept(tmp_path) == answers[2:]
    assert read_rows(tmp_path / "data" / "teacher.stale.jsonl") == answers[:2]
    assert any("2 answers whose prompt is gone were moved to" in line for line in ran.warnings)
    assert run_teacher(tmp_path).warnings == []


def test_answers_take_over_the_split_their_prompt_has_now(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    for row in prompts[:2]:
        row["meta"]["split"] = "test"
    write_lines(tmp_path / "data" / "prompts.jsonl", *prompts)

    ran = run_teacher(tmp_path)

    assert [row["meta"]["split"] for row in kept(tmp_path)] == ["test", "test", *["train"] * 4]
    assert kept(tmp_path)[0]["meta"]["teacher"]["facts"]["recall"] == 1.0
    assert any("2 answers took over the changed meta" in line for line in ran.printed)


# --- files of the original pipeline --------------------------------------------------------------


def test_a_file_of_the_original_pipeline_is_gone_on_with(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    old = as_of_the_original(kept(tmp_path))[:4]
    write_lines(tmp_path / "data" / "teacher.jsonl", *old)

    ran = run_teacher(tmp_path, resume=True, resume_verify=True)

    rows = kept(tmp_path)
    assert [row["messages"][:-1] for row in rows] == [row["messages"] for row in prompts]
    assert [row["messages"] for row in rows[:4]] == [row["messages"] for row in old]
    assert ["teacher" in row["meta"] for row in rows] == [False] * 4 + [True] * 2
    assert {row["meta"]["split"] for row in rows} == {"train"}
    assert ran.result.counts["kept"] == 6


def test_prompts_of_the_original_pipeline_are_asked(tmp_path: Path) -> None:
    rows = [{"messages": row["messages"], "meta": row["meta"]} for row in prompt_rows(2)]
    write_lines(tmp_path / "data" / "prompts.jsonl", *rows)

    run_teacher(tmp_path)

    assert ids(kept(tmp_path)) == [row_id(row["messages"]) for row in rows]


# --- --resume-verify -----------------------------------------------------------------------------


def test_resume_verify_passes_a_file_that_fits(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)
    run_teacher(tmp_path)

    assert run_teacher(tmp_path, resume_verify=True).result.counts["kept"] == 6


def test_resume_verify_finds_messages_that_are_not_the_prompts(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    rows = kept(tmp_path)
    rows[3]["messages"][1]["content"] += "！"
    write_lines(tmp_path / "data" / "teacher.jsonl", *rows)

    with pytest.raises(BadRow, match="not those of its prompt") as error:
        run_teacher(tmp_path, resume_verify=True)

    assert error.value.line == 4


def test_resume_verify_finds_a_row_of_other_prompts(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    write_lines(tmp_path / "data" / "prompts.jsonl", *prompts[:-1])

    with pytest.raises(BadRow, match="answers no prompt") as error:
        run_teacher(tmp_path, resume_verify=True)

    assert error.value.line == 6


def test_resume_verify_finds_a_line_that_is_broken_in_its_middle(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    out = tmp_path / "data" / "teacher.jsonl"
    lines = out.read_text(encoding="utf-8").splitlines()
    lines[1] = lines[1].replace('"role"', '"ro', 1)
    write_lines(out, *lines)

    with pytest.raises(BadRow, match="not JSON") as error:
        run_teacher(tmp_path, resume_verify=True)

    assert error.value.line == 2


def test_resume_verify_finds_an_answer_that_is_empty(tmp_path: Path) -> None:
    write_prompts(tmp_path, 2)
    run_teacher(tmp_path)
    out = tmp_path / "data" / "teacher.jsonl"
    rows = read_rows(out)
    rows[1]["messages"][-1]["content"] = " "
    write_lines(out, *rows)
    with pytest.raises(UserError, match=r"teacher.jsonl:2: the answer is empty") as raised:
        run_teacher(tmp_path, resume_verify=True)
    assert raised.value.hint == "delete the line: its row is asked again"


def test_resume_verify_finds_a_prompt_answered_twice(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    rows = kept(tmp_path)
    write_lines(tmp_path / "data" / "teacher.jsonl", *rows, rows[0])

    with pytest.raises(BadRow, match="already answered in line 1"):
        run_teacher(tmp_path, resume_verify=True)


def test_a_prompt_answered_twice_stands_once_after_the_run(tmp_path: Path) -> None:
    write_prompts(tmp_path, 3)
    run_teacher(tmp_path)
    rows = kept(tmp_path)
    write_lines(tmp_path / "data" / "teacher.jsonl", *rows, rows[0])

    run_teacher(tmp_path)

    assert kept(tmp_path) == rows


# --- bad files -----------------------------------------------------------------------------------


def test_no_prompts_file_is_said_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        run_teacher(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "there is no prompt in this file"),
        ('{"id": "x", "messages": [', "not JSON"),
        ('{"id": "x"}', "`messages` is missing"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "an answer",
        ),
    ],
)
def test_a_bad_prompts_file_is_found_before_anything_is_asked(tmp_path: Path, line: str, reason: str) -> None:
    write_lines(tmp_path / "data" / "prompts.jsonl", *([*prompt_rows(1), line] if line else [""]))

    with pytest.raises(UserError, match=reason):
        run_teacher(tmp_path)

    assert not (tmp_path / "data" / "teacher.jsonl").exists()


def test_an_output_that_is_a_folder_is_said_in_one_line(tmp_path: Path) -> None:
    write_prompts(tmp_path, 1)
    (tmp_path / "data" / "teacher.jsonl").mkdir()

    with pytest.raises(UserError, match="this is a folder"):
        run_teacher(tmp_path)


def test_a_full_disk_stops_the_run_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_prompts(tmp_path, 2)
    append = Journal.append

    def full(self: Journal, row: dict[str, Any]) -> None:
        if len(self.ids) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(self, row)

    monkeypatch.setattr(Journal, "append", full)

    with pytest.raises(UserError, match="cannot be written: No space left") as error:
        run_teacher(tmp_path)

    assert error.value.where == str(tmp_path / "data" / "teacher.jsonl")
    assert len(kept(tmp_path)) == 2
