"""`mtgdm report`: the metrics of a training run as JSON, Markdown, a page and charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mtgdm.errors import SettingError, UserError
from mtgdm.manifest import Manifest, read, relative
from mtgdm.reports.settings import ReportSettings
from mtgdm.stage import TIMESTAMP, Context, Flag, Input, Output, Result, newest, stage

METRICS = "train-*.metrics.jsonl"
SHOWN_SETTINGS = 8
"""So many settings that differ are shown on the terminal; the report has them all."""


class ReportConfig(ReportSettings):
    """Where the metrics lie and where the report goes."""

    metrics: Path | None = None
    """Metrics of a run; by default the newest of `--log-dir`. A trainer_state.json of transformers or a folder of
    its checkpoints will do."""
    log: Path | None = None
    """Log of a run: its warnings stand in the report, and its metrics file lies beside it."""
    latest: bool = True
    """Take the newest run where neither `--metrics` nor `--log` names one."""
    compare: list[Path] = Field(default_factory=list)
    """Metrics of other runs to set beside it, in the forms that `--metrics` takes."""
    log_dir: Annotated[Path, Input(newest=METRICS)] = Path("log")
    """Folder of logs and metrics."""
    checkpoints: Annotated[Path, Flag(hidden=True)] = Path("data/checkpoints")
    """Folder of the checkpoints, whose manifests say what each was trained on."""
    out_dir: Annotated[Path, Output(newest="train-report-*[0-9].json")] = Path("data/report")
    """Folder of the JSON, the Markdown and the page."""

    def inputs(self) -> list[Path]:
        """The metrics files the report is made from."""
        from mtgdm.reports.trainer_state import newest_state

        return [newest_state(path) for path in (self.chosen(), *self.compare)]

    def chosen(self) -> Path:
        """The metrics file that is meant: of several runs the newest that logged a step."""
        if self.metrics is not None:
            return self.metrics
        if self.log is not None:
            return self.log.with_name(self.log.name.removesuffix(".log") + ".metrics.jsonl")
        from mtgdm.reports.training_run import has_steps

        last = newest(self.log_dir, METRICS)
        found = sorted(self.log_dir.glob(METRICS), reverse=True) if last.is_file() else []
        return next((path for path in found if has_steps(path)), last)


@stage
def run(config: ReportConfig, context: Context) -> Result:
    """Report on a training run: loss, over- or under-fitting, gradients, speed."""
    from mtgdm.reports.publish import publish, say_where
    from mtgdm.reports.training_report import (
        COMPARED,
        comparison_rows,
        differing_rows,
        headline,
        key_figures,
        training_report,
    )
    from mtgdm.reports.training_run import read_run, read_warnings

    if not config.latest and config.metrics is None and config.log is None:
        raise SettingError("--no-latest needs a run to report on", hint="name one with --metrics or --log")
    metrics, *others = config.inputs()
    if not metrics.is_file():
        raise UserError("there are no training metrics", where=metrics, hint="run `mtgdm train` first")
    training = read_run(metrics)
    log = config.log or metrics.with_name(metrics.name.removesuffix(".metrics.jsonl") + ".log")
    training.warnings = read_warnings(log)
    if passed_over := _passed_over(config, metrics):
        training.notes.append(f"{passed_over} is newer and logged no step: this is the run before it")
    report = training_report(
        training,
        [read_run(path) for path in others],
        source=relative(training.path, context.workspace),
        when=context.started.strftime("%Y-%m-%d %H:%M:%S"),
        manifests=_lineage(training.path, config.checkpoints, context.workspace),
    )
    files = publish(
        report,
        context,
        kind="train",
        out_dir=config.out_dir,
        diagrams_dir=config.diagrams_dir,
        chart_timeout_s=config.chart_timeout_s,
        require_png=config.require_png,
    )
    context.terminal.table(["training", "", ""], key_figures(report.data))
    for reason in [*report.data["reasons"], *training.notes]:
        context.print(f"· {reason}")
    if others:
        context.terminal.table(COMPARED, comparison_rows(report.data))
        names = [run["name"] for run in report.data["comparison"]["runs"]]
        settings = differing_rows(report.data)
        if settings:
            context.terminal.table(["setting that differs", *names], settings[:SHOWN_SETTINGS])
        else:
            context.print("no setting differs between them")
        if len(settings) > SHOWN_SETTINGS:
            context.print(f"and {len(settings) - SHOWN_SETTINGS} more in the report")
    say_where(files, context)
    counts = {
        "steps": training.last_step,
        "logged": len(training.train["step"]),
        "pictures": len(files.pictures),
    }
    return Result(counts=counts, summary=headline(report.data), outputs=[files.json])


def _passed_over(config: ReportConfig, metrics: Path) -> str:
    """The name of a newer run that holds nothing to report on."""
    last = newest(config.log_dir, METRICS)
    return last.name if config.metrics is None and config.log is None and last != metrics else ""


def _lineage(metrics: Path, checkpoints: Path, workspace: Path) -> Sequence[Manifest]:
    """What the checkpoint of this run was made from: its manifest and the metrics carry the same moment."""
    from mtgdm.reports.lineage import trace

    for path in sorted(checkpoints.glob("*.manifest.json")):
        output = path.with_name(path.name.removesuffix(".manifest.json"))
        made = read(output)
        if (
            made is not None
            and made.stage in metrics.name
            and made.started.strftime(TIMESTAMP) in metrics.name
        ):
            return trace(output, workspace)
    return []
