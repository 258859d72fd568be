"""The eval report: what an evaluation comes to, told as JSON, Markdown, page and charts."""

from __future__ import annotations

from pathlib import Path

from mtgdm.manifest import relative
from mtgdm.reports.evaluation import Evaluation
from mtgdm.reports.evaluation_markdown import in_markdown
from mtgdm.reports.evaluation_page import body
from mtgdm.reports.evaluation_quality import quality_figure
from mtgdm.reports.evaluation_rows import RowsOfPage, rows_of_page
from mtgdm.reports.evaluation_runtime import runtime_figure
from mtgdm.reports.evaluation_summary import describe
from mtgdm.reports.lineage import trace
from mtgdm.reports.publish import Report
from mtgdm.terminal import counted

QUESTIONS = {
    "quality": (
        "How good are the answers?",
        "Means with their 95 % intervals. Rows of one spot rise and fall together, so whole spots are resampled.",
    ),
    "runtime": ("How fast do they come?", "Latency, throughput and length of the answers, row by row."),
}


def evaluation_report(
    evaluation: Evaluation, *, source: str, outputs: Path, workspace: Path, leaked_there: int, when: str
) -> Report:
    """The report of one evaluation.

    Texts of rows, the name of the model and what it was made from come from `outputs` where it holds the
    same rows; so does `leaked_there`, how many rows there are about spots the student was trained on, where the
    metrics themselves do not tell.
    """
    rows = rows_of_page(evaluation, outputs)
    same = rows.texts == len(evaluation.rows)
    made = trace(outputs, workspace) if same else []
    leaked = evaluation.leaked or (leaked_there if same else 0)
    _add_notes(evaluation, rows, leaked, workspace)
    figures = describe(evaluation)
    data = {
        "kind": "eval",
        "created": when,
        "model": " and ".join(evaluation.models or rows.models) or None,
        "metrics_file": source,
        "leaked_rows": leaked,
        "refused_rows": evaluation.refused,
        **figures,
        "lineage": [one.model_dump(mode="json") for one in made],
    }
    title = f"Eval report · {when}"
    return Report(
        title=title,
        data=data,
        markdown=lambda links: in_markdown(title, data, made, QUESTIONS, links),
        body=body(data, rows, made, QUESTIONS, when=when, outputs=relative(outputs, workspace)),
        charts={"quality": quality_figure(evaluation, figures), "runtime": runtime_figure(evaluation)},
        page_charts={
            "quality-narrow": quality_figure(evaluation, figures, narrow=True),
            "runtime-narrow": runtime_figure(evaluation, narrow=True),
        },
    )


def _add_notes(evaluation: Evaluation, rows: RowsOfPage, leaked: int, workspace: Path) -> None:
    notes = evaluation.notes
    if leaked:
        notes.insert(
            0,
            f"{counted(leaked, 'row')} of {len(evaluation.rows):,} are about spots the student was trained on: "
            "the figures say little about spots it does not know",
        )
    if evaluation.refused:
        notes.append(f"{counted(evaluation.refused, 'row')} could not be asked and stand in no figure")
    if rows.problem:
        bad = rows.problem
        place = f"{relative(bad.path, workspace)}:{bad.line}"
        notes.append(f"{place}: {bad.reason}; the texts of rows from there on are missing")
