"""The JSON of the reports and its published schemas."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from mtgdm.cli import config_schema
from mtgdm.reports.schemas import REPORTS, schema_path, schema_text
from mtgdm.stages.eval_report import run as eval_report
from mtgdm.stages.report import run as train_report
from mtgdm.stages.teacher_report import run as teacher_report
from mtgdm.testing import run as run_stage
from tests import test_teacher_report as teacher_rows
from tests.conftest import CommandLine
from tests.test_lineage import made, state
from tests.test_reports import (
    ODD_EVALUATIONS,
    eval_metrics_file,
    eval_outputs,
    eval_rows,
    no_browser,  # noqa: F401 - a fixture
    report_json,
    train_metrics,
    training_events,
    with_teacher,
)

JUDGE = {
    "by": "judge",
    "against": "base",
    "score": 0.5,
    "student_first": "student",
    "student_second": "other",
}


def check(name: str, report: Any) -> None:
    schema = json.loads(schema_path(name).read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(report)


def undescribed(model: type[BaseModel], value: Any, where: str = "") -> list[str]:
    """The keys of a report that its model says nothing of."""
    found = [f"{where}{key}" for key in value if key not in model.model_fields]
    for key, info in model.model_fields.items():
        if key in value:
            found += _undescribed(info.annotation, value[key], f"{where}{key}.")
    return found


def _undescribed(kind: Any, value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return undescribed(kind, value, where)
    inside = get_args(kind)
    if get_origin(kind) is dict and inside[1] is not Any:
        return [one for key, some in value.items() for one in _undescribed(inside[1], some, f"{where}{key}.")]
    if get_origin(kind) is list:
        return [one for some in value for one in _undescribed(inside[0], some, where)]
    members = [one for one in inside if isinstance(one, type) and issubclass(one, BaseModel)]
    return _undescribed(members[0], value, where) if members else []


@pytest.mark.parametrize("name", REPORTS)
def test_the_schemas_in_the_package_are_those_of_the_models(name: str) -> None:
    written = schema_path(name).read_text(encoding="utf-8")
    assert written == schema_text(name), "python -m mtgdm.reports.schemas writes them anew"


def test_every_report_with_a_schema_can_be_asked_for(mtgdm: CommandLine) -> None:
    hints = typing.get_type_hints(config_schema)
    assert get_args(hints["of"]) == ("profile", *REPORTS)
    assert mtgdm("config", "schema", "eval-report").json["title"] == "EvalReport"
    assert mtgdm("config", "schema").json["title"] == "mtgdm profile"


@pytest.mark.usefixtures("no_browser")
def test_an_eval_report_keeps_its_schema_and_holds_nothing_else(tmp_path: Path) -> None:
    rows = with_teacher(eval_rows())
    for row in rows:
        row["judge"] = JUDGE
    rows[0]["metrics"] |= {
        "contract_valid": False,
        "contract_key": "geo.lat",
        "rouge_l": 0.5,
        "length_ratio": 1.0,
    }
    eval_metrics_file(tmp_path, *rows)
    eval_outputs(tmp_path, rows, torn=False)
    made(tmp_path, "eval", state("data/eval_outputs.jsonl", "d"), state("data/teacher.jsonl", "b"))
    report = report_json(run_stage(eval_report, tmp_path))
    check("eval-report", report)
    assert report["lineage"] and report["judge"] and report["teacher_difference"]
    assert undescribed(REPORTS["eval-report"], report) == []


@pytest.mark.parametrize("name", ODD_EVALUATIONS)
@pytest.mark.usefixtures("no_browser")
def test_odd_evaluations_keep_the_schema_too(name: str, tmp_path: Path) -> None:
    eval_metrics_file(tmp_path, *ODD_EVALUATIONS[name])
    check("eval-report", report_json(run_stage(eval_report, tmp_path)))


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.usefixtures("no_browser")
def test_a_train_report_keeps_its_schema_and_holds_nothing_else(tmp_path: Path, ended: bool) -> None:
    train_metrics(tmp_path, *training_events(ended=ended))
    report = report_json(run_stage(train_report, tmp_path))
    check("train-report", report)
    assert undescribed(REPORTS["train-report"], report) == []


@pytest.mark.usefixtures("no_browser")
def test_a_teacher_report_keeps_its_schema_and_holds_nothing_else(tmp_path: Path) -> None:
    teacher_rows.log(
        tmp_path, "20261123-100000", *(teacher_rows.said("10:00:09,000", number) for number in range(3))
    )
    told: dict[str, Any] = {"facts": {"recall": 0.5, "unsupported": ["1999年"]}}
    rows = [teacher_rows.kept(0), teacher_rows.kept(1, **told)]
    teacher_rows.written(tmp_path, *rows, lost=(teacher_rows.rejected(2),))
    made(tmp_path, "teacher", state("data/teacher.jsonl", "b"), state("data/prompts.jsonl", "a"))
    report = report_json(run_stage(teacher_report, tmp_path))
    check("teacher-report", report)
    assert report["pace"] and report["most_unsupported"] and report["lineage"]
    assert undescribed(REPORTS["teacher-report"], report) == []


def test_a_report_of_another_version_does_not_keep_the_schema(tmp_path: Path) -> None:
    schema = json.loads(schema_path("eval-report").read_text(encoding="utf-8"))
    wrong = {"version": 2, "kind": "eval"}
    messages = [error.message for error in Draft202012Validator(schema).iter_errors(wrong)]
    assert "1 was expected" in messages
    assert "'student' is a required property" in messages
