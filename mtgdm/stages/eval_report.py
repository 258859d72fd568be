"""`mtgdm eval-report`: the metrics of an evaluation as JSON, Markdown, a page and charts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mtgdm import manifest
from mtgdm.errors import SettingError, UserError
from mtgdm.reports.settings import ReportSettings
from mtgdm.stage import Context, Input, Output, Result, newest, stage

METRICS = "eval-*.metrics.jsonl"


class EvalReportConfig(ReportSettings):
    """Where the metrics lie and where the report goes."""

    metrics: Path | None = None
    """Metrics file of an evaluation; by default the newest of `--log-dir`."""
    latest: bool = True
    """Take the newest evaluation where `--metrics` names none."""
    log_dir: Annotated[Path, Input(newest=METRICS)] = Path("log")
    """Folder of logs and metrics."""
    eval_outputs: Path = Path("data/eval_outputs.jsonl")
    """Rows with their texts: examples stand in the page where they are of the same evaluation."""
    out_dir: Annotated[Path, Output(newest="eval-report-*[0-9].json")] = Path("data/report")
    """Folder of the JSON, the Markdown and the page."""

    def chosen(self) -> Path:
        """The metrics file that is meant."""
        return self.metrics if self.metrics is not None else newest(self.log_dir, METRICS)


@stage
def run(config: EvalReportConfig, context: Context) -> Result:
    """Report on an evaluation: student against base with intervals, by type, speed, worst rows."""
    from mtgdm.reports.evaluation import read_evaluation
    from mtgdm.reports.evaluation_report import (
        against_teacher,
        evaluation_report,
        headline,
        judged,
        short_comparison,
    )
    from mtgdm.reports.publish import publish, say_where

    if not config.latest and config.metrics is None:
        raise SettingError("--no-latest needs an evaluation to report on", hint="name one with --metrics")
    metrics = config.chosen()
    if not metrics.is_file():
        raise UserError("there are no eval metrics", where=metrics, hint="run `mtgdm eval` first")
    evaluation = read_evaluation(metrics)
    report = evaluation_report(
        evaluation,
        source=manifest.relative(metrics, context.workspace),
        outputs=config.eval_outputs,
        leaked=evaluation.leaked or _leaked(config.eval_outputs, len(evaluation.rows)),
        when=context.started.strftime("%Y-%m-%d %H:%M:%S"),
    )
    files = publish(
        report,
        context,
        kind="eval",
        out_dir=config.out_dir,
        diagrams_dir=config.diagrams_dir,
        chart_timeout_s=config.chart_timeout_s,
        require_png=config.require_png,
    )
    columns = ["metric", "#base", "#student", "95 % interval", "#teacher", "verdict"]
    context.terminal.table(columns, short_comparison(report.data))
    for line in (against_teacher(report.data), judged(report.data)):
        if line:
            context.print(f"· {line}")
    for note in evaluation.notes:
        context.print(f"· {note}")
    say_where(files, context)
    counts = {"rows": len(evaluation.rows), "spots": evaluation.spots, "pictures": len(files.pictures)}
    return Result(counts=counts, summary=headline(report.data), outputs=[files.json])


def _leaked(eval_outputs: Path, rows: int) -> int:
    """The same of an earlier version of mtgdm, whose rows do not say it, as the manifest of the evaluation has it."""
    made = manifest.read(eval_outputs)
    if made is None or made.counts.get("rows") != rows:
        return 0
    return int(made.counts.get("leaked") or 0)
