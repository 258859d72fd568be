"""`mtgdm eval-report`: the metrics of an evaluation as JSON, Markdown, a page and charts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mtgdm import manifest
from mtgdm.errors import SettingError, UserError
from mtgdm.stage import Context, Input, Output, Result, Runtime, StageConfig, newest, stage

METRICS = "eval-*.metrics.jsonl"


class EvalReportConfig(StageConfig):
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
    diagrams_dir: Path = Path("data/diagrams")
    """Folder of the charts."""
    require_png: Annotated[bool, Runtime()] = False
    """Fail where the charts cannot be drawn as PNG (no browser, say); otherwise it is a hint."""
    chart_timeout_s: Annotated[float, Runtime()] = Field(120.0, gt=0)
    """Longest time the browser may take to draw the charts."""

    def inputs(self) -> list[Path]:
        """The one metrics file the report is made from."""
        return [self.chosen()]

    def chosen(self) -> Path:
        """The metrics file that is meant."""
        return self.metrics if self.metrics is not None else newest(self.log_dir, METRICS)


@stage
def run(config: EvalReportConfig, context: Context) -> Result:
    """Report on an evaluation: student against base with intervals, by type, speed, worst rows."""
    from mtgdm.reports.evaluation import read_evaluation
    from mtgdm.reports.evaluation_report import comparison, evaluation_report, headline
    from mtgdm.reports.publish import publish, say_where

    if not config.latest and config.metrics is None:
        raise SettingError("--no-latest needs an evaluation to report on", hint="name one with --metrics")
    metrics = config.chosen()
    if not metrics.is_file():
        raise UserError("there are no eval metrics", where=metrics, hint="run `mtgdm eval` first")
    evaluation = read_evaluation(metrics)
    report = evaluation_report(
        evaluation,
        model=_model(config.eval_outputs),
        source=manifest.relative(metrics, context.workspace),
        outputs=config.eval_outputs,
        when=context.started.strftime("%Y-%m-%d %H:%M:%S"),
    )
    files = publish(
        report,
        context,
        name=f"eval-report-{context.timestamp}",
        out_dir=config.out_dir,
        diagrams_dir=config.diagrams_dir,
        chart_timeout_s=config.chart_timeout_s,
        require_png=config.require_png,
    )
    columns = ["metric", "base", "student", "student − base", "verdict"]
    context.terminal.table(columns, comparison(report.data))
    for note in evaluation.notes:
        context.print(f"· {note}")
    say_where(files, context)
    counts = {"rows": len(evaluation.rows), "spots": evaluation.spots, "pictures": len(files.pictures)}
    return Result(counts=counts, summary=headline(report.data), outputs=[files.json])


def _model(eval_outputs: Path) -> str | None:
    """The model that was evaluated, as the manifest of its outputs has it."""
    made = manifest.read(eval_outputs)
    if made is None:
        return None
    named = made.settings.get("model")
    if named is not None and named.value:
        return str(named.value)
    return next((state.path for state in made.inputs if "checkpoints" in state.path), None)
