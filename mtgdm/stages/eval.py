"""The student, and with --compare-base its base model, on spots it has never seen."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from mtgdm import manifest, rows
from mtgdm.checkpoints import chosen_checkpoint, newest_checkpoint
from mtgdm.domain import Domain, answer_problem
from mtgdm.errors import BadRow, UserError
from mtgdm.manifest import settings_digest
from mtgdm.rows import Journal, Row
from mtgdm.stage import Context, Flag, Input, Output, Result, Runtime, StageConfig, stage

if TYPE_CHECKING:
    from mtgdm.student.generation import Answer
    from mtgdm.terminal import Progress

Metrics = dict[str, Any]

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


class EvalConfig(StageConfig):
    """Settings of `mtgdm eval`."""

    model: str | None = None
    """The student: a checkpoint folder, a model folder or a Hub id; by default the newest checkpoint."""
    test: Annotated[Path, Input()] = Path("data/teacher.jsonl")
    """Rows with the teacher's answers, which are the reference."""
    split: Literal["train", "val", "test"] = "test"
    """Which rows of the file are asked."""
    out: Annotated[Path, Output()] = Path("data/eval_outputs.jsonl")
    """Where the answers and their metrics go."""
    compare_base: bool = False
    """Ask the base model of the checkpoint too."""
    allow_leak: bool = False
    """Ask rows whose spot the student was trained on."""
    limit: int = Field(0, ge=0)
    """Only the first N rows; 0 asks all."""
    overwrite: Annotated[bool, Runtime()] = False
    """Start anew instead of going on."""
    log_every: Annotated[int, Runtime()] = Field(10, ge=1)
    """A line in the log every so many rows."""
    device_mode: Literal["cuda0", "auto", "cpu"] = "auto"
    """First GPU, what there is, or the CPU."""
    load_in_4bit: bool = False
    """Hold the base in 4-bit NF4."""
    max_new_tokens: int = Field(0, ge=0)
    """Most tokens of an answer; 0 allows a quarter more than the longest reference has."""
    batch: Annotated[int, Runtime()] = Field(16, ge=1)
    """Rows generated at once; halved where memory runs out."""
    checkpoints: Annotated[Path, Flag(hidden=True)] = Path("data/checkpoints")
    """Where the newest checkpoint is looked for."""

    def resolved(self, workspace: Path) -> Self:
        """The same settings with every path absolute, a model folder of the workspace too."""
        absolute = super().resolved(workspace)
        if self.model is None or not (workspace / self.model).is_dir():
            return absolute
        return absolute.model_copy(update={"model": str(workspace / self.model)})

    def inputs(self) -> list[Path]:
        """The rows and, where it is a folder, the student."""
        if self.model is None:
            return [*super().inputs(), newest_checkpoint(self.checkpoints) or self.checkpoints]
        folder = Path(self.model)
        return [*super().inputs(), *([folder] if folder.is_dir() else [])]

    def finished(self) -> tuple[int, int] | None:
        """Rows answered and to answer of an interrupted run."""
        if not self.out.is_file() or not self.test.is_file():
            return None
        wanted = {row.id for row in _selected(self)}
        done: set[str] = set()
        with suppress(BadRow):  # a kill cut the last line off; the next run mends it
            done.update(row.id for row in rows.read_rows(self.out))
        return len(done & wanted), len(wanted)


@stage
def run(config: EvalConfig, context: Context) -> Result:
    """Evaluate the student on held-out spots, beside its base with --compare-base; resumes."""
    from mtgdm.student.installed import TRAINING, require

    require(*TRAINING, *(["bitsandbytes"] if config.load_in_4bit else []))
    wanted = list(_selected(config))
    if not wanted:
        raise UserError(
            f"no row is in the split `{config.split}`",
            where=config.test,
            hint="--split asks the rows of another split",
        )
    model = chosen_checkpoint(config.model, config.checkpoints)
    leaked = _refuse_leak(model, wanted, config, context)
    from mtgdm.student.noise import quiet

    with quiet():
        return _Evaluation(config, context, model, wanted, leaked).run()


# --- rows ----------------------------------------------------------------------------------------


def _selected(config: EvalConfig) -> Iterator[Row]:
    """The rows of the split, each id once, as many as asked for."""
    seen: set[str] = set()

    def unique() -> Iterator[Row]:
        for row in rows.read_rows(config.test, answered=True):
            if row.split == config.split and row.id not in seen:
                seen.add(row.id)
                yield row

    return islice(unique(), config.limit or None)


def _refuse_leak(model: str, wanted: Sequence[Row], config: EvalConfig, context: Context) -> int:
    """How many rows are about what the student was trained on; without --allow-leak there may be none."""
    path = Path(model) / "training.json"
    if not path.is_file():
        context.warn(f"{model} has no training.json: whether it was trained on these spots cannot be told")
        return 0
    training = json.loads(path.read_text(encoding="utf-8"))
    spots = {_spot_key(spot) for spot in training["train_spots"]}
    ids = set(training.get("train_ids_without_spot", ()))
    leaked = [row for row in wanted if (row.id in ids if row.spot is None else _spot_key(row.spot) in spots)]
    if leaked and not config.allow_leak:
        names = {row.spot or row.id for row in leaked}
        raise UserError(
            f"the student was trained on {len(names):,} of these spots ({len(leaked):,} of {len(wanted):,} rows): its "
            "answers would say nothing about spots it does not know",
            where=config.test,
            hint="--split test asks held-out spots; --allow-leak evaluates all the same",
        )
    if leaked:
        context.warn(f"{len(leaked):,} of {len(wanted):,} rows are about spots the student was trained on")
    return len(leaked)


def _spot_key(spot: str) -> str:
    return "".join(unicodedata.normalize("NFKC", spot).split()).casefold()


# --- the run -------------------------------------------------------------------------------------


class _Evaluation:
    """One run: what is asked, what is there already, and where the answers go."""

    def __init__(
        self, config: EvalConfig, context: Context, model: str, wanted: list[Row], leaked: int
    ) -> None:
        from mtgdm.student import base, generation

        self.config = config
        self.context = context
        self.wanted = wanted
        self.leaked = leaked
        self.name = model
        self.source = base.locate(model, context.workspace)
        base.check_folder(self.source)
        self.is_adapter = base.is_adapter(self.source)
        if config.compare_base and not self.is_adapter:
            raise UserError(
                f"{model} is no adapter, so there is no base model to compare it with",
                hint="leave out --compare-base",
            )
        self.placement = base.place(config.device_mode)
        self.chat = generation.load_chat(self.source, model, context.workspace)
        self.prompts = {row.id: self._prompt(row) for row in wanted}
        self.max_new_tokens = config.max_new_tokens or self._sized()
        self.label = self._label()
        self.fingerprint = settings_digest(
            {
                "weights": _weights(self.source, self.is_adapter),
                "template": self.chat.fingerprint,
                "settings": [config.split, config.compare_base, config.load_in_4bit, config.max_new_tokens],
            }
        )[:16]

    def run(self) -> Result:
        """Ask the base, then the student, and write each row as soon as it is whole."""
        config = self.config
        earlier = self._earlier()
        missing = [row for row in self.wanted if row.id not in earlier]
        if earlier:
            self.context.print(f"{len(earlier):,} of {len(self.wanted):,} rows are there already")
        metrics_path = self.context.log_path(".metrics.jsonl")
        scored: dict[str, Metrics] = {}
        of_base: dict[str, Metrics] = {}
        with metrics_path.open("wb") as metrics_file, Journal(config.out) as journal:

            def keep(row: dict[str, Any]) -> None:
                metrics_file.write(rows.encode(_metrics_line(row)))
                metrics_file.flush()
                scored[row["id"]] = row["metrics"]
                if row.get("base_metrics"):
                    of_base[row["id"]] = row["base_metrics"]

            for row in self.wanted:
                if row.id in earlier:
                    keep(earlier[row.id])
            if missing:
                self._ask(missing, journal, keep, scored)
        rows.put_in_order(config.out, (row.id for row in self.wanted))
        self._base_path().unlink(missing_ok=True)
        means, base_means = _means(scored.values()), _means(of_base.values())
        return Result(
            counts={
                "rows": len(self.wanted),
                "leaked": self.leaked,
                "student": means,
                "base": base_means or None,
            },
            summary=_summary(self.wanted, config.split, means, base_means),
        )

    def _ask(
        self,
        missing: list[Row],
        journal: Journal,
        keep: Callable[[dict[str, Any]], None],
        scored: Mapping[str, Metrics],
    ) -> None:
        from mtgdm.student import generation

        model = generation.load(
            self.source,
            self.name,
            self.placement,
            workspace=self.context.workspace,
            load_in_4bit=self.config.load_in_4bit,
        )
        total = len(missing) * (2 if self.config.compare_base else 1)
        with self.context.progress(total, "rows") as bar:
            of_base: dict[str, dict[str, Any]] = {}
            if self.config.compare_base:
                with _adapter_off(model):
                    of_base = self._ask_base(model, missing, bar)
            model = generation.merged(model)
            by_id = {row.id: row for row in missing}
            for number, (identity, answer) in enumerate(self._answers(model, missing, bar), start=1):
                row = self._scored_row(by_id[identity], answer, of_base.get(identity))
                journal.append(row)
                keep(row)
                self._log(number, row)
                bar.note(f"char-F1 {fmean(one['char_f1'] for one in scored.values()):.3f}")

    def _ask_base(self, model: Any, missing: list[Row], bar: Progress) -> dict[str, dict[str, Any]]:
        """The base's answers, in a journal of their own until the student's stand beside them."""
        path = self._base_path()
        found: dict[str, dict[str, Any]] = {}

        def inspect(number: int, line: bytes) -> None:
            value = rows.parse_object(path, number, line)
            if value.get("fingerprint") == self.fingerprint:
                found[value["id"]] = value

        with Journal(path, inspect=inspect) as journal:
            asked = [row for row in missing if row.id not in found]
            by_id = {row.id: row for row in asked}
            bar.advance(len(missing) - len(asked))
            bar.note("base model")
            for identity, answer in self._answers(model, asked, bar):
                value = {
                    "id": identity,
                    "messages": by_id[identity].prompt,
                    "fingerprint": self.fingerprint,
                    "output": answer.text,
                    "runtime": _runtime(answer),
                }
                journal.append(value)
                found[identity] = value
        return found

    def _answers(self, model: Any, asked: Sequence[Row], bar: Progress) -> Iterator[tuple[str, Answer]]:
        from mtgdm.student import generation

        prompts = [self.prompts[row.id] for row in asked]
        for batch in generation.answers(
            model, self.chat, prompts, batch=self.config.batch, max_new_tokens=self.max_new_tokens
        ):
            for place, answer in batch:
                yield asked[place].id, answer
                bar.advance()

    def _scored_row(self, row: Row, answer: Answer, of_base: dict[str, Any] | None) -> dict[str, Any]:
        scored: dict[str, Any] = {
            "id": row.id,
            "messages": row.prompt,
            "reference": row.answer,
            "output": answer.text,
        }
        if of_base is not None:
            scored["base_output"] = of_base["output"]
        domain = self.context.domain
        scored["metrics"] = score(domain, row, answer.text, _runtime(answer))
        if of_base is not None:
            scored["base_metrics"] = score(domain, row, of_base["output"], of_base["runtime"])
        about = {"model": self.label, "fingerprint": self.fingerprint}
        scored["meta"] = {**row.meta, "split": row.split, "eval": about}
        return scored

    def _log(self, number: int, row: dict[str, Any]) -> None:
        if number % self.config.log_every == 0:
            self.context.log.info(
                "row %d %s %s", number, row["id"], json.dumps(_metrics_line(row), ensure_ascii=False)
            )

    # --- what is there already ---

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """The rows that need not be asked again; another model's or other settings' rows are refused."""
        out = self.config.out
        if self.config.overwrite:
            rows.manifest_path(out).unlink(missing_ok=True)
            out.unlink(missing_ok=True)
            self._base_path().unlink(missing_ok=True)
        references = {row.id: row.answer for row in self.wanted}
        found: dict[str, dict[str, Any]] = {}
        foreign = 0
        if not out.exists():
            return found
        with Journal(out):
            pass  # cuts off what a kill left of a last line
        retrained = False
        for number, line in rows.read_lines(out):
            value = rows.parse_object(out, number, line)
            about = value.get("meta", {}).get("eval") or {}
            if about.get("fingerprint") != self.fingerprint:
                self._refuse_other(about)
                retrained = True
            elif references.get(value["id"]) == value["reference"]:
                found[value["id"]] = value
            else:
                foreign += 1
        if retrained:
            self.context.print(f"{self.label} was trained again: its old answers are replaced")
            rows.manifest_path(out).unlink(missing_ok=True)
            out.unlink()
            return {}
        if foreign and not self.config.limit:
            # Rows that the test file no longer holds, or holds with another reference.
            with rows.replace(out) as file:
                file.writelines(rows.encode(value) for value in found.values())
        return found

    def _refuse_other(self, about: Mapping[str, Any]) -> None:
        if about.get("model") == self.label and about.get("fingerprint"):
            return
        other = about.get("model") or "another tool"
        raise UserError(
            f"these answers were made by {other} with other settings, not by {self.label}",
            where=self.config.out,
            hint="--overwrite replaces them; --out keeps them and writes another file",
        )

    def _base_path(self) -> Path:
        out = self.config.out
        return out.with_name(f"{out.stem}.base{out.suffix}")

    # --- what is asked ---

    def _prompt(self, row: Row) -> list[int]:
        from mtgdm.student.chat import ChatProblem

        try:
            return self.chat.prompt(row.prompt)
        except ChatProblem as problem:
            raise row.bad(problem.message, hint=problem.hint) from problem

    def _sized(self) -> int:
        """A quarter more than the longest reference, in steps of 32, so that a few new rows change nothing."""
        longest = max(len(self.chat.tokens(row.answer or "")) for row in self.wanted)
        return 32 * math.ceil(1.25 * (longest + 1) / 32)

    def _label(self) -> str:
        path = Path(self.source)
        inside = path.is_absolute() and path.is_relative_to(self.context.workspace)
        settings = "" if not self.config.compare_base else ", beside its base"
        four_bit = ", in 4-bit" if self.config.load_in_4bit else ""
        size = f", at most {self.config.max_new_tokens} tokens" if self.config.max_new_tokens else ""
        place = path.relative_to(self.context.workspace).as_posix() if inside else self.name
        return f"{place} on {self.config.split}{settings}{four_bit}{size}"


def _adapter_off(model: Any) -> AbstractContextManager[None]:
    found: AbstractContextManager[None] = model.disable_adapter()
    return found


def _weights(source: str, is_adapter: bool) -> dict[str, str]:
    """What tells one state of a model from another; a whole model by sizes and times, for it may be 60 GB."""
    folder = Path(source)
    if not folder.is_dir():
        return {"hub": source}
    if is_adapter:
        return {
            name: manifest.state(folder / name, folder).sha256
            for name in _ADAPTER_FILES
            if (folder / name).is_file()
        }
    files = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]
    stats = {path.name: path.stat() for path in sorted(files) if path.is_file()}
    return {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()}


# --- metrics -------------------------------------------------------------------------------------


def score(domain: Domain, row: Row, output: str, runtime: Mapping[str, Any]) -> Metrics:
    """The metrics of one output: runtime, likeness to the reference, contract, and facts of the record."""
    from mtgdm.scoring.text import text_metrics

    contract = domain.contract(row.type) if row.type is not None else None
    record = row.meta.get("record")
    facts = domain.check_facts(record, row.type, output) if row.type and isinstance(record, dict) else None
    return {
        **runtime,
        **text_metrics(output, row.answer or ""),
        "contract_valid": None if contract is None else answer_problem(domain, row.type, output) is None,
        "fact_recall": None if facts is None else facts.recall,
        "unsupported_facts": None if facts is None else len(facts.unsupported),
    }


def _runtime(answer: Answer) -> Metrics:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "latency_s": round(answer.latency_s, 6),
        "tokens_per_s": round(answer.output_tokens / answer.latency_s, 3) if answer.latency_s else None,
        "finish_reason": answer.finish_reason,
    }


def _metrics_line(row: Mapping[str, Any]) -> dict[str, Any]:
    meta = row["meta"]
    return {
        "id": row["id"],
        "spot": meta.get("spot"),
        "province": meta.get("province"),
        "type": meta.get("type"),
        "metrics": row["metrics"],
        "base_metrics": row.get("base_metrics"),
    }


_SHOWN = {
    "char_f1": "char-F1",
    "contract_valid": "contract-valid",
    "fact_recall": "facts",
    "exact_match": "exact",
}


def _means(metrics: Any) -> dict[str, float]:
    """Means over the rows that have the metric."""
    listed = list(metrics)
    found: dict[str, float] = {}
    for key in _SHOWN:
        values = [float(one[key]) for one in listed if one.get(key) is not None]
        if values:
            found[key] = round(fmean(values), 4)
    return found


def _summary(wanted: Sequence[Row], split: str, means: Mapping[str, float], base: Mapping[str, float]) -> str:
    spots = len({row.spot for row in wanted if row.spot is not None})
    parts = [
        f"{_SHOWN[key]} {value:.2f}" + (f" (base {base[key]:.2f})" if key in base else "")
        for key, value in means.items()
    ]
    about = f" of {spots:,} spots" if spots else ""
    return f"{len(wanted):,} {split} rows{about}: {', '.join(parts)}"
