"""An evaluation as its metrics file tells it: which rows, and the metrics of student, base and teacher."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from mtgdm.errors import BadRow, UserError
from mtgdm.rows import is_manifest, read_lines
from mtgdm.scoring import failures
from mtgdm.terminal import counted

Who = Literal["student", "base", "teacher"]


@dataclass(frozen=True)
class Metric:
    """A quality metric: its key in the rows and how people read it."""

    key: str
    label: str
    meaning: str
    lower_is_better: bool = False
    charted: bool = True
    counts: bool = False
    """Whether a row's value may be more than 1."""


METRICS = (
    Metric("char_f1", "character F1", "shared characters with the reference, order ignored"),
    Metric("sequence_ratio", "sequence ratio", "longest common subsequence with the reference; ROUGE-L"),
    Metric("chrf", "chrF", "shared character n-grams with the reference"),
    Metric("exact_match", "exact match", "the reference, character for character"),
    Metric("contract_valid", "contract valid", "JSON answers that keep their contract; prose has none"),
    Metric("prose_valid", "prose valid", "prose that keeps the rules of its type"),
    Metric("language_ok", "right language", "answers in the script or the languages that their type wants"),
    Metric("fact_recall", "fact recall", "facts of the record that the answer states"),
    Metric(
        "unsupported_facts",
        "unsupported facts",
        "claims a row that the record does not support",
        True,
        counts=True,
    ),
    Metric("repetition", "repetition", "share of the text that stood in it before", True, charted=False),
)
ALIASES = (Metric("rouge_l", "ROUGE-L", "the sequence ratio under the name that many look for"),)
"""In the figures for other tools, but in no table: a second name is no second reason."""
SPREADS = ("latency_s", "tokens_per_s", "prompt_tokens", "output_tokens", "length_ratio")
"""What has no better and worse: told by mean, median and 95th percentile."""
_NUMBERS = frozenset([*(metric.key for metric in (*METRICS, *ALIASES)), *SPREADS])
_PARTS = ("metrics", "base_metrics", "reference_metrics")
_SHOWN_LINES = 5
_JUDGED = {"score", "student_first", "student_second"}


@dataclass(frozen=True)
class EvalRow:
    """One evaluated row: what it is about, and the metrics of student and base.

    Figures are finite numbers or None; what was NaN in the file is None.
    """

    id: str
    spot: str | None
    province: str | None
    type: str
    student: dict[str, Any]
    base: dict[str, Any] | None
    teacher: dict[str, Any] | None = None
    """What can be told of the reference itself; None in files of earlier versions."""
    judge: dict[str, Any] | None = None
    leaked: bool = False

    def of(self, who: Who) -> dict[str, Any]:
        """The metrics of the student, its base or its teacher."""
        found: dict[str, Any] | None = getattr(self, who)
        return found or {}

    @property
    def unit(self) -> str:
        """What is resampled: the spot, or the row where no spot is named."""
        return self.spot or self.id

    @cached_property
    def why_bad(self) -> list[str]:
        """What is wrong with the answer, in words; nothing where it is as it should be."""
        return failures.why_bad(self.student, self.teacher)

    @cached_property
    def badness(self) -> float:
        """How much is wrong with the answer."""
        return failures.badness(self.student, self.teacher)

    @cached_property
    def gain(self) -> float | None:
        """How much less is wrong with the answer than with the base's; None without a base."""
        return None if self.base is None else failures.badness(self.base, self.teacher) - self.badness


@dataclass
class Evaluation:
    """The rows of one metrics file, in the order in which they were evaluated."""

    path: Path
    rows: list[EvalRow] = field(default_factory=list)
    refused: int = 0
    """Rows that could not be asked."""
    models: list[str] = field(default_factory=list)
    """Who was evaluated: one, where nobody put files together."""
    planned: int | None = None
    """How many rows were to be asked; None in files of earlier versions."""
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every row was asked that was to be."""
        return self.planned is None or len(self.rows) + self.refused >= self.planned

    @property
    def batch_rows(self) -> int | None:
        """The largest batch that answers came in, whose time its rows share; None where each has its own."""
        sizes = [int(size) for row in self.rows if isinstance(size := row.student.get("batch_rows"), int)]
        return most if (most := max(sizes, default=1)) > 1 else None

    @property
    def spots(self) -> int:
        """How many spots the rows are about."""
        return len({row.spot for row in self.rows if row.spot})

    @property
    def leaked(self) -> int:
        """How many rows are about spots that the student was trained on."""
        return sum(row.leaked for row in self.rows)

    @property
    def compared(self) -> bool:
        """Whether any row has metrics of the base."""
        return any(row.base is not None for row in self.rows)

    def of_type(self, name: str) -> list[EvalRow]:
        """The rows of one prompt type."""
        return [row for row in self.rows if row.type == name]


def read_evaluation(path: Path) -> Evaluation:
    """Read a metrics file; a row that stands twice counts once, what a kill left torn is noted.

    Raises BadRow where a figure is no number, UserError where no row was evaluated.
    """
    evaluation = Evaluation(path)
    rows: dict[str, EvalRow] = {}
    refused: set[str] = set()
    models: dict[str, str] = {}
    unreadable: list[int] = []
    not_finite: Counter[str] = Counter()
    line = 0
    for line, value in _values(path):
        if value is None:
            unreadable.append(line)
        elif _is_evaluated(value):
            row = _row(value, path, line)
            not_finite.update(_not_finite(value))
            rows[row.id] = row
            if model := _text(value.get("model")):
                models[row.id] = model
            if isinstance(of := value.get("of"), int):
                evaluation.planned = of
        elif isinstance(value, dict) and "refused" in value:
            refused.add(str(value.get("id")))
    evaluation.rows, evaluation.models = list(rows.values()), list(dict.fromkeys(models.values()))
    evaluation.refused = len(refused - rows.keys())
    if not rows:
        raise _no_row(path, line, len(unreadable), len(refused))
    if not evaluation.complete:
        evaluation.notes.append(
            f"not complete: {len(rows):,} of {evaluation.planned:,} rows. A student in this process is asked the "
            "longest prompts first, so these are no fair sample: run the evaluation to its end"
        )
    if len(evaluation.models) > 1:
        each = ", ".join(
            f"{name} ({counted(count, 'row')})" for name, count in Counter(models.values()).items()
        )
        evaluation.notes.append(
            f"several evaluations stand in this file, a row that stands twice as the last: {each}"
        )
    compared = sum(row.base is not None for row in evaluation.rows)
    if 0 < compared < len(rows):
        evaluation.notes.append(
            f"the base was asked {counted(compared, 'row')} of {len(rows):,}: its means are over these, "
            "differences over the pairs"
        )
    evaluation.notes += _unreadable(unreadable, line)
    evaluation.notes += [
        f"{name} is no finite number in {counted(count, 'row')}: left out of its mean"
        for name, count in not_finite.items()
    ]
    return evaluation


def newest_with_rows(folder: Path, pattern: str) -> tuple[Path, list[Path]]:
    """The newest metrics file of a folder that holds a row, and the newer ones, which hold none.

    Where none holds any, the newest; where there is no file, the pattern's own path.
    """
    files = [path for path in folder.glob(pattern) if not is_manifest(path)] if folder.is_dir() else []
    files.sort(reverse=True)
    for place, path in enumerate(files):
        if any(_is_evaluated(value) for _, value in _values(path)):
            return path, files[:place]
    return (files[0] if files else folder / pattern), []


def values_of(rows: Iterable[EvalRow], key: str, who: Who = "student") -> list[float]:
    """The values of a metric over the rows that have it."""
    # attrgetter, because this is gone through some hundred times where the rows are a hundred thousand.
    return [
        value
        for metrics in map(attrgetter(who), rows)
        if metrics is not None and (value := metrics.get(key)) is not None
    ]


def worst(rows: Sequence[EvalRow], most: int = 10) -> list[EvalRow]:
    """The rows with most wrong in them."""
    return sorted((row for row in rows if row.why_bad), key=lambda row: -row.badness)[:most]


def label(key: str) -> str:
    """How people read a metric's key."""
    return next((metric.label for metric in METRICS if metric.key == key), key)


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """The lines of a file as JSON values; None for what cannot be read."""
    for line, text in read_lines(path):
        try:
            yield line, json.loads(text)
        except (ValueError, RecursionError):
            yield line, None


def _is_evaluated(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("metrics"), dict)


def _no_row(path: Path, lines: int, unreadable: int, refused: int) -> UserError:
    """The error of a file without an evaluated row."""
    again = "run `mtgdm eval` again"
    if refused:
        return UserError(f"no row was evaluated, {refused:,} could not be asked", where=path, hint=again)
    if not lines:
        return UserError("the file is empty: no row was evaluated", where=path, hint=again)
    if lines == unreadable:
        return UserError("no row was evaluated: no line of this can be read", where=path, hint=again)
    return UserError("this holds no eval metrics", where=path, hint="name a log/eval-*.metrics.jsonl file")


def _unreadable(lines: Sequence[int], last: int) -> list[str]:
    if not lines:
        return []
    if lines == [last]:
        return [f"the last line ({last:,}) is torn and was left out: eval was killed while writing"]
    some = ", ".join(f"{line:,}" for line in lines[:_SHOWN_LINES]) + (
        ", …" if len(lines) > _SHOWN_LINES else ""
    )
    return [f"{len(lines):,} lines could not be read and were left out: {some}"]


def _row(value: Mapping[str, Any], path: Path, line: int) -> EvalRow:
    student, base, teacher = (_metrics(value.get(name), name, path, line) for name in _PARTS)
    assert student is not None
    return EvalRow(
        id=str(value.get("id") or f"line {line}"),
        spot=_text(value.get("spot")),
        province=_text(value.get("province")),
        type=_text(value.get("type")) or "untyped",
        student=student,
        base=base,
        teacher=teacher,
        judge=_judge(value.get("judge"), path, line),
        leaked=value.get("leaked") is True,
    )


def _metrics(metrics: Any, name: str, path: Path, line: int) -> dict[str, Any] | None:
    """Metrics as a file holds them; BadRow where they are no object, or what is reported is no number."""
    if metrics is None:
        return None
    if not isinstance(metrics, dict):
        raise BadRow(path, line, f"`{name}` is no object but {type(metrics).__name__}")
    for key in _NUMBERS & metrics.keys():
        if metrics[key] is not None and not _is_number(metrics[key]):
            raise BadRow(path, line, f"`{name}.{key}` is no number: {str(metrics[key])[:40]!r}")
    return without_nan(metrics)


def without_nan(metrics: dict[str, Any]) -> dict[str, Any]:
    """The same metrics where all are finite, else a copy with None for those that are not."""
    unknown = _unknown(metrics)
    return metrics | dict.fromkeys(unknown) if unknown else metrics


def _not_finite(value: Mapping[str, Any]) -> list[str]:
    """The figures of a line that are NaN or infinite, as `metrics.chrf`."""
    return [f"{name}.{key}" for name in _PARTS for key in _unknown(value.get(name) or {})]


def _unknown(metrics: Mapping[str, Any]) -> list[str]:
    return [key for key, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]


def _judge(judge: Any, path: Path, line: int) -> dict[str, Any] | None:
    """What a judge said, None where another tool's word stands there."""
    if not isinstance(judge, dict) or not judge.keys() >= _JUDGED:
        return None
    score = judge["score"]
    if not _is_number(score) or not 0 <= score <= 1:
        raise BadRow(path, line, f"`judge.score` is no number from 0 to 1: {str(score)[:40]!r}")
    return judge


def _is_number(value: Any) -> bool:
    """Whether a value is a number that a float can hold, NaN and the infinities among them."""
    return isinstance(value, float | bool) or (isinstance(value, int) and abs(value) < 10**300)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
