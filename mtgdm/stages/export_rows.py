"""`mtgdm export`: answered rows as a file of another tool."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mtgdm import rows
from mtgdm.errors import UserError
from mtgdm.stage import Context, Input, Output, Result, StageConfig, stage


class ExportConfig(StageConfig):
    """Settings of `mtgdm export`."""

    in_: Annotated[Path, Input()] = Field(Path("data/teacher.jsonl"), alias="in")
    """The answered rows."""
    out: Annotated[Path, Output()] = Path("data/exported.jsonl")
    """Where they go: `.jsonl` is one row a line, `.json` an array, `.gz` packed, `.parquet` a table."""
    format: Literal["sharegpt", "alpaca", "openai"] = "openai"
    """How the tool that reads them wants a row to look."""
    split: Literal["all", "train", "val", "test"] = "all"
    """Only the rows of this split."""


@stage
def run(config: ExportConfig, context: Context) -> Result:
    """Write answered rows for another tool: ShareGPT, Alpaca or OpenAI fine-tuning files."""
    from mtgdm.foreign_rows import as_format, write_records
    from mtgdm.row_messages import NotARow

    count = 0

    def records() -> Iterator[dict[str, Any]]:
        nonlocal count
        for row in rows.read_rows(config.in_, answered=True):
            if config.split not in ("all", row.split):
                continue
            try:
                record = as_format(row.messages, config.format)
            except NotARow as error:
                raise row.bad(error.reason, hint="--format openai or sharegpt holds it") from error
            count += 1
            yield record

    with rows.replace(config.out) as file:
        write_records(records(), file, config.out.name)
        if not count:
            raise UserError(f"there is no row of the split '{config.split}'", where=config.in_)
    return Result(counts={"rows": count}, summary=f"{count:,} rows as {config.format} in {config.out.name}")
