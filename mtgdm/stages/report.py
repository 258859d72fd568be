"""`mtgdm report`: the metrics of a training run as JSON, Markdown, a page and charts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from mtgdm.errors import SettingError, UserError
from mtgdm.manifest import relative
from mtgdm.reports.settings import ReportSettings
from mtgdm.stage import Context, Input, Output, Result, newest, stage

METRICS = "train-*.metrics.jsonl"


class ReportConfig(ReportSettings):
    """Where the metrics lie and where the report goes."""

    metrics: Path | None = None
    """Metrics file of a run; by default the newest of `--log-dir`."""
    log: Path | None = None
    """Log of a run: its warnings stand in the report, and its metrics file lies beside it."""
    latest: bool = True
    """Take the newest run where neither `--metrics` nor `--log` names one."""
    log_dir: Annotated[Path, Input(newest=METRICS)] = Path("log")
    """Folder of logs and metrics."""
    out_dir: Annotated[Path, Output(newest="train-report-*[0-9].json")] = Path("data/report")
    """Folder of the JSON, the Markdown and the page."""

    def chosen(self) -> Path:
        """The metrics file that is meant."""
        if self.metrics is not None:
            return self.metrics
        if self.log is not None:
            return self.log.with_name(self.log.name.removesuffix(".log") + ".metrics.jsonl")
        return newest(self.log_dir, METRICS)


@stage
def run(config: ReportConfig, context: Context) -> Result:
    """Report on a training run: loss, over- or under-fitting, gradients, speed."""
    from mtgdm.reports.publish import publish, say_where
    from mtgdm.reports.training_report import headline, key_figures, training_report
    from mtgdm.reports.training_run import read_run, read_warnings

    if not config.latest and config.metrics is None and config.log is None:
        raise SettingError("--no-latest needs a run to report on", hint="name one with --metrics or --log")
    metrics = config.chosen()
    if not metrics.is_file():
        raise UserError("there are no training metrics", where=metrics, hint="run `mtgdm train` first")
    training = read_run(metrics)
    log = config.log or metrics.with_name(metrics.name.removesuffix(".metrics.jsonl") + ".log")
    training.warnings = read_warnings(log)
    when = context.started.strftime("%Y-%m-%d %H:%M:%S")
    report = training_report(training, source=relative(metrics, context.workspace), when=when)
    files = publish(
        report,
        context,
        name=f"train-report-{context.timestamp}",
        out_dir=config.out_dir,
        diagrams_dir=config.diagrams_dir,
        chart_timeout_s=config.chart_timeout_s,
        require_png=config.require_png,
    )
    context.terminal.table(["training", "", ""], key_figures(report.data))
    for reason in report.data["reasons"]:
        context.print(f"· {reason}")
    say_where(files, context)
    counts = {
        "steps": training.last_step,
        "logged": len(training.train["step"]),
        "pictures": len(files.pictures),
    }
    return Result(counts=counts, summary=headline(report.data), outputs=[files.json])
