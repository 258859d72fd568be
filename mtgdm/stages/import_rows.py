"""`mtgdm import`: rows of a file of another tool."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mtgdm import rows
from mtgdm.errors import BadRow, UserError
from mtgdm.stage import Context, Input, Output, Result, StageConfig, stage

SHOWN_BAD_ROWS = 5
"""So many bad rows are shown one by one; the log has them all."""


class ImportConfig(StageConfig):
    """Settings of `mtgdm import`."""

    in_: Annotated[Path, Input()] = Field(Path("rows.json"), alias="in")
    """The file: ShareGPT, Alpaca, OpenAI or pairs; JSON lines, an array, CSV or Parquet; also gzip and UTF-16."""
    out: Annotated[Path, Output()] = Path("data/imported.jsonl")
    """Where the rows go; `mtgdm train --in` reads them."""
    skip_bad: bool = False
    """Leave out what is no row and count it, instead of stopping at the first."""


@stage
def run(config: ImportConfig, context: Context) -> Result:
    """Make rows of a file of another tool: ShareGPT, Alpaca, OpenAI, pairs of texts, Parquet."""
    from mtgdm.foreign_rows import messages_of, read_records
    from mtgdm.row_messages import NotARow

    counts: Counter[str] = Counter()
    ignored: Counter[str] = Counter()
    seen: set[bytes] = set()
    with rows.replace(config.out) as file:
        for number, record in read_records(config.in_):
            counts["read"] += 1
            try:
                messages = messages_of(record, ignored)
            except NotARow as error:
                bad = BadRow(config.in_, number, error.reason, hint=error.hint)
                if not config.skip_bad:
                    hint = error.hint or "mend the row, or leave such rows out with --skip-bad"
                    raise BadRow(config.in_, number, error.reason, hint=hint) from error
                counts["skipped"] += 1
                context.log.warning("skipped %s", bad)
                if counts["skipped"] <= SHOWN_BAD_ROWS:
                    context.warn(f"skipped {bad}")
                continue
            line = rows.encode(_row(record, messages))
            if (digest := _digest(line)) in seen:
                counts["duplicates"] += 1
                continue
            seen.add(digest)
            file.write(line)
            counts["rows"] += 1
        if not counts["rows"]:
            raise UserError("no row could be made of this file", where=config.in_)
    if ignored:
        keys = ", ".join(f"`{key}` ({times:,})" for key, times in ignored.most_common(8))
        context.print(f"keys that say nothing to a training were left out: {keys}")
    named = ("read", "rows", "duplicates", "skipped")
    return Result(counts={name: counts[name] for name in named}, summary=_summary(counts, config.out.name))


def _row(record: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    meta = record.get("meta")
    return {"id": rows.row_id(messages), "messages": messages, "meta": meta if isinstance(meta, dict) else {}}


def _digest(line: bytes) -> bytes:
    from hashlib import blake2b

    return blake2b(line, digest_size=16).digest()


def _summary(counts: Counter[str], name: str) -> str:
    parts = [f"{counts['read']:,} read → {counts['rows']:,} rows in {name}"]
    if counts["duplicates"]:
        parts.append(f"{counts['duplicates']:,} exact duplicates dropped")
    if counts["skipped"]:
        parts.append(f"{counts['skipped']:,} skipped")
    return " · ".join(parts)
