"""Spot records to prompts: three a spot, each row already in its split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from mtgdm import rows
from mtgdm.domain import Record
from mtgdm.errors import BadRow, UserError
from mtgdm.stage import Context, Input, Output, Result, StageConfig, stage
from mtgdm.teachers.ledger import LONGEST_PROMPT
from mtgdm.teachers.tokens import prompt_at_most

SHOWN_BAD_LINES = 5
"""So many bad lines are shown one by one; the log has them all."""


class PromptsConfig(StageConfig):
    """Settings of `mtgdm prompts`."""

    spots: Annotated[Path, Input()] = Path("data/curated/spots.jsonl")
    """The spot records, one JSON object a line."""
    out: Annotated[Path, Output()] = Path("data/prompts.jsonl")
    """Where the prompts go."""
    limit: int = Field(0, ge=0)
    """Only the first N spots; 0 takes all."""
    skip_bad: bool = False
    """Leave bad lines out and count them, instead of stopping at the first."""
    val_ratio: float = Field(rows.VAL_RATIO, ge=0, lt=1)
    """Share of the spots that training is checked on."""
    test_ratio: float = Field(rows.TEST_RATIO, ge=0, lt=1)
    """Share of the spots that are kept for the evaluation."""
    seed: int = rows.SPLIT_SEED
    """Seed of the hash that puts a spot into its split."""

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Self:
        if self.val_ratio + self.test_ratio >= 1:
            raise ValueError(
                f"val_ratio {self.val_ratio} and test_ratio {self.test_ratio} leave nothing to train on"
            )
        return self

    def estimate(self) -> dict[str, Any]:
        """How many records there are to read."""
        if not self.spots.is_file():
            return {}
        spots = sum(1 for _ in rows.read_lines(self.spots))
        return {"spots": min(spots, self.limit) if self.limit else spots}


@stage
def run(config: PromptsConfig, context: Context) -> Result:
    """Build the prompts: spot records in, three prompts a spot out, each in its split."""
    skipped: list[BadRow] = []

    def on_bad(bad: BadRow) -> None:
        if not config.skip_bad:
            raise BadRow(
                bad.path,
                bad.line,
                bad.reason,
                hint=bad.hint or "mend the line, or leave bad lines out with --skip-bad",
            )
        skipped.append(bad)
        context.log.warning("skipped %s", bad)
        if len(skipped) <= SHOWN_BAD_LINES:
            context.terminal.warn(f"skipped {bad}")

    from mtgdm.row_ids import IdSet

    counts: Counter[str] = Counter()
    unread = _Unread(context)
    seen = IdSet()
    longest = 0
    splits: dict[str, rows.Split] = {}
    with rows.replace(config.out) as file, context.progress(config.limit or None, "spots") as bar:
        for record in _limited(context.domain.read(config.spots, on_bad), config.limit):
            counts["spots"] += 1
            unread.add(record.unread)
            split = rows.split_of(
                record.name, seed=config.seed, val_ratio=config.val_ratio, test_ratio=config.test_ratio
            )
            splits[record.name] = split
            for prompt in context.domain.prompts(record):
                identity = rows.row_id(prompt.messages)
                if identity in seen:
                    counts["duplicates"] += 1
                    continue
                seen.add(identity)
                longest = max(longest, prompt_at_most(prompt.messages))
                counts["prompts"] += 1
                counts[split] += 1
                meta = {
                    "spot": record.name,
                    "province": record.region,
                    "type": prompt.type,
                    "split": split,
                    "record": record.facts,
                }
                file.write(rows.encode({"id": identity, "messages": prompt.messages, "meta": meta}))
            bar.advance()
        if not counts["prompts"]:
            reason = "no line could be used" if skipped else "there is no record in this file"
            raise UserError(reason, where=config.spots)
    unread.warn()
    _warn_of_near_names(splits, context)
    if len(skipped) > SHOWN_BAD_LINES:
        context.terminal.warn(
            f"and {len(skipped) - SHOWN_BAD_LINES:,} more bad lines, all in {context.log_path('.log')}"
        )
    return Result(
        counts={
            "spots": counts["spots"],
            "prompts": counts["prompts"],
            "train": counts["train"],
            "val": counts["val"],
            "test": counts["test"],
            "duplicates": counts["duplicates"],
            "skipped": len(skipped),
            "unread": unread.fields,
            LONGEST_PROMPT: longest,
        },
        summary=_summary(counts, len(skipped)),
    )


class _Unread:
    """Optional fields that could not be read: their records are kept without them."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._first: BadRow | None = None
        self._records = 0
        self.fields = 0

    def add(self, unread: Sequence[BadRow]) -> None:
        """Count those of one record."""
        for bad in unread:
            self._context.log.warning("left out: %s", bad)
        if unread:
            self._first = self._first or unread[0]
            self._records += 1
            self.fields += len(unread)

    def warn(self) -> None:
        """Say once how many there were."""
        if self._first is None:
            return
        more = "" if self.fields == 1 else f" (all are in {self._context.log_path('.log')})"
        self._context.terminal.warn(
            f"{self.fields:,} fields of {self._records:,} records could not be read and were left out, "
            f"the first: {self._first}{more}"
        )


def _limited(records: Iterator[Record], limit: int) -> Iterator[Record]:
    for number, record in enumerate(records, start=1):
        yield record
        if number == limit:
            return


def _warn_of_near_names(splits: dict[str, rows.Split], context: Context) -> None:
    """西湖 and 西湖风景名胜区 may be one spot, and then it would be trained on and tested."""
    pairs = [
        f"{short} ({splits[short]}) and {long} ({splits[long]})"
        for short, long in pairwise(sorted(splits))
        if long.startswith(short) and splits[short] != splits[long]
    ]
    for pair in pairs:
        context.log.warning("names that begin alike, in different splits: %s", pair)
    if pairs:
        context.terminal.warn(
            f"{len(pairs):,} pairs of spots have names that begin alike and stand in different splits, such as "
            f"{pairs[0]}: give what is one spot one name (all pairs are in the log)"
        )


def _summary(counts: Counter[str], skipped: int) -> str:
    parts = [
        f"{counts['spots']:,} spots → {counts['prompts']:,} prompts",
        f"train {counts['train']:,}, val {counts['val']:,}, test {counts['test']:,}",
    ]
    if counts["duplicates"]:
        parts.append(f"{counts['duplicates']:,} exact duplicates dropped")
    if skipped:
        parts.append(f"{skipped:,} bad lines skipped")
    return " · ".join(parts)
