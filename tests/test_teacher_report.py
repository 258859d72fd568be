"""The teacher report: what it counts in rows and logs, and what it makes of broken ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mtgdm.domain import FactCheck
from mtgdm.errors import BadRow, UserError
from mtgdm.plugins import named
from mtgdm.reports.teacher_figures import answers_figure, kept_figure, pace_figure
from mtgdm.reports.teacher_pace import Pace, describe_pace, over_time, read_pace
from mtgdm.reports.teacher_run import (
    EXAMPLES,
    MOST_REASONS,
    WORST,
    TeacherRun,
    kind_of_reason,
    read_teacher_run,
)
from mtgdm.reports.teacher_summary import describe
from mtgdm.stages.prompts import run as prompts
from mtgdm.stages.teacher import run as teacher
from mtgdm.stages.teacher_report import run as teacher_report
from mtgdm.teachers.judgement import Judge
from mtgdm.testing import run as run_stage
from tests.conftest import write_lines
from tests.test_reports import no_browser, report_json, strict_figure  # noqa: F401 - a fixture

FINGERPRINT = "abc123"
TYPES = ("general", "itinerary", "bilingual")


def row_of(number: int, **meta: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"问题{number}"}]
    identity = hashlib.sha256(str(number).encode()).hexdigest()[:24]
    record = {"spot": f"<b>景区|{number}</b>", "type": TYPES[number % 3], "split": "train"}
    return {"id": identity, "messages": messages, "meta": record | meta}


def kept(number: int, *, answer: str = "答案" * 50, **told: Any) -> dict[str, Any]:
    row = row_of(number, record={"name": "景区"})
    row["messages"].append({"role": "assistant", "content": answer})
    row["meta"]["teacher"] = {
        "fingerprint": FINGERPRINT,
        "backend": "ollama",
        "model": "qwen",
        "finish_reason": "stop",
        "prompt_tokens": 500,
        "output_tokens": 100 + number,
        "seconds": 4.0,
        "attempts": 1,
        "repaired": False,
        "facts": {"recall": 0.75, "unsupported": []},
        **told,
    }
    return row


def rejected(number: int, reason: str = "not JSON: Expecting ',' delimiter", **told: Any) -> dict[str, Any]:
    about = {"reason": reason, "text": "半截", "finish_reason": "stop", "fingerprint": FINGERPRINT, **told}
    return {**row_of(number), "rejected": about}


def log(folder: Path, name: str, *lines: str, fingerprint: str = FINGERPRINT) -> Path:
    """A sitting from 10:00:00 on; each line begins with the time after it."""
    head = [
        "10:00:00,000 INFO mtgdm 0.1.0 teacher, profile default",
        f"10:00:00,500 INFO ollama qwen, fingerprint {fingerprint}, num_ctx 8192: 9 prompts, 0 done",
    ]
    path = folder / "log" / f"teacher-{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"2026-11-23 {line}\n" for line in [*head, *lines]), encoding="utf-8", newline="\n"
    )
    return path


def said(at: str, number: int, how: str = "kept", tokens: str = "500+100 tokens · ") -> str:
    return f"{at} INFO {row_of(number)['id']} · general · {how} · 4.00 s · {tokens}stop · attempts 1"


def written(folder: Path, *rows: Any, lost: tuple[Any, ...] = ()) -> Path:
    if lost:
        write_lines(folder / "data/teacher.rejected.jsonl", *lost)
    return write_lines(folder / "data/teacher.jsonl", *rows)


def read(folder: Path) -> TeacherRun:
    domain = named("mtgdm.domains", "tourism", "domain")()
    return read_teacher_run(folder / "data/teacher.jsonl", folder / "data/teacher.rejected.jsonl", domain)


def described(folder: Path, pace: Pace | None = None) -> Mapping[str, Any]:
    return describe(read(folder), pace or Pace(), complete=True)


# --- rows ----------------------------------------------------------------------------------------


def test_kept_and_rejected_are_counted_by_type_and_reason(tmp_path: Path) -> None:
    lost = (
        rejected(10),
        rejected(13, "not JSON: Expecting ':' delimiter"),
        rejected(11, "cut at 2048 tokens"),
    )
    written(tmp_path, *map(kept, range(6)), lost=lost)
    data = described(tmp_path)
    assert (data["kept"], data["rejected"], data["kept_share"]) == (6, 3, pytest.approx(2 / 3))
    assert data["reasons"] == {"not JSON: Expecting … delimiter": 2, "cut at … tokens": 1}
    assert data["reasons_by_type"]["itinerary"] == {"not JSON: Expecting … delimiter": 2}
    assert {name: one["rejected"] for name, one in data["by_type"].items()} == {
        "general": 0,
        "itinerary": 2,
        "bilingual": 1,
    }
    assert data["by_split"] == {"train": 6}
    assert data["teachers"] == [{"backend": "ollama", "model": "qwen", "rows": 6}]


def test_tokens_lengths_and_repairs_are_those_of_the_kept_rows(tmp_path: Path) -> None:
    written(tmp_path, kept(0), kept(3, answer="短", repaired=True, attempts=2), kept(6, output_tokens=None))
    data = described(tmp_path)
    assert data["tokens"] == {
        "rows": 2,
        "prompt": 1000,
        "output": 203,
        "prompt_per_row": 500.0,
        "output_per_row": 101.5,
    }
    assert data["repairs"] == {"repaired": 1, "requests_per_kept_row": pytest.approx(4 / 3)}
    assert data["by_type"]["general"]["characters"]["p50"] == 100
    assert data["by_type"]["general"]["characters"]["min"] == 1


def test_facts_are_taken_from_the_rows_and_checked_where_a_row_has_none(tmp_path: Path) -> None:
    record = {"name": "故宫博物院", "city": "北京市", "year_5a": 2007}
    unchecked = kept(3, answer="故宫博物院在北京市。", facts=None)
    unchecked["meta"]["record"] = record
    claims = {"recall": 0.25, "unsupported": ["1420年", "88元"]}
    written(tmp_path, kept(0, facts=claims), unchecked)
    data = described(tmp_path)
    assert data["all_types"]["fact_recall"]["rows"] == 2
    assert data["all_types"]["unsupported"] == {"rows": 2, "rows_with_claims": 1, "claims": 2}
    assert [one["claims"] for one in data["most_unsupported"]] == [("1420年", "88元")]


def test_the_rows_with_most_claims_are_named(tmp_path: Path) -> None:
    rows = [kept(n, facts={"recall": 1.0, "unsupported": ["年"] * (n % 17)}) for n in range(100)]
    written(tmp_path, *rows)
    worst = described(tmp_path)["most_unsupported"]
    assert len(worst) == WORST
    assert [one["unsupported"] for one in worst][:6] == [16, 16, 16, 16, 16, 15]


def test_rows_of_other_tools_are_counted_too(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    written(tmp_path, {"messages": messages})
    data = described(tmp_path)
    assert list(data["by_type"]) == ["untyped"]
    assert "no row carries a record: facts were not checked" in data["findings"]
    strict_figure(answers_figure(read(tmp_path)))


def test_a_torn_last_line_is_noted_and_any_other_is_an_error(tmp_path: Path) -> None:
    path = written(tmp_path, kept(0), '{"id": "ab')
    assert "the last line of teacher.jsonl is torn" in read(tmp_path).notes[0]
    write_lines(path, kept(0), '{"id": "ab', kept(1))
    with pytest.raises(BadRow, match=r"teacher.jsonl:2: not JSON"):
        read(tmp_path)
    write_lines(path, {"id": "x", "messages": "none"})
    with pytest.raises(BadRow, match=r"teacher.jsonl:1: `messages`"):
        read(tmp_path)


def test_figures_that_are_none_are_left_out(tmp_path: Path) -> None:
    odd = {"recall": float("nan"), "unsupported": 7}
    rows = [kept(0, facts=odd, output_tokens=-1, seconds="4", attempts=None), kept(3, facts={"recall": 2})]
    rows += [{"messages": [{"role": "user", "content": ["a"]}], "meta": None}, {"messages": []}]
    written(tmp_path, *rows, lost=({**row_of(9), "rejected": "why"},))
    data = described(tmp_path)
    assert (data["kept"], data["tokens"]["rows"], data["all_types"]["fact_recall"]["rows"]) == (4, 1, 0)
    assert data["reasons"] == {"no reason given": 1}
    strict_figure(answers_figure(read(tmp_path)))


def test_reasons_are_bounded_however_many_there_are(tmp_path: Path) -> None:
    words = ["".join(chr(97 + int(digit)) for digit in str(number)) for number in range(MOST_REASONS + 50)]
    written(tmp_path, kept(0), lost=tuple(rejected(3 * n, f"bad {word}") for n, word in enumerate(words)))
    run = read(tmp_path)
    assert len(run.reasons) == MOST_REASONS + 1
    assert run.reasons["general", "other reasons"] == 50
    assert len(run.examples) == EXAMPLES


def test_reasons_that_differ_in_what_they_name_are_one() -> None:
    judge = Judge(named("mtgdm.domains", "tourism", "domain")(), min_fact_recall=0.9, max_unsupported=1)
    few = [FactCheck(("a",), missing) for missing in (("year 1420", "city 北京"), ("level 5A",))]
    many = [FactCheck(("a",), (), claims) for claims in (("1420年", "88元"), ("8公里", "3座", "五座"))]
    for alike in (few, many):
        reasons = {kind_of_reason(judge.fact_problem(facts) or "") for facts in alike}
        assert len(reasons) == 1 and "" not in reasons
    assert kind_of_reason("steps.3.lat: bad (and 2 more)") == "steps[].lat: bad (and … more)"


# --- pace ----------------------------------------------------------------------------------------


def test_the_pace_of_sittings_is_put_together_without_the_pause(tmp_path: Path) -> None:
    first = log(
        tmp_path, "1", said("10:00:10,500", 0), said("10:00:20,500", 1, "rejected: not JSON · it is prose")
    )
    second = log(tmp_path, "2", said("10:01:00,500", 2))
    pace = read_pace([first, second], {FINGERPRINT})
    assert list(pace.seconds) == pytest.approx([10, 20, 80])
    figures = describe_pace(pace)
    assert figures is not None
    assert (figures["sittings"], figures["answers"]) == (2, 3)
    assert figures["rows_per_minute"] == pytest.approx(3 / 80 * 60)
    assert (figures["output_tokens"], figures["rejected_output_tokens"]) == (300, 100)
    buckets = over_time(pace)
    assert sum(one.rows for one in buckets) == 3
    assert sum(one.rejected for one in buckets) == 1


def test_logs_of_another_teacher_tell_nothing(tmp_path: Path) -> None:
    other = log(tmp_path, "1", said("10:00:10,500", 0), fingerprint="other")
    assert len(read_pace([other], {FINGERPRINT})) == 0
    assert len(read_pace([other], None)) == 1


def test_a_clock_that_is_set_back_turns_nothing_round(tmp_path: Path) -> None:
    pace = read_pace([log(tmp_path, "1", said("10:30:00,500", 0), said("09:30:00,500", 1))], None)
    assert list(pace.seconds) == [1800, 1800]


def test_a_log_without_tokens_and_a_torn_one_are_read(tmp_path: Path) -> None:
    path = log(tmp_path, "1", said("10:00:10,500", 0, tokens=""), "10:00:11,000 INFO 0123")
    assert list(read_pace([path], None).output_tokens) == [0]


def test_the_log_the_stage_writes_is_one_the_report_reads(tmp_path: Path) -> None:
    """Both ends of the format: real rows, a real log."""
    spots = write_lines(tmp_path / "spots.jsonl", *({"name": f"景区{n}", "city": "杭州市"} for n in range(9)))
    run_stage(prompts, tmp_path, spots=str(spots))
    run_stage(teacher, tmp_path, backend="offline")
    run = read(tmp_path)
    pace = read_pace((tmp_path / "log").glob("teacher-*.log"), run.fingerprints)
    assert (run.kept, run.rejected, len(pace)) == (27, 0, 27)


# --- the report ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_browser")
def test_the_report_is_written_in_all_its_forms(tmp_path: Path) -> None:
    claims = {"recall": 0.5, "unsupported": ["1420年"]}
    written(tmp_path, *map(kept, range(8)), kept(8, facts=claims), lost=(rejected(20), rejected(22)))
    log(tmp_path, "1", *(said(f"10:00:{n + 10},000", n) for n in range(9)))
    run = run_stage(teacher_report, tmp_path)
    data = report_json(run)
    assert (data["kind"], data["complete"], data["rows"]) == ("teacher", False, 11)
    assert data["pace"]["answers"] == 9
    assert run.result.summary == "9 of 11 rows kept (81.8%) · ollama qwen"
    assert run.result.outputs
    html = run.result.outputs[0].with_suffix(".html").read_text(encoding="utf-8")
    for name in ("kept", "answers", "pace"):
        assert f'data-figure="{name}"' in html
    assert "半截" in html and "<b>景区" not in html
    text = run.result.outputs[0].with_suffix(".md").read_text(encoding="utf-8")
    assert "\\<b\\>景区\\|8\\</b\\>" in text
    assert len(run.manifests[0].inputs) == 2


@pytest.mark.usefixtures("no_browser")
def test_a_run_that_kept_nothing_is_reported_on(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/teacher.rejected.jsonl", rejected(1), rejected(2))
    data = report_json(run_stage(teacher_report, tmp_path))
    assert (data["kept"], data["rejected"]) == (0, 2)


@pytest.mark.parametrize("lines", [None, []])
def test_no_row_is_one_clear_error(tmp_path: Path, lines: list[Any] | None) -> None:
    if lines is not None:
        written(tmp_path, *lines)
    with pytest.raises(UserError, match="there is no teacher row here") as error:
        run_stage(teacher_report, tmp_path)
    assert error.value.hint == "run `mtgdm teacher` first"


def test_a_log_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    written(tmp_path, kept(0))
    with pytest.raises(UserError, match="there is no such file"):
        run_stage(teacher_report, tmp_path, log="log/none.log")


@pytest.mark.parametrize("narrow", [False, True])
def test_plotly_takes_the_figures_of_one_row_and_of_many(tmp_path: Path, narrow: bool) -> None:
    written(tmp_path, kept(0))
    one = read(tmp_path)
    pace = read_pace([log(tmp_path, "1", said("10:00:00,500", 0))], None)
    strict_figure(pace_figure(one, pace))
    written(tmp_path, *map(kept, range(30)), lost=tuple(rejected(n, f"bad {chr(97 + n)}") for n in range(20)))
    for run in (one, read(tmp_path)):
        strict_figure(kept_figure(run, narrow=narrow))
        strict_figure(answers_figure(run, narrow=narrow))


def test_json_of_the_figures_holds_no_text_of_an_answer(tmp_path: Path) -> None:
    written(tmp_path, *map(kept, range(6)))
    assert "答案" not in json.dumps(described(tmp_path), ensure_ascii=False)
