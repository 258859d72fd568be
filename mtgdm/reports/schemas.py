"""The shape of the reports' JSON, for tools that read it: typed models, and the JSON Schemas made from them.

`python -m mtgdm.reports.schemas` writes the schemas beside this file, where a test compares them with the models.
A key that is added changes no version; `publish.VERSION` is raised where one changes its meaning or goes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from mtgdm.manifest import Manifest
from mtgdm.reports.evaluation import ALIASES, METRICS, SPREADS
from mtgdm.reports.publish import VERSION

if TYPE_CHECKING:
    from typing import TypeAlias

Number = float | None
"""Null where rows are too few to know, or nothing was logged."""
Bounds = Annotated[list[Number], Field(min_length=2, max_length=2)]


class Shape(BaseModel):
    """A part of a report; what a newer version adds is passed over."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Mean(Shape):
    """A mean over rows."""

    mean: Number
    ci95: Bounds
    """95 % confidence interval, low and high."""
    rows: int
    """How many rows have the metric."""


class Spread(Shape):
    """Mean, median and 95th percentile."""

    mean: Number
    p50: Number
    p95: Number


class Difference(Shape):
    """What the student gains over another, row by row."""

    mean: Number
    ci95: Bounds
    verdict: Literal["better", "worse", "too few rows to tell"]


class Finished(Shape):
    """What is told of answers beside their metrics."""

    finish_reasons: dict[str, int] | None = None
    """How the answers ended, and how often."""


if TYPE_CHECKING:
    Figures: TypeAlias = Finished
else:
    # A metric that no row has is left out, so that every key may be missing.
    Figures = create_model(
        "Figures",
        __base__=Finished,
        __doc__="The metrics of one model over some rows.",
        **{one.key: (Mean | None, Field(None, description=one.meaning)) for one in (*METRICS, *ALIASES)},
        **{key: (Spread | None, None) for key in SPREADS},
    )


class Comparison(Shape):
    """Student, base and teacher over the same rows."""

    rows: int
    spots: int
    student: Figures
    base: Figures | None
    """Null where no base was asked."""
    teacher: Figures | None
    """What can be told of the reference itself."""
    difference: dict[str, Difference] | None
    """Student - base, by metric; null without a base."""
    teacher_difference: dict[str, Difference] | None
    """Student - teacher, by metric."""


class Verdict(Shape):
    """The sentence of the report and the metrics it rests on."""

    text: str
    better: list[str]
    worse: list[str]
    unclear: list[str]


class Failures(Shape):
    """What is wrong with the student's answers."""

    rows: int
    """How many answers have something wrong."""
    reasons: dict[str, int]
    """What is wrong, and how often; figures and quoted words are written as `…`."""
    contract_keys: dict[str, int]
    """The first key of the contract that an answer breaks, and how often."""
    base_contract_keys: dict[str, int]
    """The same of the base's answers."""


class WorstRow(Shape):
    """One of the rows with most wrong."""

    id: str
    spot: str | None
    type: str
    char_f1: Number
    why: list[str]


class JudgeScore(Shape):
    """A won pair counts 1, a tie one half."""

    mean: Number
    ci95: Bounds


class Judge(Shape):
    """What a judge said of pairs of answers, each seen in both orders."""

    by: list[str]
    against: list[str]
    pairs: int
    won: int
    ties: int
    lost: int
    score: JudgeScore
    verdict: Literal["better", "worse", "too few rows to tell"]
    same_in_both_orders: Number
    first_preferred: Number


class EvalReport(Comparison):
    """The JSON of `mtgdm eval-report`."""

    version: Literal[1]
    kind: Literal["eval"]
    created: str
    model: str | None
    """Who was evaluated."""
    metrics_file: str
    leaked_rows: int
    """Rows about spots that the student was trained on."""
    refused_rows: int
    """Rows that could not be asked; they stand in no figure."""
    planned_rows: int | None = None
    """How many rows were to be asked; null where the metrics do not say."""
    complete: bool = True
    """Whether all of them were."""
    batch_rows: int | None = None
    """Answers came in batches of at most so many rows, and `latency_s` is a row's share of the time of its batch; null
    where each row has a time of its own."""
    by_type: dict[str, Comparison]
    by_province: dict[str, Comparison]
    judge: Judge | None
    verdict: Verdict
    failures: Failures
    worst_rows: list[WorstRow]
    notes: list[str]
    lineage: list[Manifest]
    """The manifests of the answers and of what they were made from, the nearest first."""


class Steps(Shape):
    """How far a run came."""

    last: int
    total: int | None
    logged: int


class TrainLoss(Shape):
    """The train loss at both ends of a run."""

    first: Number
    final: Number
    min: Number
    reduction: Number
    """Share of the first loss that is gone."""
    not_finite: int


class EvalPoint(Shape):
    """One evaluation on the split val."""

    step: int
    loss: Number
    perplexity: Number


class EvalLoss(Shape):
    """The eval loss over a run."""

    evaluations: int
    first: EvalPoint
    best: EvalPoint | None
    final: EvalPoint
    kept_step: int | None = None
    """The step whose checkpoint was kept, where the run says."""
    gap_to_train: Number


class GradientNorm(Spread):
    """The gradient norms of the logged steps."""

    max: Number
    max_step: int | None
    spikes: int
    clip: Number
    clipped: Number
    """Share of the logged steps that were clipped."""
    not_finite: int
    """How many were logged as NaN or infinite."""


class StepSeconds(Spread):
    """How long a step took."""

    early: Number = None
    """Median of the first fifth of the steps."""
    late: Number = None
    """Median of the last fifth."""
    drift: Number
    """How much longer the last steps took than the first, as a share."""


class Speed(Spread):
    """Tokens a second over the points logged."""

    overall: Number = None
    """All tokens by the time of all steps."""


class LearningRate(Shape):
    """The highest learning rate and the last."""

    max: Number
    max_step: int | None = None
    final: Number


class RunOutcome(Shape):
    """How one of several runs came out."""

    name: str
    metrics_file: str
    verdict: str
    steps: Steps
    final_train_loss: Number
    best_eval: EvalPoint | None
    final_eval: EvalPoint | None
    tokens_per_s: Number
    peak_memory_mib: Number
    seconds: Number


class RunComparison(Shape):
    """Several runs beside each other."""

    runs: list[RunOutcome]
    settings: dict[str, list[Any]]
    """The settings that are not the same in all runs, with their value in each; null where one does not say."""


class TrainReport(Shape):
    """The JSON of `mtgdm report`."""

    version: Literal[1]
    kind: Literal["train"]
    created: str
    metrics_file: str
    verdict: str
    """`healthy`, `over-fitting`, `still improving`, `diverged`, or what else the reasons say."""
    reasons: list[str]
    complete: bool
    """Whether the run came to its end."""
    steps: Steps
    loss: TrainLoss
    eval: EvalLoss | None
    gradient_norm: GradientNorm
    step_seconds: StepSeconds
    tokens_per_s: Speed
    learning_rate: LearningRate
    peak_memory_mib: Number
    seconds: Number
    run: dict[str, Any]
    """What the run wrote down at its start."""
    end: dict[str, Any] | None
    warnings: list[str]
    notes: list[str]
    comparison: RunComparison | None = None
    """Null where one run stands alone."""
    lineage: list[Manifest] = []
    """The manifests of the checkpoint and of what it was made from, the nearest first."""


class Range(Spread):
    """Mean, median, 95th percentile and ends of a figure over rows."""

    rows: int
    min: Number
    max: Number


class Claims(Shape):
    """Claims that the records do not support."""

    rows: int
    """How many rows were checked."""
    rows_with_claims: int
    claims: int


class TeacherType(Shape):
    """What became of the rows of a prompt type, and what the kept answers are like."""

    kept: int
    rejected: int
    repaired: int
    characters: Range
    prompt_tokens: Range
    output_tokens: Range
    fact_recall: Range
    unsupported: Claims


class Teacher(Shape):
    """Who answered, and how many of the kept rows."""

    backend: str
    model: str
    rows: int


class TeacherTokens(Shape):
    """What the kept answers cost."""

    rows: int
    """How many rows say it."""
    prompt: int
    output: int
    prompt_per_row: Number
    output_per_row: Number


class Repairs(Shape):
    """Answers that were kept at the second try."""

    repaired: int
    requests_per_kept_row: Number


class TeacherPace(Shape):
    """How fast the answers came, from the logs."""

    sittings: int
    seconds_worked: Number
    answers: int
    rows_per_minute: Number
    output_tokens_per_s: Number
    prompt_tokens: int
    output_tokens: int
    rejected_output_tokens: int


class UnsupportedRow(Shape):
    """One of the kept rows with most unsupported claims."""

    id: str
    spot: str | None
    type: str
    unsupported: int
    claims: list[str]


class TeacherReport(Shape):
    """The JSON of `mtgdm teacher-report`."""

    version: Literal[1]
    kind: Literal["teacher"]
    created: str
    rows_file: str
    complete: bool
    """Whether every row was asked for."""
    rows: int
    kept: int
    rejected: int
    kept_share: Number
    teachers: list[Teacher]
    all_types: TeacherType
    by_type: dict[str, TeacherType]
    by_split: dict[str, int]
    reasons: dict[str, int]
    """Why rows were rejected, and how often."""
    reasons_by_type: dict[str, dict[str, int]]
    rejected_finish_reasons: dict[str, int]
    tokens: TeacherTokens
    repairs: Repairs
    pace: TeacherPace | None
    """Null where no log tells it."""
    in_flight: Number
    most_unsupported: list[UnsupportedRow]
    notes: list[str]
    findings: list[str]
    """What is worth knowing, in sentences."""
    lineage: list[Manifest]
    """The manifests of the rows and of what they were made from, the latest first."""


REPORTS: dict[str, type[Shape]] = {
    "eval-report": EvalReport,
    "train-report": TrainReport,
    "teacher-report": TeacherReport,
}
"""The reports with a published schema, by their names in `mtgdm config schema`."""


def schema_path(name: str) -> Path:
    """Where the schema of a report lies in the package."""
    return Path(__file__).with_name(f"{name}.schema.json")


def schema_text(name: str) -> str:
    """The JSON Schema of a report, made from its model."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:mtgdm:{name}:{VERSION}",
        **REPORTS[name].model_json_schema(),
    }
    return json.dumps(schema, ensure_ascii=False, indent=2) + "\n"


if __name__ == "__main__":
    for report in REPORTS:
        schema_path(report).write_text(schema_text(report), encoding="utf-8", newline="\n")
