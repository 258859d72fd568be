"""`mtgdm eval-report`: which evaluation it takes, what it refuses, what it tells on the terminal and in Markdown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mtgdm import manifest
from mtgdm.errors import BadRow, UserError
from mtgdm.reports.evaluation import read_evaluation
from mtgdm.reports.evaluation_runtime import runtime_figure
from mtgdm.reports.evaluation_summary import describe
from mtgdm.reports.evaluation_words import cards, contract_keys, failing, headline, speed, standing
from mtgdm.stages.eval_report import run as eval_report
from mtgdm.testing import run as run_stage
from tests.conftest import CommandLine, write_lines
from tests.test_lineage import made, state
from tests.test_reports import (
    eval_metrics_file,
    eval_rows,
    no_browser,  # noqa: F401 - a fixture
    report_json,
)

REFUSED = [{"id": "a", "spot": "西湖", "refused": "the prompt is longer than the context"}]


def described(workspace: Path, *rows: Any) -> dict[str, Any]:
    return {"leaked_rows": 0, **describe(read_evaluation(eval_metrics_file(workspace, *rows)))}


# --- which evaluation ----------------------------------------------------------------------------


@pytest.mark.parametrize("content", [[], REFUSED, ['{"id": "a", "met']])
@pytest.mark.usefixtures("no_browser")
def test_a_newer_run_without_a_row_does_not_hide_the_last_good_one(
    content: list[Any], tmp_path: Path
) -> None:
    good = eval_metrics_file(tmp_path, *eval_rows())
    write_lines(tmp_path / "log/eval-20261124-000000.metrics.jsonl", *content)
    run = run_stage(eval_report, tmp_path)
    assert report_json(run)["metrics_file"] == f"log/{good.name}"
    note = f"eval-20261124-000000.metrics.jsonl is newer and holds no row: {good.name} was taken"
    assert any(note in line for line in run.printed)
    assert [state.path for state in run.manifests[0].inputs] == [f"log/{good.name}"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ([], "the file is empty: no row was evaluated"),
        (['{"id": "a", "met'], "no row was evaluated: no line of this can be read"),
        (REFUSED, "no row was evaluated, 1 could not be asked"),
        ([{"event": "train", "step": 1}], "this holds no eval metrics"),
    ],
)
def test_a_run_without_a_row_is_an_error_of_one_line(
    content: list[Any], why: str, mtgdm: CommandLine
) -> None:
    path = eval_metrics_file(mtgdm.folder, *content)
    ran = mtgdm("eval-report", env={"BROWSER_PATH": str(mtgdm.folder / "none")})
    assert ran.code == 1
    assert why in ran.err and str(path.name) in ran.err
    assert "Traceback" not in ran.err
    assert not list((mtgdm.folder / "data").glob("report/*.json"))


# --- what is no figure ---------------------------------------------------------------------------

JUDGE = {"by": "j", "against": "base", "student_first": "student", "student_second": "student"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"judge": JUDGE | {"score": "high"}}, "`judge.score` is no number from 0 to 1: 'high'"),
        ({"judge": JUDGE | {"score": 7}}, "`judge.score` is no number from 0 to 1: '7'"),
        ({"judge": JUDGE | {"score": None}}, "`judge.score` is no number from 0 to 1: 'None'"),
        ({"metrics": {"char_f1": "0.5"}}, "`metrics.char_f1` is no number: '0.5'"),
        ({"metrics": {"latency_s": [1]}}, "`metrics.latency_s` is no number: '[1]'"),
        ({"metrics": {"char_f1": 10**400}}, "`metrics.char_f1` is no number: '1000000000000000000000000000"),
        ({"base_metrics": [1]}, "`base_metrics` is no object but list"),
        ({"reference_metrics": {"fact_recall": {}}}, "`reference_metrics.fact_recall` is no number: '{}'"),
    ],
)
def test_a_figure_that_is_none_is_told_with_its_line(change: Any, why: str, tmp_path: Path) -> None:
    rows = eval_rows()
    rows[2] |= change
    with pytest.raises(BadRow) as bad:
        read_evaluation(eval_metrics_file(tmp_path, *rows))
    assert bad.value.line == 3
    assert bad.value.reason.startswith(why)


def test_what_another_tool_calls_a_judge_is_passed_over(tmp_path: Path) -> None:
    rows = [row | {"judge": "somebody"} for row in eval_rows()]
    assert described(tmp_path, *rows)["judge"] is None


def test_lines_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = eval_metrics_file(tmp_path, "nonsense", "[" * 100_000, *eval_rows())
    evaluation = read_evaluation(path)
    assert len(evaluation.rows) == 21
    assert evaluation.notes == ["2 lines could not be read and were left out: 1, 2"]


def test_figures_that_are_nan_are_told_and_stand_in_no_mean(tmp_path: Path) -> None:
    rows = eval_rows()
    for row in rows[:2]:
        row["metrics"]["chrf"] = float("nan")
    rows[0]["base_metrics"]["latency_s"] = float("inf")
    evaluation = read_evaluation(eval_metrics_file(tmp_path, *rows))
    assert evaluation.notes == [
        "metrics.chrf is no finite number in 2 rows: left out of its mean",
        "base_metrics.latency_s is no finite number in 1 row: left out of its mean",
    ]
    assert describe(evaluation)["student"]["chrf"]["rows"] == 19


# --- what it tells -------------------------------------------------------------------------------


def test_the_verdict_in_a_word_has_its_tone(tmp_path: Path) -> None:
    rows = eval_rows()
    assert standing(described(tmp_path, *rows)) == ("better than its base", "good")
    assert standing(described(tmp_path, *rows[:3])) == ("too few rows to tell", "")
    assert standing(described(tmp_path, *eval_rows(base=False))) == ("no base to compare with", "info")
    swapped = [row | {"metrics": row["base_metrics"], "base_metrics": row["metrics"]} for row in rows]
    assert standing(described(tmp_path, *swapped)) == ("worse than its base", "bad")
    for row in rows:
        row["metrics"]["fact_recall"] = 0.0
    assert standing(described(tmp_path, *rows)) == ("better than its base, and worse", "warn")
    word, tone = standing(described(tmp_path, *rows) | {"leaked_rows": 3})
    assert word.startswith("tells little") and tone == "bad"


def test_keys_of_the_contract_are_counted_beside_the_base(tmp_path: Path) -> None:
    rows = eval_rows()
    for row in rows[:3]:
        row["base_metrics"] |= {"contract_valid": False, "contract_key": "not JSON"}
    rows[0]["metrics"] |= {"contract_valid": False, "contract_key": "geo.lat"}
    data = described(tmp_path, *rows)
    assert contract_keys(data) == [("geo.lat", "0", "1"), ("not JSON", "3", "0")]
    assert failing(data) == "1 of 21 answers with something wrong: 1 × breaks its contract: geo.lat"
    alone = eval_rows(base=False)
    alone[0]["metrics"] |= {"contract_valid": False, "contract_key": "geo.lat"}
    assert contract_keys(described(tmp_path, *alone)) == [("geo.lat", "–", "1")]


@pytest.mark.usefixtures("no_browser")
def test_the_terminal_tells_what_matters_in_a_few_lines(tmp_path: Path) -> None:
    eval_metrics_file(tmp_path, *eval_rows())
    run = run_stage(eval_report, tmp_path)
    printed = [line for line in run.printed if not line.startswith("hint")]
    assert len(printed) <= 10
    assert "· no answer of 21 has anything wrong" in printed
    assert any(line.endswith("200 tokens an answer") for line in printed)
    assert any(line.startswith(f"report  data{os.sep}report{os.sep}eval-report-") for line in printed)


@pytest.mark.usefixtures("no_browser")
def test_no_spot_name_breaks_the_markdown(tmp_path: Path) -> None:
    from markdown_it import MarkdownIt

    rows = eval_rows(spots=["<b>*钟|山*</b>", "`苏州` [园林](x)"])
    for row in rows:
        row["province"] = "*省*|" if row["type"] == "general" else "江苏省"
        row["metrics"] |= {"prose_valid": False, "problem": "<i>there is no English</i>"}
    eval_metrics_file(tmp_path, *rows)
    run_stage(eval_report, tmp_path)
    text = next((tmp_path / "data/report").glob("*.md")).read_text(encoding="utf-8")
    html = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert "<td>&lt;b&gt;*钟|山*&lt;/b&gt;</td>" in html
    assert "<td>`苏州` [园林](x)</td>" in html
    assert "<td>*省*|</td>" in html
    assert "&lt;i&gt;there is no English&lt;/i&gt;" in html
    tables = html.split("<table>")[1:]
    for table in tables:
        assert len({row.count("<td") for row in table.split("<tr>")[2:]}) == 1


# --- the chart of speed --------------------------------------------------------------------------


def latencies(workspace: Path, *seconds: float) -> dict[str, Any]:
    rows = [{"id": str(place), "metrics": {"latency_s": value}} for place, value in enumerate(seconds)]
    return runtime_figure(read_evaluation(eval_metrics_file(workspace, *rows)))


def test_the_axis_of_latencies_begins_at_zero(tmp_path: Path) -> None:
    low, high = latencies(tmp_path, *[0.40, 0.41, 0.42] * 5)["layout"]["xaxis"]["range"]
    assert low == 0.0 and 0.42 < high < 0.5


def test_one_slow_row_does_not_squeeze_all_others(tmp_path: Path) -> None:
    chart = latencies(tmp_path, *[0.5] * 99, 60.0)
    assert chart["layout"]["xaxis"]["range"][1] < 2
    assert sum(chart["data"][0]["y"]) == 100
    assert any("1 beyond 1.5" in note["text"] for note in chart["layout"]["annotations"])


def test_labels_of_percentiles_stand_at_two_heights_and_inside(tmp_path: Path) -> None:
    chart = latencies(tmp_path, *[0.40, 0.41, 0.42] * 5)
    labels = [note for note in chart["layout"]["annotations"] if note["text"].startswith("p")]
    assert len({note["yshift"] for note in labels}) == 2
    assert {note["xanchor"] for note in labels} == {"right"}


def test_no_file_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there are no eval metrics"):
        run_stage(eval_report, tmp_path)


# --- what a figure is worth ----------------------------------------------------------------------


@pytest.mark.usefixtures("no_browser")
def test_a_killed_evaluation_says_so_before_anything_else(tmp_path: Path) -> None:
    rows = [row | {"of": 30} for row in eval_rows()]
    eval_metrics_file(tmp_path, *rows[:12])
    run = run_stage(eval_report, tmp_path)
    data = report_json(run)
    assert (data["complete"], data["planned_rows"], data["rows"]) == (False, 30, 12)
    assert run.result.summary.startswith("not complete, 12 of 30 rows: ")
    assert standing(data) == ("not complete", "warn")
    assert any(line.startswith("· not complete: 12 of 30 rows") for line in run.printed)


def test_rows_that_could_not_be_asked_make_an_evaluation_no_less_complete(tmp_path: Path) -> None:
    rows = [row | {"of": 13} for row in eval_rows()[:12]]
    whole = described(tmp_path, *rows, {"id": "x", "spot": "西湖", "refused": "too long"})
    assert whole["complete"]


def test_a_share_of_a_batch_is_not_called_a_latency(tmp_path: Path) -> None:
    alone = described(tmp_path, *eval_rows())
    assert [card[0] for card in cards(alone)][-2] == "latency, median"
    rows = eval_rows()
    for row in rows:
        row["metrics"]["batch_rows"] = 8
    shared = described(tmp_path, *rows)
    assert cards(shared)[-2][0] == "seconds a row"
    assert cards(shared)[-2][2] == "of batches of up to 8 rows"
    assert "in batches of up to 8" in str(speed(shared))


def test_a_student_that_is_only_worse_is_not_said_to_beat_anything(tmp_path: Path) -> None:
    rows = eval_rows()
    for row in rows:
        row["metrics"], row["base_metrics"] = row["base_metrics"], row["metrics"]
    assert headline(described(tmp_path, *rows)).startswith("student is worse than its base on ")


def test_a_leak_stands_in_the_headline(tmp_path: Path) -> None:
    data = described(tmp_path, *eval_rows()) | {"leaked_rows": 3}
    assert headline(data).startswith(f"trained on spots of 3 of {data['rows']} rows: student")


@pytest.mark.usefixtures("no_browser")
def test_a_leak_of_another_evaluation_is_not_this_ones(tmp_path: Path) -> None:
    rows = eval_rows()
    eval_metrics_file(tmp_path, *rows)
    other = [
        {
            "id": str(place),
            "messages": [{"role": "user", "content": str(place)}],
            "reference": "",
            "output": "",
            "metrics": {},
            "meta": {},
        }
        for place in range(len(rows))
    ]
    write_lines(tmp_path / "data" / "eval_outputs.jsonl", *other)
    one = made(tmp_path, "eval", state("data/eval_outputs.jsonl", "d"))
    counts = {"rows": len(rows), "leaked": len(rows)}
    manifest.write(one.model_copy(update={"counts": counts}), tmp_path / one.output.path)
    assert report_json(run_stage(eval_report, tmp_path))["leaked_rows"] == 0


def test_several_evaluations_in_one_file_are_told(tmp_path: Path) -> None:
    rows = [row | {"model": "A"} for row in eval_rows()]
    again = [row | {"model": "B"} for row in rows[:2]]
    (note,) = described(tmp_path, *rows, *again)["notes"]
    assert note.endswith(f"as the last: B (2 rows), A ({len(rows) - 2} rows)")


def test_a_base_that_was_asked_some_rows_is_told(tmp_path: Path) -> None:
    rows = eval_rows()
    for row in rows[:2]:
        row["base_metrics"] = None
    (note,) = described(tmp_path, *rows)["notes"]
    assert note.startswith(f"the base was asked {len(rows) - 2} rows of {len(rows)}")
