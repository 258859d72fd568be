"""`mtgdm teacher-report`: what a teacher left as JSON, Markdown, a page and charts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from mtgdm import manifest
from mtgdm.reports.settings import ReportSettings
from mtgdm.stage import Context, Input, Output, Result, stage

LOGS = "teacher-*.log"


class TeacherReportConfig(ReportSettings):
    """Where the rows lie and where the report goes."""

    in_: Annotated[Path, Input()] = Field(Path("data/teacher.jsonl"), alias="in")
    """The kept rows; the rejected ones are read from beside them."""
    log: Path | None = None
    """Log that tells the pace; by default all logs of `--log-dir` in which this very teacher was asked."""
    log_dir: Path = Path("log")
    """Folder of the logs."""
    out_dir: Annotated[Path, Output(newest="teacher-report-*[0-9].json")] = Path("data/report")
    """Folder of the JSON, the Markdown and the page."""

    def chosen(self) -> Path:
        """The file of the kept rows."""
        return self.in_

    def inputs(self) -> list[Path]:
        """The kept rows, and the rejected ones where there are any."""
        from mtgdm.teachers.ledger import rejected_path

        found = [path for path in (self.in_, rejected_path(self.in_)) if path.exists()]
        return found or [self.in_]


@stage
def run(config: TeacherReportConfig, context: Context) -> Result:
    """Report on the teacher: what was kept and why not, facts, lengths, pace and tokens."""
    from mtgdm.reports.lineage import trace
    from mtgdm.reports.publish import publish, say_where
    from mtgdm.reports.teacher_pace import read_pace
    from mtgdm.reports.teacher_report import BY_TYPE, headline, key_figures, teacher_report, type_rows
    from mtgdm.reports.teacher_run import read_teacher_run
    from mtgdm.teachers.ledger import rejected_path

    taught = read_teacher_run(config.in_, rejected_path(config.in_), context.domain)
    logs = sorted(config.log_dir.glob(LOGS)) if config.log is None else [config.log]
    made = manifest.read(config.in_) or manifest.read(rejected_path(config.in_))
    report = teacher_report(
        taught,
        read_pace(logs, None if config.log else taught.fingerprints),
        source=manifest.relative(config.in_, context.workspace),
        when=context.started.strftime("%Y-%m-%d %H:%M:%S"),
        complete=made is not None,
        manifests=trace(config.in_, context.workspace),
    )
    files = publish(
        report,
        context,
        kind="teacher",
        out_dir=config.out_dir,
        diagrams_dir=config.diagrams_dir,
        chart_timeout_s=config.chart_timeout_s,
        require_png=config.require_png,
    )
    context.terminal.table(["teacher", "", ""], key_figures(report.data))
    context.terminal.table(BY_TYPE, type_rows(report.data))
    for line in [*report.data["findings"], *taught.notes]:
        context.print(f"· {line}")
    say_where(files, context)
    counts = {"kept": taught.kept, "rejected": taught.rejected, "pictures": len(files.pictures)}
    return Result(counts=counts, summary=headline(report.data), outputs=[files.json])
