"""`mtgdm eval-report`: the metrics of an evaluation as JSON, Markdown, a page and charts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from mtgdm import manifest
from mtgdm.errors import SettingError, UserError
from mtgdm.reports.settings import ReportSettings
from mtgdm.stage import Context, Input, Output, Result, stage

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
        return self.metrics if self.metrics is not None else self.newest()[0]

    def newest(self) -> tuple[Path, list[Path]]:
        """The newest evaluation that has rows, and newer ones that have none: they failed, or were killed."""
        from mtgdm.reports.evaluation import newest_with_rows

        return newest_with_rows(self.log_dir, METRICS)


@stage
def run(config: EvalReportConfig, context: Context) -> Result:
    """Report on an evaluation: student against base with intervals, by type, speed, every row to look at."""
    from mtgdm.reports.evaluation import read_evaluation
    from mtgdm.reports.evaluation_report import evaluation_report
    from mtgdm.reports.evaluation_words import headline
    from mtgdm.reports.publish import publish, say_where

    if not config.latest and config.metrics is None:
        raise SettingError("--no-latest needs an evaluation to report on", hint="name one with --metrics")
    metrics, empty = (config.metrics, []) if config.metrics is not None else config.newest()
    if not metrics.is_file():
        hint = "run `mtgdm eval` first" if config.metrics is None else "name a log/eval-*.metrics.jsonl file"
        raise UserError("there are no eval metrics", where=metrics, hint=hint)
    evaluation = read_evaluation(metrics)
    evaluation.notes += [f"{path.name} is newer and holds no row: {metrics.name} was taken" for path in empty]
    report = evaluation_report(
        evaluation,
        source=manifest.relative(metrics, context.workspace),
        outputs=config.eval_outputs,
        workspace=context.workspace,
        leaked_there=_leaked(config.eval_outputs, len(evaluation.rows)),
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
    _tell(report.data, context)
    say_where(files, context)
    counts = {"rows": len(evaluation.rows), "spots": evaluation.spots, "pictures": len(files.pictures)}
    return Result(counts=counts, summary=headline(report.data), outputs=[files.json])


def _tell(data: Mapping[str, Any], context: Context) -> None:
    """What matters, on the terminal."""
    from mtgdm.reports.evaluation_words import against_teacher, failing, judged, short_comparison, speed

    columns = ["metric", "#base", "#student", "95 % interval", "#teacher", "verdict"]
    context.terminal.table(columns, short_comparison(data))
    for line in (failing(data), speed(data), against_teacher(data), judged(data), *data["notes"]):
        if line:
            context.print(f"· {line}")


def _leaked(eval_outputs: Path, rows: int) -> int:
    """The same of an earlier version of mtgdm, whose rows do not say it, as the manifest of the evaluation has it."""
    made = manifest.read(eval_outputs)
    if made is None or made.counts.get("rows") != rows:
        return 0
    return int(made.counts.get("leaked") or 0)
