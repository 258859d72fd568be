"""Rows to examples: tokenised, guarded, measured, and shown as the student will see them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Literal

from mtgdm.errors import UserError
from mtgdm.rows import Row, Split, read_rows, split_of
from mtgdm.student.chat import IGNORED, Chat, ChatProblem, Encoded, has_thoughts, without_thoughts

TooLong = Literal["error", "drop", "truncate"]
Thoughts = Literal["auto", "keep", "drop"]

LENGTH_COLUMNS = ("", "#rows", "#min", "#median", "#mean", "#p95", "#max", "#sum")


@dataclass(frozen=True)
class Example:
    """A row, or one turn of it, to train on or to measure the loss on."""

    row: Row
    tokens: Encoded

    @property
    def length(self) -> int:
        """All its tokens."""
        return len(self.tokens.ids)


@dataclass(frozen=True)
class Fitted:
    """The examples that fit, and how many were dropped or cut."""

    examples: list[Example]
    dropped: int = 0
    truncated: int = 0


def read_splits(path: Path, val_ratio: float) -> dict[Split, list[Row]]:
    """The rows by split; a spot in two splits, an empty file and a file without `train` stop the run."""
    found: dict[Split, list[Row]] = {"train": [], "val": [], "test": []}
    of_spot: dict[str, set[Split]] = {}
    of_id: dict[str, set[Split]] = {}
    for row in read_rows(path, answered=True):
        split = _split_of(row, val_ratio)
        found[split].append(row)
        of_id.setdefault(row.id, set()).add(split)
        if row.spot is not None:
            of_spot.setdefault(row.spot, set()).add(split)
    both = sorted(spot for spot, splits in of_spot.items() if len(splits) > 1)
    if both:
        raise UserError(
            f"{len(both):,} spots stand in more than one split, so what is checked would have been trained on: "
            f"{'、'.join(both[:3])}{' …' if len(both) > 3 else ''}",
            where=path,
            hint="the split hangs on the spot: make the prompts again with `mtgdm prompts`",
        )
    twice = sum(len(splits) > 1 for splits in of_id.values())
    if twice:
        raise UserError(
            f"{twice:,} prompts stand in more than one split, so what is checked would have been trained on",
            where=path,
            hint="the split hangs on the spot: make the prompts again with `mtgdm prompts`",
        )
    if not any(found.values()):
        raise UserError("there are no rows", where=path, hint="run `mtgdm teacher` first")
    if not found["train"]:
        raise UserError(
            f"none of the {sum(map(len, found.values())):,} rows is in the split `train`",
            where=path,
            hint="more spots, or smaller ratios for val and test in `mtgdm prompts`",
        )
    return found


def _split_of(row: Row, val_ratio: float) -> Split:
    if row.meta.get("split") in ("train", "val", "test"):
        return row.split
    return split_of(row.spot or row.id, val_ratio=val_ratio)


def decide_thoughts(
    split: Mapping[Split, list[Row]], wanted: Thoughts
) -> tuple[dict[Split, list[Row]], bool]:
    """The rows as they are trained, and whether the student writes its thoughts before an answer.

    It does where the answers trained on come with thoughts, in their text or as `reasoning_content`. Answers of
    both kinds stop the run under `auto`.
    """
    if wanted == "drop":
        return {name: [_thoughtless(row) for row in rows] for name, rows in split.items()}, False
    looked_at = [*split["train"], *split["val"]]
    thinking = [row for row in looked_at if any(map(has_thoughts, row.messages))]
    if wanted == "auto" and thinking and len(thinking) < len(looked_at):
        raise thinking[0].bad(
            f"this answer comes with thoughts, as {len(thinking):,} of {len(looked_at):,} do",
            hint="--thoughts drop leaves the thoughts out; --thoughts keep trains them, and an empty thought "
            "where there is none",
        )
    return dict(split), bool(thinking) or wanted == "keep"


def _thoughtless(row: Row) -> Row:
    return replace(row, messages=[without_thoughts(message) for message in row.messages])


def encode_rows(rows: Sequence[Row], chat: Chat) -> list[Example]:
    """Every row as tokens; a row without a trained token or without an end of turn stops the run.

    A row of several answers makes several examples where the template writes earlier answers in another way.
    """
    try:
        encoded = list(chat.encode_each([row.messages for row in rows]))
    except ChatProblem:
        encoded = [_encode_alone(row, chat) for row in rows]
    examples = [
        Example(row, tokens) for row, several in zip(rows, encoded, strict=True) for tokens in several
    ]
    for example in examples:
        _guard(example, chat)
    return examples


def _encode_alone(row: Row, chat: Chat) -> list[Encoded]:
    try:
        return next(chat.encode_each([row.messages]))
    except ChatProblem as problem:
        raise row.bad(problem.message, hint=problem.hint) from problem


def _guard(example: Example, chat: Chat) -> None:
    trained = [label for label in example.tokens.labels if label != IGNORED]
    if len(trained) < 2:
        raise example.row.bad("no token of the answer would be trained")
    if trained[-1] != chat.end_of_turn:
        raise example.row.bad("the end-of-turn token would not be trained")


def fit(examples: Sequence[Example], max_len: int, too_long: TooLong) -> Fitted:
    """Examples of at most `max_len` tokens; a cut row keeps its beginning and loses its end of turn."""
    long = [example for example in examples if example.length > max_len]
    if not long:
        return Fitted(list(examples))
    if too_long == "error":
        longest = max(example.length for example in long)
        raise UserError(
            f"{len(long):,} of {len(examples):,} rows are longer than --max-len {max_len:,}: the longest has "
            f"{longest:,} tokens",
            where=f"{long[0].row.path}:{long[0].row.line}",
            hint=f"--max-len {longest} takes them whole; --too-long drop leaves them out, truncate cuts them",
        )
    if too_long == "drop":
        return Fitted([example for example in examples if example.length <= max_len], dropped=len(long))
    cut = [_cut(example, max_len) for example in examples]
    kept = [example for example in cut if example.tokens.trained > 0]
    dropped = len(cut) - len(kept)
    return Fitted(kept, dropped=dropped, truncated=len(long) - dropped)


def _cut(example: Example, max_len: int) -> Example:
    return Example(example.row, Encoded(example.tokens.ids[:max_len], example.tokens.labels[:max_len]))


def length_table(splits: Mapping[str, Sequence[Example]]) -> list[list[str]]:
    """Tokens a row, of all and of those trained, as rows of LENGTH_COLUMNS."""
    table = []
    for split, examples in splits.items():
        if not examples:
            continue
        table.append(_measured(f"{split}: tokens", [example.length for example in examples]))
        table.append(_measured(f"{split}: trained", [example.tokens.trained for example in examples]))
    return table


def _measured(name: str, lengths: list[int]) -> list[str]:
    p95 = sorted(lengths)[min(len(lengths) - 1, int(0.95 * len(lengths)))]
    numbers = (len(lengths), min(lengths), median(lengths), fmean(lengths), p95, max(lengths), sum(lengths))
    return [name, *(f"{number:,.0f}" for number in numbers)]


def shown(examples: Sequence[Example], chat: Chat) -> Iterator[str]:
    """Rows token by token, `|` between the tokens: lines with `+` are trained, those with `-` only read."""
    for example in examples:
        row = example.row
        about = " · ".join(part for part in (row.id, row.spot, row.type) if part)
        yield f"row {about}: {example.length:,} tokens, {example.tokens.trained:,} trained"
        for trained, ids in _runs(example.tokens):
            yield f"  {'+' if trained else '-'} {'|'.join(chat.pieces(ids))}"


def _runs(tokens: Encoded) -> Iterator[tuple[bool, list[int]]]:
    run: list[int] = []
    state = False
    for number, label in zip(tokens.ids, tokens.labels, strict=True):
        trained = label != IGNORED
        if run and trained != state:
            yield state, run
            run = []
        state = trained
        run.append(number)
    if run:
        yield state, run
